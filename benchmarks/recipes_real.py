"""The five recipes from beginning to end on SmolLM2: seconds, peak memory, and what is left before and after recovery.

Settings are the papers' own as far as they fit: LLM-Pruner and HyWIA take 25% of the heads and channels of the middle
layers, scored on 10 samples of 64 tokens; LoRAShear and the predictor a fifth of all parameters; SparseLLM half and 70%
of the weights, from 64 samples. The papers recover on 50,000 instructions and more, which takes days here: all recover
by `LoRA()` on so many tokens of C4, Wikipedia and Alpaca, the uncut model too. LoRAShear trains while it cuts, so it
has one row, the end. Every recipe has a process of its own. Perplexity on C4 is that of 16 windows that no score has
read (recovery may have). Rows are appended as they are measured: what stands in the table is not run again.
"""

import argparse
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, SEVEN, apart, append, done, machine, shared
from recovery_real import training_windows

import prunekit as pk
from prunekit import recipes
from prunekit.account import loss_on

C4 = "data/calibration/c4_demo.jsonl"
TEXTS = {"wikitext2": "wikitext2/test.txt", "ptb": "ptb/ptb.test.txt"}


def drawn(tokenizer: Any, n: int, length: int) -> torch.Tensor:
    return pk.calibration_set(shared(C4), tokenizer, n_samples=n, seq_len=length, seed=0)


def llm_pruner(model: Any, tokenizer: Any, _: int) -> Any:
    return recipes.llm_pruner(model, drawn(tokenizer, 10, 64), 0.25).model


def hywia(model: Any, tokenizer: Any, _: int) -> Any:
    return recipes.hywia(model, drawn(tokenizer, 10, 64), 0.25).model


def lorashear(model: Any, tokenizer: Any, tokens: int) -> Any:
    sources = {"c4": shared(C4), "wikipedia": shared("data/calibration/wiki_demo.txt")}
    method = pk.LoRA(max_steps=tokens // (8 * 128))
    return recipes.lorashear(model, tokenizer, sources, 0.2, method=method).model


def predictor(model: Any, tokenizer: Any, _: int) -> Any:
    text = shared("data/calibration/wiki_demo.txt").read_text()[:6000]
    counts = {"n_pairs": 24, "n_rounds": 2, "top_k": 8}
    return recipes.accuracy_predictor(model, tokenizer, drawn(tokenizer, 16, 128), 0.2, text, **counts).model


def sparse_half(model: Any, tokenizer: Any, _: int) -> Any:
    return recipes.sparsellm(model, drawn(tokenizer, 64, 128), 0.5).model


def sparse_more(model: Any, tokenizer: Any, _: int) -> Any:
    return recipes.sparsellm(model, drawn(tokenizer, 64, 128), 0.7).model


WAYS = {
    "dense": lambda model, *_: model,
    "LLM-Pruner": llm_pruner,
    "HyWIA": hywia,
    "SparseLLM, 50%": sparse_half,
    "SparseLLM, 70%": sparse_more,
    "LoRAShear": lorashear,
    "predictor": predictor,
}
TRAINS = ("LoRAShear",)  # while it cuts: there is nothing to measure before


def measured(model: Any, tokenizer: Any, characters: int, limit: int) -> dict[str, float]:
    found = {
        name: pk.perplexity(model, tokenizer, shared(f"data/{path}").read_text()[:characters])
        for name, path in TEXTS.items()
    }
    seen = [drawn(tokenizer, 10, 64), drawn(tokenizer, 16, 128), drawn(tokenizer, 64, 128)]
    held = apart(pk.calibration_set(shared(C4), tokenizer, n_samples=64, seq_len=128, seed=0, held_out=True), seen)[:16]
    found["c4"] = float(torch.tensor(loss_on(model, held)).exp())
    result = pk.zero_shot(model, tokenizer, SEVEN, limit=limit, data_dir=shared("data/zeroshot"))
    return {**{name: round(value, 2) for name, value in found.items()}, "tasks": round(result.mean, 4)}


def run(way: str, tokens: int, characters: int, limit: int) -> list[dict[str, Any]]:
    """One row as pruned, where there is such a model, and one after recovery."""
    model, tokenizer = pk.load("smollm2")
    whole, rows = sum(p.numel() for p in model.parameters()), []

    def row(stage: str, model: Any, began: float) -> None:
        seconds, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        kept = sum(int((p != 0).sum()) for p in model.parameters()) / whole
        told = {"recipe": way, "stage": stage, "kept": round(kept, 4), "seconds": round(seconds, 1), "peak_mb": peak}
        rows.append(
            {**told, "tokens": tokens if stage == "recovered" else 0, **measured(model, tokenizer, characters, limit)}
        )

    began = time.perf_counter()
    small = WAYS[way](model, tokenizer, tokens)
    if way in TRAINS:
        row("recovered", small, began)
        return rows
    row("pruned", small, began)
    began = time.perf_counter()
    method = pk.LoRA(max_steps=tokens // (8 * 128))
    small = pk.recover(small, method, training_windows(tokenizer), measure=False, inplace=way != "dense")
    row("recovered", small, began)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--tokens", type=int, default=41_000)
    parser.add_argument("--characters", type=int, default=13_000)
    parser.add_argument("--limit", type=int, default=100, help="questions of each of the seven tasks")
    parser.add_argument("--out", type=Path, default=RESULTS / "recipes_smollm2.csv")
    args = parser.parse_args()
    told, there = machine(), done(args.out, "recipe")
    for way in (way for way in args.ways if (way,) not in there):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            for row in pool.submit(run, way, args.tokens, args.characters, args.limit).result():
                append({**told, **row}, args.out)


if __name__ == "__main__":
    main()
