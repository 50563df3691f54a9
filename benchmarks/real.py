"""What is left of a real model at equal size: ways to prune it, ratios and calibration seeds; nothing is trained.

Every row is a real cut to one fraction of all parameters. Rows are appended as they are measured, each with its commit:
a run that was stopped goes on where it was. Perplexity is that of the first characters of each text, in windows of 128,
BOS first in each where the tokenizer adds it; on C4, of 16 windows that share nothing with those of seeds 0 to 2 (older
rows have none). `--tasks 100` asks the papers' seven tasks too, 100 questions each, which takes some minutes a row
(give another file then: `--out`). The peer optipfair (FFN channels of all layers, equal parameters) runs where it is
installed.
"""

import argparse
import copy
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, SEVEN, apart, append, done, machine, shared

import prunekit as pk
from prunekit.account import loss_on
from prunekit.pruning.plan_options import default_units
from prunekit.recipes.llm_pruner import spared_layers

TEXTS = {
    "wikitext2": "wikitext2/test.txt",
    "ptb": "ptb/ptb.test.txt",
    "wikipedia": "calibration/wiki_demo.txt",
    "stories": "tinystories/sample_niklas6.txt",
}
CALIBRATION = "calibration/c4_demo.jsonl"


class Bench:
    """A dense model, and what several ways share: groups, calibration sets and scores."""

    def __init__(self, name: str, characters: int | None, n_samples: int, texts: list[str], n_asked: int) -> None:
        self.model, self.tokenizer = pk.load(name)
        self.groups = pk.discover(self.model)
        self.units = default_units(self.groups)
        self.texts = {key: shared(f"data/{TEXTS[key]}").read_text()[:characters] for key in texts}
        self.n_samples, self.n_asked = n_samples, n_asked
        self.scores = cache(self._scores)
        self.held = apart(self.calibration(99), map(self.calibration, range(3)))[:16]

    def calibration(self, seed: int, **options: Any) -> torch.Tensor:
        windows = {"n_samples": self.n_samples, "seq_len": 128, "seed": seed, **options}
        return pk.calibration_set(shared(f"data/{CALIBRATION}"), self.tokenizer, **windows)

    def _scores(self, importance: Any, seed: int) -> pk.importance.Scores:
        return pk.score(self.model, self.units, importance, self.calibration(seed))

    def measured(self, model: Any) -> dict[str, float]:
        found = {name: round(pk.perplexity(model, self.tokenizer, text), 2) for name, text in self.texts.items()}
        found["c4"] = round(float(torch.tensor(loss_on(model, self.held)).exp()), 2)
        if self.n_asked:
            asked = pk.zero_shot(model, self.tokenizer, SEVEN, limit=self.n_asked, data_dir=shared("data/zeroshot"))
            found["tasks"] = round(asked.mean, 4)
        return found

    def ends(self) -> list[int]:
        """The layers that LLM-Pruner leaves whole."""
        return spared_layers(self.groups, None)


Way = Callable[[Bench, float, int], Any]


def cut(importance: Any, fit: bool = False, **options: Any) -> Way:
    def way(bench: Bench, ratio: float, seed: int) -> Any:
        chosen = {key: value(bench) if callable(value) else value for key, value in options.items()}
        made = pk.plan(bench.groups, bench.scores(importance, seed), ratio, **chosen)
        return pk.prune(bench.model, made, compensate=bench.calibration(seed) if fit else None, measure=False)

    return way


def optipfair(bench: Bench, ratio: float, seed: int, *, driven: bool) -> Any:
    """The peer's cut of FFN channels, with as many parameters gone."""
    from optipfair import prune_model

    channels = sum(
        torch.Size(bench.groups.shapes[m.parameter]).numel()
        for group in bench.groups.of_kind("ffn_channel")
        for m in group.members
    )
    share = 100 * ratio * bench.groups.n_parameters / channels
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in bench.calibration(seed)]
    options = {"dataloader": rows} if driven else {}
    return prune_model(copy.deepcopy(bench.model), pruning_percentage=share, show_progress=False, **options)


WAYS: dict[str, Way] = {
    "default (curvature, re-fit)": cut(pk.Curvature(), fit=True),
    "curvature": cut(pk.Curvature()),
    "LLM-Pruner (taylor, ends spared)": cut(pk.Taylor(), protect_layers=Bench.ends),
    "taylor": cut(pk.Taylor()),
    "taylor, re-fit": cut(pk.Taylor(), fit=True),
    "activation": cut(pk.Activation()),
    "fluctuation": cut(pk.Fluctuation()),
    "l2": cut(pk.Magnitude(p=2)),
    "random": cut(pk.Random()),
    "optipfair, data-driven": lambda bench, ratio, seed: optipfair(bench, ratio, seed, driven=True),
    "optipfair": lambda bench, ratio, seed: optipfair(bench, ratio, seed, driven=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, default=RESULTS / "real_smollm2.csv")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.1, 0.3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--texts", nargs="+", default=list(TEXTS))
    parser.add_argument("--characters", type=int, default=13_000, help="of each text; 0: all of it")
    parser.add_argument("--n-samples", type=int, default=64)
    parser.add_argument("--tasks", type=int, default=0, help="questions of each of the seven tasks; 0: none")
    args = parser.parse_args()
    told, bench = machine(), Bench(args.model, args.characters or None, args.n_samples, args.texts, args.tasks)
    there = done(args.out, "way", "ratio", "seed", "characters")
    wanted = [("dense", 0.0, 0)]
    wanted += [(way, ratio, seed) for seed in args.seeds for ratio in args.ratios for way in args.ways]
    for way, ratio, seed in wanted:
        if (way, str(ratio), str(seed), str(args.characters)) in there:
            continue
        began = time.perf_counter()
        try:
            small = bench.model if way == "dense" else WAYS[way](bench, ratio, seed)
        except ImportError as error:
            print(f"{way}: left out ({error})")
            continue
        seconds = time.perf_counter() - began
        kept = sum(p.numel() for p in small.parameters()) / bench.groups.n_parameters
        row = {**told, "way": way, "ratio": ratio, "seed": seed, "kept": round(kept, 4), "seconds": round(seconds, 1)}
        append({**row, "characters": args.characters, **bench.measured(small)}, args.out)


if __name__ == "__main__":
    main()
