"""Zeros in a real language model: seconds, peak memory and perplexity of the four methods.

    python benchmarks/sparsity_real.py --calibration c4.jsonl --text wikitext2/test.txt

The model is SmolLM2-135M-Instruct unless another is named. Calibration: 16 windows of 128 tokens, seed 0. Perplexity:
the first 26 kB of the text in windows of 128 tokens. Every run has a process of its own, whose peak memory (resident,
with Python, torch and the model) is noted before the perplexity is measured. Each is one row of
results/sparsity_smollm2.csv; what stands there is not run again.
"""

import argparse
import multiprocessing
import resource
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from machine import RESULTS, append, machine

import prunekit as pk

METHODS = ("magnitude", "wanda", "sparsegpt", "sparsellm")
TARGETS = (0.5, 0.7, "2:4")
N_BYTES = 26_000


def measured(args: argparse.Namespace, method: str, target: Any) -> dict[str, Any]:
    """One row."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, tokenizer = pk.load(args.model)
    calib = pk.calibration_set(args.calibration, tokenizer, n_samples=16, seq_len=128, seed=0)
    start, wall = time.process_time(), time.monotonic()
    if method != "dense":
        model = pk.sparsify(model, calib, method, target, inplace=True)
    seconds, waited = time.process_time() - start, time.monotonic() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    text = Path(args.text).read_bytes()[:N_BYTES].decode(errors="ignore")
    perplexity = round(pk.perplexity(model, tokenizer, text), 2)
    return {
        "commit": machine()["commit"], "method": method, "target": str(target), "cpu_seconds": round(seconds, 1),
        "seconds": round(waited, 1), "peak_mb": round(peak), "perplexity": perplexity,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", required=True, help="a text file to calibrate on, such as a sample of C4")
    parser.add_argument("--text", required=True, help="a text file to measure perplexity on, such as WikiText-2's test")
    parser.add_argument("--out", type=Path, default=RESULTS / "sparsity_smollm2.csv")
    args = parser.parse_args()
    for target in (0.0, *TARGETS):
        for method in METHODS if target else ("dense",):
            done = pd.read_csv(args.out, dtype=str) if args.out.exists() else pd.DataFrame(columns=["method", "target"])
            if not ((done["method"] == method) & (done["target"] == str(target))).any():
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    append(pool.submit(measured, args, method, target).result(), args.out)
    print(pd.read_csv(args.out).to_string(index=False))


if __name__ == "__main__":
    main()
