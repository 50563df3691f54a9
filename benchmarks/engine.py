"""Another engine on cut models: whether llama.cpp computes what transformers does, and how fast, dense beside cut.

    make bench-engine

SmolLM2 is exported as GGUF in float32 as it is; with a fifth of the FFN channels of every layer removed (even: GGUF's
`llama`); and with a fifth of all parameters removed, heads and channels, most where they matter least (uneven: GGUF's
`deci`). llama.cpp (xllamacpp, in an environment of its own) and transformers continue the same prompts, each time with
the token of highest probability, on one thread. Engines and models run in turn, and the fastest of some rounds counts.

Columns: `same` of `tokens` are those that both chose, up to the first in a prompt that differs; `gap`, where one
differs, is by how much transformers' two highest logits differ there, at most. The rates are tokens that are written a
second of CPU time and of the clock, the time for the prompts included; on a busy machine the first is the better one.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from engine_llamacpp import ask
from machine import HERE, RESULTS, append, machine, shared
from transformers import logging

import prunekit as pk
from prunekit.pruning.plan_options import default_units

PYTHON = HERE.parent / ".venv-llamacpp" / "bin" / "python"
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a small dragon who",
    "To make bread, you need flour, water,",
    "The three laws of motion say that",
    "In 1969, two astronauts",
    "def fibonacci(n):\n",
    "My favourite book is about",
    "The price of wheat rose because",
)


def cuts_of(model: Any, tokenizer: Any, ratio: float, windows: int) -> dict[str, Any]:
    """The model, an even and an uneven cut of it."""
    groups = pk.discover(model)
    calib = pk.calibration_set(
        shared("data/calibration/c4_demo.jsonl"), tokenizer, n_samples=windows, seq_len=128, seed=0
    )
    scores = pk.score(model, default_units(groups), pk.Curvature(), calib)
    plans = {
        "even": pk.plan(groups, scores, ratio, of="units", kinds=["ffn_channel"]),
        "uneven": pk.plan(groups, scores, ratio),
    }
    return {"dense": model, **{way: pk.prune(model, plan, measure=False) for way, plan in plans.items()}}


@torch.no_grad()
def continued(model: Any, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Tokens that follow each prompt in transformers, whatever ends a text, and their CPU and wall seconds."""
    options = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    began = time.process_time(), time.perf_counter()
    tokens = [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in prompts]
    return {"tokens": tokens, "seconds": (time.process_time() - began[0], time.perf_counter() - began[1])}


def rates(name: str, runs: list[dict[str, Any]]) -> dict[str, float]:
    """Tokens a second of CPU time and of the clock, of the fastest run."""
    found = [[sum(map(len, run["tokens"])) / seconds for seconds in run["seconds"]] for run in runs]
    cpu, clock = (round(max(column), 1) for column in zip(*found, strict=True))
    return {f"{name}_cpu": cpu, f"{name}_clock": clock}


def n_same(a: list[int], b: list[int]) -> int:
    """How many tokens agree before the first that differs; the shorter one ends the comparison."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@torch.no_grad()
def gap(model: Any, tokens: list[int]) -> float:
    """By how much the two highest logits after these tokens differ."""
    first, second = model(torch.tensor([tokens])).logits[0, -1].topk(2).values.tolist()
    return float(first - second)


def compared(model: Any, prompts: list[list[int]], ours: list[list[int]], theirs: list[list[int]]) -> dict[str, Any]:
    """How many tokens are the same, of those that llama.cpp wrote."""
    same = [n_same(a, b) for a, b in zip(ours, theirs, strict=True)]
    gaps = [gap(model, ids + a[:n]) for ids, a, b, n in zip(prompts, ours, theirs, same, strict=True) if n < len(b)]
    return {"same": sum(same), "tokens": sum(map(len, theirs)), "gap": f"{max(gaps):.1e}" if gaps else ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--windows", type=int, default=16, help="of calibration")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "engine_smollm2.csv")
    args = parser.parse_args()
    if not PYTHON.exists():
        parser.error(f"{PYTHON.parent.parent.name} is missing: make bench-engine sets it up")
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    told = machine()
    model, tokenizer = pk.load(args.model, dtype="float32")
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    models = cuts_of(model, tokenizer, args.ratio, args.windows)
    ours: dict[str, list[dict[str, Any]]] = {way: [] for way in models}
    theirs: dict[str, list[dict[str, Any]]] = {way: [] for way in models}
    with tempfile.TemporaryDirectory() as folder:
        files = {
            way: pk.export(cut, Path(folder, way), layout="gguf", tokenizer=tokenizer) / "model.gguf"
            for way, cut in models.items()
        }
        for way in [way for _ in range(args.rounds) for way in models]:
            ours[way].append(continued(models[way], prompts, args.new_tokens))
            theirs[way].append(ask(PYTHON, files[way], prompts, args.new_tokens))
        for way, cut in models.items():
            ratio = 0.0 if way == "dense" else args.ratio
            row = {"engine": theirs[way][0]["version"], "model": Path(args.model).name, "way": way, "ratio": ratio}
            row |= {"parameters": cut.num_parameters(), "megabytes": round(files[way].stat().st_size / 1e6, 1)}
            row |= compared(cut, prompts, ours[way][0]["tokens"], theirs[way][0]["tokens"])
            row |= {"rounds": args.rounds, **rates("llamacpp", theirs[way]), **rates("transformers", ours[way])}
            append({**told, **row}, args.out)


if __name__ == "__main__":
    main()
