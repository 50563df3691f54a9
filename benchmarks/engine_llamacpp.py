"""llama.cpp on one GGUF file, run inside an environment of its own; `ask` is the other side of it.

Reads what is asked (the file, prompts as token ids, how many tokens, how often) from a JSON file. Writes the tokens
that follow, and the tokens a second, to another. The cache holds float32 and attention is the plain one, so that only
the order of sums differs from transformers.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def ask(python: Path, file: Path, prompts: list[list[int]], new_tokens: int, repeats: int = 1) -> dict[str, Any]:
    """What llama.cpp computes on one thread.

    Args:
        python: of the environment that has xllamacpp.
        file: with a vocabulary, without which llama.cpp's server stops.
        prompts: token ids.
        new_tokens: that follow each prompt; fewer where the model ends.
        repeats: how often all prompts are timed, after once that does not count.

    Returns:
        `version`; `tokens`, those that follow each prompt; `rates`, tokens a second of each repeat.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "given.json"), Path(folder, "found.json")
        asked = {"file": str(file), "prompts": prompts, "new_tokens": new_tokens, "repeats": repeats}
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


def complete(engine: Any, prompt: list[int], new_tokens: int, **more: Any) -> dict[str, Any]:
    """llama.cpp's answer of the tokens of highest probability that follow a prompt."""
    asked = {"prompt": prompt, "n_predict": new_tokens, "temperature": 0, "cache_prompt": False, **more}
    answer: dict[str, Any] = engine.handle_completions(asked)
    if "choices" not in answer:
        raise RuntimeError(f"llama.cpp refuses: {answer}")
    return answer


def tokens_after(engine: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """Their ids, which it tells with their probabilities."""
    chosen = complete(engine, prompt, new_tokens, logprobs=1)["choices"][0]["logprobs"]["content"]
    return [token["id"] for token in chosen]


def rate(engine: Any, prompts: list[list[int]], new_tokens: int) -> float:
    """Tokens a second that it writes, without the time for the prompts."""
    timings = [complete(engine, ids, new_tokens)["timings"] for ids in prompts]
    return 1000 * sum(t["predicted_n"] for t in timings) / sum(t["predicted_ms"] for t in timings)


def main() -> None:
    given, found = map(Path, sys.argv[1:])
    asked = json.loads(given.read_text())
    prompts, new_tokens = asked["prompts"], asked["new_tokens"]
    engine = server(asked["file"], max(map(len, prompts)) + new_tokens + 8)
    told = {
        "version": f"xllamacpp {importlib.metadata.version('xllamacpp')}",
        "tokens": [tokens_after(engine, ids, new_tokens) for ids in prompts],  # the first run also reads the file
        "rates": [rate(engine, prompts, new_tokens) for _ in range(asked["repeats"])],
    }
    found.write_text(json.dumps(told))


if __name__ == "__main__":
    main()
