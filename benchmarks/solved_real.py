"""A fifth of SmolLM2 by a solved budget: damages measured on few tokens, in two rounds, beside the default.

The default is curvature with global ranking; both order the units by the same scores (64 windows of C4), and both are
measured without and with a re-fit on these windows. Perplexity is that of the first characters of WikiText-2 and PTB.
Rows are appended as they are measured: what stands in the table is not run again.
"""

import argparse
import time
from pathlib import Path

from machine import RESULTS, append, done, machine, shared

import prunekit as pk
from prunekit.pruning.plan_options import default_units
from prunekit.search import solve_in_steps

TEXTS = {"wikitext2": "wikitext2/test.txt", "ptb": "ptb/ptb.test.txt"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--windows", type=int, default=4, help="on which damages are measured")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.2, 0.45, 0.8])
    parser.add_argument("--characters", type=int, default=13_000)
    parser.add_argument("--out", type=Path, default=RESULTS / "solved_smollm2.csv")
    args = parser.parse_args()
    told, there = machine(), done(args.out, "way", "ratio", "steps", "windows", "shares")
    model, tokenizer = pk.load(args.model)
    groups = pk.discover(model)
    calib = pk.calibration_set(shared("data/calibration/c4_demo.jsonl"), tokenizer, n_samples=64, seq_len=128, seed=0)
    scores = pk.score(model, default_units(groups), pk.Curvature(), calib)
    texts = {name: shared(f"data/{path}").read_text()[: args.characters] for name, path in TEXTS.items()}
    shares = " ".join(map(str, args.shares))
    for way in ("default", "solved"):
        options = {"n_steps": args.steps, "shares": tuple(args.shares)}
        if (way, str(args.ratio), str(args.steps), str(args.windows), shares) in there:
            continue
        began = time.perf_counter()
        if way == "default":
            plan = pk.plan(groups, scores, args.ratio)
        else:
            plan = solve_in_steps(model, groups, scores, args.ratio, calib[: args.windows], **options)
        seconds = round(time.perf_counter() - began, 1)
        row = {"way": way, "ratio": args.ratio, "steps": args.steps, "windows": args.windows, "shares": shares}
        row |= {"seconds": seconds, "expected_rise": plan.notes.get("expected_rise"), "characters": args.characters}
        for fit in (False, True):
            small = pk.prune(model, plan, compensate=calib if fit else None, measure=False)
            found = {name: round(pk.perplexity(small, tokenizer, text), 2) for name, text in texts.items()}
            append({**told, **row, "fit": fit, **found}, args.out)


if __name__ == "__main__":
    main()
