"""Depth on the embedded world's model: gaps and their corrections, blocks alone, depth with width, hidden states.

    python benchmarks/depth_world.py --parts gaps

`gaps`: 1 to 4 of 8 layers by block influence, or as many attention and as many FFN blocks, chosen together or one kind
alone; as cut, with a map, and with a factor (`prune(gaps=)`). `budgets`: parameters under one budget, solved over
heads and channels, over whole layers, and over all of them, from damages measured once and in two rounds.
`hidden`: half of the model cut, in width or in depth, then distilled in full on 256 windows of 64 tokens, with shares
of the difference of hidden states. Loss and divergence from the dense model: on
windows that nothing has read. Rows are appended as they are measured: what stands in the table is not run again.
"""

import argparse
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, append, done, machine

import prunekit as pk
from prunekit.account import loss_on
from prunekit.search import measure_damages, solve_budgets, solve_in_steps

GONE, SHARES, SEEDS = (1, 2, 3, 4), (0.3, 0.45, 0.6), (0,)
HIDDEN = (0.0, 0.3, 0.7)
Case = tuple[str, str, Any, Any]  # part, way, size, () -> the model


class Bench:
    def __init__(self) -> None:
        self.model, self.tokenizer = pk.load("world")
        self.groups = pk.discover(self.model)
        windows = {"seq_len": 128, "tokenizer": self.tokenizer}
        self.calib = pk.calibration_set("world", n_samples=32, seed=0, **windows)
        self.held = pk.calibration_set("world", n_samples=64, seed=5, held_out=True, **windows)
        self.data = pk.calibration_set("world", self.tokenizer, n_samples=256, seq_len=64, seed=1)
        self.units = self.groups.of_kind("kv_head", "ffn_channel")
        self.layers = self.groups.of_kind("layer")

    def scored(self, groups: Any, importance: Any) -> Any:
        return pk.score(self.model, groups, importance, self.calib)

    def shorter(self, n: int) -> pk.PruningPlan:
        scores = self.scored(self.layers, pk.BlockInfluence())
        return pk.plan(self.groups, scores, n / len(self.layers), of="units", kinds=("layer",))

    def without_blocks(self, n: int, *paths: str) -> pk.PruningPlan:
        """Without 2n blocks of all, or n of the kind whose path ends in a name."""
        others = [
            g.name for g in self.groups.of_kind("block") if not g.name.endswith(tuple(f"{p}:block" for p in paths))
        ]
        groups = self.groups.without(others)
        blocks = groups.of_kind("block")
        share = n * len(paths) / len(blocks)
        return pk.plan(groups, self.scored(blocks, pk.BlockInfluence()), share, of="units", kinds=("block",))

    def gaps(self) -> Iterator[Case]:
        cut = partial(pk.prune, self.model, measure=False)
        for n in GONE:
            yield "gaps", "layers", n, lambda n=n: cut(self.shorter(n))
            for how in ("map", "magnitude"):
                yield (
                    "gaps",
                    f"layers, {how}",
                    n,
                    lambda n=n, how=how: cut(self.shorter(n), compensate=self.calib, gaps=how),
                )
            for way in (("self_attn", "mlp"), ("self_attn",), ("mlp",)):
                yield "gaps", f"blocks: {' and '.join(way)}", n, lambda n=n, way=way: cut(self.without_blocks(n, *way))

    def budgets(self) -> Iterator[Case]:
        units, layers = self.scored(self.units, pk.Curvature()), self.scored(self.layers, pk.BlockInfluence())
        for way, scores in {"width": {**units}, "depth": {**layers}, "both": {**units, **layers}}.items():
            damages = measure_damages(self.model, self.groups, scores, self.calib[:8])
            for share in SHARES:
                yield (
                    "budgets",
                    way,
                    share,
                    lambda s=scores, d=damages, share=share: pk.prune(
                        self.model, solve_budgets(self.groups, s, share, damages=d), measure=False
                    ),
                )
                yield (
                    "budgets",
                    f"{way}, in steps",
                    share,
                    lambda s=scores, share=share: pk.prune(
                        self.model,
                        solve_in_steps(self.model, self.groups, s, share, self.calib[:8], n_steps=2),
                        measure=False,
                    ),
                )

    def hidden(self) -> Iterator[Case]:
        wide = pk.plan(self.groups, self.scored(self.units, pk.Curvature()), 0.5)
        for name, plan in {"width": wide, "depth": self.shorter(4)}.items():
            small = pk.prune(self.model, plan, measure=False)
            yield "hidden", f"{name}, untrained", 0, lambda small=small: small
            for share in HIDDEN:
                for seed in SEEDS:
                    yield "hidden", f"{name}, share {share}", seed, partial(self.distilled, small, plan, share, seed)

    def distilled(self, small: Any, plan: pk.PruningPlan, share: float, seed: int) -> Any:
        how = pk.FullTuning(learning_rate=1e-3, epochs=1, seed=seed)
        options = {"hidden_share": share, "plan": plan} if share else {}
        return pk.recover(small, pk.Distillation(self.model, how, **options), self.data, measure=False)

    @torch.no_grad()
    def divergence(self, model: Any) -> float:
        """KL(dense ‖ model), nats per token."""
        p, q = (m(input_ids=self.held).logits[:, :-1].log_softmax(-1) for m in (self.model, model))
        return float((p.exp() * (p - q)).sum(-1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=("gaps", "budgets", "hidden"), default=["gaps", "budgets", "hidden"]
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "depth_world.csv")
    args = parser.parse_args()
    told, bench, there = machine(), Bench(), done(args.out, "part", "way", "size")
    for part in args.parts:
        for name, way, size, make in getattr(bench, part)():
            if (name, way, str(size)) in there:
                continue
            began = time.perf_counter()
            small = make()
            row = {"part": name, "way": way, "size": size, "seconds": round(time.perf_counter() - began, 1)}
            row |= {"kept": round(sum(p.numel() for p in small.parameters()) / bench.groups.n_parameters, 4)}
            row |= {
                "dense_loss": round(loss_on(bench.model, bench.held), 4),
                "loss": round(loss_on(small, bench.held), 4),
            }
            append({**told, **row, "divergence": round(bench.divergence(small), 4)}, args.out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
