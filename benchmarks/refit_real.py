"""What a re-fit gains with more calibration tokens, and that it never hurts: loss of held-out windows before and after.

    python benchmarks/refit_real.py --models smollm2 world

Each model is cut by its default importance (curvature, 64 windows of 128 tokens, seed 0) and re-fitted on 16, 64 and
256 windows. SmolLM2 and the world lose 20 and 50% of all parameters. Of Gemma 3 270M embeddings are 63%, so there it is
20 and 50% of the units of each layer. Losses, in nats, are those of 16 windows of C4 (of the world: of its own text)
that neither has seen. Rows are appended as they are measured: what stands in the table is not run again.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from machine import RESULTS, apart, append, done, machine, shared

import prunekit as pk
from prunekit.account import loss_on
from prunekit.pruning.plan_options import default_units

SOURCES = {"smollm2": "smollm2", "gemma": "build/real/gemma-3-270m-q4_k_m.gguf", "world": "world"}
BY_UNITS = ("gemma",)
WINDOWS = (16, 64, 256)


def rows_of(name: str, ratios: list[float], there: set[tuple[str, ...]]) -> Any:
    """One row a re-fit that is not there yet."""
    wanted = [(r, n) for r in ratios for n in WINDOWS if (name, str(r), str(n)) not in there]
    if not wanted:
        return
    model, tokenizer = pk.load(SOURCES[name])
    text = "world" if name == "world" else shared("data/calibration/c4_demo.jsonl")
    length = min(128, model.config.max_position_embeddings)

    def drawn(n: int, **options: Any) -> Any:
        return pk.calibration_set(text, tokenizer, n_samples=n, seq_len=length, seed=0, **options)

    groups = pk.discover(model)
    scores = pk.score(model, default_units(groups), pk.Curvature(), drawn(64))
    held = drawn(max(WINDOWS), held_out=True)
    held = apart(held, [drawn(n) for n in WINDOWS])[:16]
    of = "units" if name in BY_UNITS else "parameters"
    dense = loss_on(model, held)
    for ratio in ratios:
        plan = pk.plan(groups, scores, ratio, of=of)
        cut = loss_on(pk.prune(model, plan, measure=False), held)
        for n in (n for r, n in wanted if r == ratio):
            began = time.perf_counter()
            small = pk.prune(model, plan, compensate=drawn(n), measure=False)
            seconds = time.perf_counter() - began
            row = {"model": name, "ratio": ratio, "of": of, "windows": n, "seq_len": length, "dense": dense}
            row |= {"cut": cut, "refitted": loss_on(small, held), "seconds": seconds}
            kept = sum(p.numel() for p in small.parameters()) / groups.n_parameters
            yield {key: round(x, 4) if isinstance(x, float) else x for key, x in {**row, "kept": kept}.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SOURCES), default=list(SOURCES))
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.5])
    parser.add_argument("--out", type=Path, default=RESULTS / "refit_real.csv")
    args = parser.parse_args()
    told, there = machine(), done(args.out, "model", "ratio", "windows")
    for name in args.models:
        for row in rows_of(name, args.ratios, there):
            append({**told, **row}, args.out)


if __name__ == "__main__":
    main()
