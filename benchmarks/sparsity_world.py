"""Zeros in unchanged shapes: what is left, by method and sparsity, over seeds of the calibration set.

    PYTHONPATH=tools python benchmarks/sparsity_world.py world  # the embedded model, a LLaMA
    PYTHONPATH=tools python benchmarks/sparsity_world.py opt  # an OPT of its size, trained on it first
    PYTHONPATH=tools python benchmarks/sparsity_world.py world --report

Each run is one row of results/sparsity_<subject>.csv; what stands there is not run again. Calibration: 64 windows of
128 tokens from documents of the world, joined as its training joins them. The OPT, whose FFNs have two matrices behind
a LayerNorm, is trained into build/opt_world in about half an hour of one core, and goes on where it was. One budget for
all matrices (`global`) is run for the first seed, and magnitude, which reads no calibration set, too. Accuracies are of
every fourth question.
"""

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from machine import RESULTS, SEVEN, append, machine
from torch import Tensor
from train_world import Settings, train
from transformers import OPTConfig

import prunekit as pk
from prunekit import world

SEEDS = (0, 1, 2)
METHODS = ("magnitude", "wanda", "sparsegpt", "sparsellm")
TARGETS: dict[str, dict[str, Any]] = {
    "50%": {"sparsity": 0.5},
    "70%": {"sparsity": 0.7},
    "80%": {"sparsity": 0.8},
    "90%": {"sparsity": 0.9},
    "2:4": {"sparsity": "2:4"},
    "3 of 4 zero": {"pattern": (1, 4)},
}
FRACTIONS = ("50%", "70%", "80%", "90%")
OPT = Path(__file__).parents[1] / "build" / "opt_world"
OPT_TOKENS = 4_096_000


def trained_opt() -> tuple[Any, Any]:
    """An OPT on the embedded world; trained first where it is not there."""
    if not (OPT / "model.safetensors").exists():
        config = OPTConfig(
            vocab_size=len(pk.load("world")[1]), hidden_size=192, ffn_dim=768, num_hidden_layers=8,
            num_attention_heads=8, max_position_embeddings=256, word_embed_proj_dim=192, dropout=0.0,
            bos_token_id=1, eos_token_id=2, pad_token_id=2, tie_word_embeddings=False,
        )  # fmt: skip
        train(OPT, Settings(tokens=OPT_TOKENS), "cpu", config=config, evaluate_every=0)
    return pk.load(OPT, dtype=torch.float32)


SUBJECTS: dict[str, Callable[[], tuple[Any, Any]]] = {"world": lambda: pk.load("world"), "opt": trained_opt}


def calibration(tokenizer: Any, seed: int) -> Tensor:
    text = "\n".join(world.documents(3_000, seed=seed + 1))
    return pk.calibration_set(text, tokenizer, n_samples=64, seq_len=128, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    path = RESULTS / f"sparsity_{args.subject}.csv"
    if not args.report:
        torch.set_num_threads(1)
        model, tokenizer = SUBJECTS[args.subject]()
        add(path, model, tokenizer, "dense", "0%", 0, "uniform")
        for seed in args.seeds:
            for target in TARGETS:
                for method in METHODS if seed == SEEDS[0] else METHODS[1:]:
                    add(path, model, tokenizer, method, target, seed, "uniform")
                for method in ("sparsegpt", "sparsellm") if target in FRACTIONS and seed == SEEDS[0] else ():
                    add(path, model, tokenizer, method, target, seed, "global")
    report(path)


def add(path: Path, model: Any, tokenizer: Any, method: str, target: str, seed: int, allocation: str) -> None:
    """One row, unless it is there."""
    key = {"method": method, "target": target, "seed": seed, "allocation": allocation}
    done = pd.read_csv(path, dtype=str) if path.exists() else pd.DataFrame(columns=list(key))
    if (done[list(key)] == [str(value) for value in key.values()]).all(axis=1).any():
        return
    start, sparse, remarks = time.process_time(), model, ()
    if method != "dense":
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            sparse = pk.sparsify(model, calibration(tokenizer, seed), method, **TARGETS[target], allocation=allocation)
        remarks = sparse.sparsity_report.remarks
    seconds = round(time.process_time() - start, 1)
    row = {"commit": machine()["commit"], **key, "cpu_seconds": seconds, **measured(sparse, tokenizer)}
    row |= {"remarks": " ".join(remarks)}
    append(row, path)


def measured(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Perplexity on wordings that no training saw, accuracies, and the zeros that there are."""
    held_out = "\n".join(world.documents(400, split="validation"))
    few = [replace(task, questions=task.questions[::4]) for task in world.tasks().values()]
    found = pk.evaluate(model, tokenizer, ["perplexity", "zero_shot"], text=held_out, tasks=few, batch_size=64)
    tasks = {str(name): round(float(value), 4) for name, value in found.zero_shot.accuracy().items()}
    seven = round(sum(tasks[name] for name in SEVEN) / len(SEVEN), 4)
    report = getattr(model, "sparsity_report", None)
    zeros = {"sparsity": round(report.sparsity, 5)} if report is not None else {"sparsity": 0.0}
    return zeros | {
        "perplexity": round(found["perplexity"], 4),
        "seven": seven,
        "eleven": round(found.zero_shot.mean, 4),
    }


def report(path: Path) -> None:
    """Mean and range over seeds."""
    table = pd.read_csv(path)
    rows = table.groupby(["target", "allocation", "method"], sort=False)
    figures = ["sparsity", "perplexity", "seven", "eleven", "cpu_seconds"]
    print(rows[figures].agg(["mean", "min", "max"]).round(3).to_string())


if __name__ == "__main__":
    main()
