"""Whole layers out of a real model: one choice or one at a time, with and without a correction of each gap.

Layers go by block influence on C4, the lowest first: all by one measurement, or each by the influence measured without
those before. Then the cut model as it is, and with what the gaps added made up for on the same text
(`prune(compensate=, gaps=)`): by a linear map into the layer in front, or by one factor a gap. `blocks` takes as many
attention and as many FFN blocks in place of layers, each kind by its own influence;
beside them, a cut of heads and channels with as many parameters gone: the default, re-fitted. Perplexity is that of
the first characters of WikiText-2 and PTB, in windows of 128; the time is one forward pass of 512 tokens. Rows are
appended as they are measured: what stands in the table is not run again.
"""

import argparse
import time
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import RESULTS, append, done, machine, shared

import prunekit as pk
from prunekit.pruning.plan_options import default_units
from prunekit.pruning.planning import plan_without

TEXTS = {"wikitext2": "wikitext2/test.txt", "ptb": "ptb/ptb.test.txt"}
UNITS = {"of": "units", "kinds": ("layer",)}


class Bench:
    """A dense model with its groups, calibration set and scores."""

    def __init__(self, name: str, n_samples: int) -> None:
        self.model, self.tokenizer = pk.load(name)
        self.groups, self.influence = pk.discover(self.model), pk.BlockInfluence()
        windows = {"n_samples": n_samples, "seq_len": 128, "seed": 0}
        self.calib = pk.calibration_set(shared("data/calibration/c4_demo.jsonl"), self.tokenizer, **windows)
        self.layers, self.scores = self.groups.of_kind("layer"), cache(self._scores)

    def once(self, n: int) -> pk.PruningPlan:
        scores = pk.score(self.model, self.layers, self.influence, self.calib)
        return pk.plan(self.groups, scores, n / len(self.layers), **UNITS)

    def one_at_a_time(self, n: int) -> pk.PruningPlan:
        return pk.plan_in_steps(self.model, self.influence, n / len(self.layers), self.calib, n_steps=n, **UNITS)

    def blocks(self, n: int) -> pk.PruningPlan:
        every = pk.score(self.model, self.groups.of_kind("block"), self.influence, self.calib)
        gone = {}
        for end in (".self_attn:block", ".mlp:block"):
            names = sorted((name for name in every if name.endswith(end)), key=lambda name: float(every[name]))
            gone |= dict.fromkeys(names[:n], (0,))
        return plan_without(self.groups, gone, {})

    def width(self, n: int) -> pk.PruningPlan:
        return pk.plan(self.groups, self.scores(), round(self.once(n).pruning_ratio, 4))

    def _scores(self) -> pk.importance.Scores:
        return pk.score(self.model, default_units(self.groups), pk.Curvature(), self.calib)


WAYS = {  # way → how layers are chosen, and how what went is made up for
    "once": (Bench.once, None),
    "once, map": (Bench.once, "map"),
    "once, magnitude": (Bench.once, "magnitude"),
    "one at a time": (Bench.one_at_a_time, None),
    "one at a time, map": (Bench.one_at_a_time, "map"),
    "blocks": (Bench.blocks, None),
    "width (default)": (Bench.width, "refit"),
}


def forward_ms(model: Any) -> float:
    tokens, times = torch.zeros(1, 512, dtype=torch.long), []
    with torch.inference_mode():
        for _ in range(6):
            began = time.perf_counter()
            model(input_ids=tokens, use_cache=False)
            times.append(time.perf_counter() - began)
    return round(1000 * median(times[1:]), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--n-samples", type=int, default=64)
    parser.add_argument("--characters", type=int, default=13_000)
    parser.add_argument("--out", type=Path, default=RESULTS / "depth_smollm2.csv")
    args = parser.parse_args()
    told, bench, there = machine(), Bench(args.model, args.n_samples), done(args.out, "way", "layers")
    texts = {name: shared(f"data/{path}").read_text()[: args.characters] for name, path in TEXTS.items()}
    for way, n in [("dense", 0)] + [(way, n) for n in args.layers for way in args.ways]:
        if (way, str(n)) in there:
            continue
        began, small, gone = time.perf_counter(), bench.model, []
        if way != "dense":
            choose, gaps = WAYS[way]
            plan = choose(bench, n)
            fitted: dict[str, Any] = {} if gaps is None else {"compensate": bench.calib}
            fitted |= {"gaps": gaps} if gaps in ("map", "magnitude") else {}
            small = pk.prune(bench.model, plan, measure=False, **fitted)
            gone = [bench.groups[name].layer for name, units in plan.keep.items() if not units]  # of blocks, twice
        row = {"way": way, "layers": n, "gone": " ".join(map(str, gone)), "n_samples": args.n_samples}
        row |= {"kept": round(sum(p.numel() for p in small.parameters()) / bench.groups.n_parameters, 4)}
        row |= {"seconds": round(time.perf_counter() - began, 1), "forward_ms": forward_ms(small)}
        row |= {"characters": args.characters}
        row |= {name: round(pk.perplexity(small, bench.tokenizer, text), 2) for name, text in texts.items()}
        append({**told, **row}, args.out)


if __name__ == "__main__":
    main()
