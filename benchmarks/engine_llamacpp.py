"""llama.cpp on one GGUF file, run inside an environment of its own; `ask` is the other side of it.

Reads what is asked (the file, prompts as token ids, how many tokens) from a JSON file. Writes the tokens that follow,
and what they took in CPU and wall seconds, to another. The cache holds float32 and attention is the plain one, so that
only the order of sums differs from transformers.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any


def ask(python: Path, file: Path, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """What llama.cpp computes on one thread.

    Args:
        python: of the environment that has xllamacpp.
        file: with a vocabulary, without which llama.cpp's server stops.
        prompts: token ids.
        new_tokens: that follow each prompt; fewer where the model ends.

    Returns:
        `version`; `tokens`, those that follow each prompt; `seconds`, of CPU and by the clock, prompts included.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "given.json"), Path(folder, "found.json")
        asked = {"file": str(file), "prompts": prompts, "new_tokens": new_tokens}
        given.write_text(json.dumps(asked))
        done = subprocess.run([python, __file__, given, found], env=_environment(), capture_output=True, text=True)
        if not found.is_file():
            raise RuntimeError(f"llama.cpp did not run {file.name}: {done.stdout[-1000:]}{done.stderr[-1000:]}")
        answer: dict[str, Any] = json.loads(found.read_text())
        return answer


def _environment() -> dict[str, str]:
    """Without this project's paths, which the other environment must not see."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def server(file: str, context: int) -> Any:
    """llama.cpp's server inside this process, on one thread."""
    import xllamacpp as llama  # the side that asks lacks it

    params = llama.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup, params.verbosity = False, 0
    return llama.Server(params)


def complete(engine: Any, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    """llama.cpp's answer of the tokens of highest probability that follow a prompt."""
    asked = {"prompt": prompt, "n_predict": new_tokens, "temperature": 0, "cache_prompt": False, "return_tokens": True}
    head = {"Content-Type": "application/json"}
    question = urllib.request.Request(f"{engine.listening_address}/completion", json.dumps(asked).encode(), head)
    with urllib.request.urlopen(question) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def main() -> None:
    given, found = map(Path, sys.argv[1:])
    asked = json.loads(given.read_text())
    prompts, new_tokens = asked["prompts"], asked["new_tokens"]
    engine = server(asked["file"], max(map(len, prompts)) + new_tokens + 8)
    complete(engine, prompts[0], 2)  # the first run also reads the file
    began = time.process_time(), time.perf_counter()
    tokens = [complete(engine, ids, new_tokens)["tokens"] for ids in prompts]
    seconds = time.process_time() - began[0], time.perf_counter() - began[1]
    version = f"xllamacpp {importlib.metadata.version('xllamacpp')}"
    found.write_text(json.dumps({"version": version, "tokens": tokens, "seconds": seconds}))


if __name__ == "__main__":
    main()
