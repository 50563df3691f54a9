"""What block reconstruction gains over the re-fit: perplexity of held-out windows, and seconds.

    python benchmarks/blocks_real.py --models world smollm2 --windows 64

Each model is cut by its default importance (curvature, 64 windows of 128 tokens, seed 0) and loses 20 and 50% of its
parameters. Then nothing is done (`none`), the consumer layers are re-fitted (`refit`), each layer is trained to give
the dense layer's outputs (`blocks`), both in this order (`refit, blocks`), or the whole model is trained on the same
windows for about as long as `blocks` took (`training`). Losses, in nats, are those of 16 windows of C4 (of the world:
of its own text) that no step has seen. Rows are appended as they are measured: what stands in the table is not run
again.
"""

import argparse
import copy
import math
import time
from pathlib import Path
from typing import Any

from machine import RESULTS, apart, append, done, machine, shared

import prunekit as pk
from prunekit.account import loss_on
from prunekit.pruning.plan_options import default_units

WAYS = ("none", "refit", "blocks", "refit, blocks", "training")
OPTIONS = ("steps", "batch_size", "learning_rate")


def rows_of(name: str, args: argparse.Namespace, there: set[tuple[str, ...]]) -> Any:
    """One row a way that is not there yet."""
    n, options = args.windows, {"steps": args.steps, "batch_size": args.batch_size}
    options |= {} if args.learning_rate is None else {"learning_rate": args.learning_rate}
    wanted = [(r, way) for r in args.ratios for way in args.ways if (name, str(r), str(n), way) not in there]
    if not wanted:
        return
    model, tokenizer = pk.load(name)
    text = "world" if name == "world" else shared("data/calibration/c4_demo.jsonl")

    def drawn(n: int, **how: Any) -> Any:
        return pk.calibration_set(text, tokenizer, n_samples=n, seq_len=128, seed=0, **how)

    groups, calib = pk.discover(model), drawn(n)
    scores = pk.score(model, default_units(groups), pk.Curvature(), drawn(64))
    held = apart(drawn(max(256, n), held_out=True), [calib, drawn(64)])[:16]
    dense = loss_on(model, held)
    for ratio in args.ratios:
        plan = pk.plan(groups, scores, ratio)
        cut, took = pk.prune(model, plan, measure=False), math.nan
        for way in (way for r, way in wanted if r == ratio):
            if way == "training" and math.isnan(took):  # without the seconds of `blocks`, measured now
                continue
            small, began = copy.deepcopy(cut), time.perf_counter()
            if "refit" in way:
                pk.compensate(small, model, plan, calib)
            if "blocks" in way:
                pk.reconstruct(small, model, plan, calib, **options)
            took = time.perf_counter() - began if way == "blocks" else took
            if way == "training":
                small = _trained(small, calib, took, args.batch_size)
            row = {"model": name, "ratio": ratio, "windows": n, "seq_len": 128, "way": way}
            row |= {name: options.get(name, "") if "blocks" in way else "" for name in OPTIONS}
            row |= {"seconds": time.perf_counter() - began, "dense": dense, "loss": loss_on(small, held)}
            row |= {"perplexity": math.exp(row["loss"])}
            yield {key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()}


def _trained(small: Any, calib: Any, seconds: float, batch_size: int) -> Any:
    """Trained on the windows themselves for about some seconds; two steps are timed first."""

    def method(steps: int) -> Any:
        return pk.FullTuning(max_steps=steps, batch_size=batch_size)

    began = time.perf_counter()
    pk.recover(small, method(2), calib, measure=False)
    steps = 2 * seconds / (time.perf_counter() - began)
    return pk.recover(small, method(max(2, round(steps))), calib, measure=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["world", "smollm2"], default=["world", "smollm2"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.5])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--out", type=Path, default=RESULTS / "blocks_real.csv")
    args = parser.parse_args()
    told, there = machine(), done(args.out, "model", "ratio", "windows", "way")
    for name in args.models:
        for row in rows_of(name, args, there):
            append({**told, **row}, args.out)


if __name__ == "__main__":
    main()
