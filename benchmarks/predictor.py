"""Architectures found by a predictor beside rules and random search, at equal parameters, on the embedded world.

    python benchmarks/predictor.py            every ratio and seed, goes on where it was
    python benchmarks/predictor.py speed      300 pairs on two workers, and the speed-up over one

Random search measures as many architectures as the predictor does in all; the first of both are the same. All choose
by the perplexity of one text and are judged on another, `validation_text()`, of the same kind of documents. The
predictor from known points begins with even shares and global selection among its drawn ones; it is run for one seed.
"""

import argparse
import csv
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from machine import HERE, RESULTS, SEVEN, append, machine
from torch import nn

import prunekit as pk
from prunekit.evaluation import zero_shot
from prunekit.importance.scoring import importance_from_name
from prunekit.pruning import PruningPlan
from prunekit.recipes.in_rounds import IMPORTANCES
from prunekit.recipes.one_shot import spared_layers
from prunekit.search import Pairs, agreement, cross_validate, known_points, learning_curve
from prunekit.world import documents, tasks, validation_text

RATIOS, SEEDS = (0.2, 0.35, 0.5), (0, 1, 2)
N_PAIRS, N_ROUNDS, TOP_K = 140, 4, 40
N_CEILING = 100  # of them, measured on another text as well
N = N_PAIRS + N_ROUNDS * TOP_K  # measured by the predictor in all, and by random search
SIZES = [25, 50, 100, 150, 200, 240]
SPACES = HERE.parent / "build" / "predictor"
TABLE, CURVES, SPEED = (RESULTS / f"predictor_{name}.csv" for name in ("world", "curves", "speed"))
METHODS = ("uniform", "LLM-Pruner's layers", "global Taylor", "random search", "predictor", "predictor from known")


def search_text(seed: int) -> str:
    """What architectures are chosen by: documents that neither training nor the judgement has."""
    return "\n".join(documents(160, split="validation", seed=1000 + seed))


class Cell:
    """One ratio and seed: the space, and what each method finds in it."""

    def __init__(self, model: nn.Module, tokenizer: Any, ratio: float, seed: int, n_jobs: int) -> None:
        self.model, self.tokenizer, self.ratio, self.seed, self.n_jobs = model, tokenizer, ratio, seed, n_jobs
        self.groups = pk.discover(model)
        calib = pk.calibration_set("world", tokenizer, n_samples=32, seq_len=128, seed=seed)
        units = self.groups.of_kind("kv_head", "ffn_channel")
        self.scores = {name: pk.score(model, units, importance_from_name(name), calib) for name in IMPORTANCES}
        self.space = pk.PlanSpace(self.groups, self.scores, ratio)
        self.folder = SPACES / f"{ratio}_{seed}"

    def plan(self, method: str) -> tuple[PruningPlan, int]:
        """The plan of a method, and how many architectures it measured for it."""
        taylor = self.scores["taylor"]
        if method == "uniform":
            return pk.plan(self.groups, taylor, self.ratio), 0
        if method == "LLM-Pruner's layers":
            return pk.plan(self.groups, taylor, self.ratio, protect_layers=spared_layers(self.groups, None)), 0
        if method == "global Taylor":
            return pk.plan(self.groups, taylor, self.ratio, ranking="global"), 0
        if method == "random search":
            self.searched(known=False)  # whose first architectures it shares
        pairs = self.random(N) if method == "random search" else self.searched(known=method.endswith("known"))
        return self.space.plan(pairs.best()), len(pairs)

    def random(self, n: int, folder: str = "random") -> Pairs:
        """So many drawn architectures, measured; those of a smaller number are among them."""
        return pk.measure_pairs(
            self.space, self.model, self.tokenizer, n, folder=self.folder / folder, **self.options()
        )

    def searched(self, known: bool) -> Pairs:
        """What the predictor proposed; without known points it begins with what random search has measured."""
        folder = self.folder / ("known" if known else "predictor")
        if not known and not folder.exists():
            self.random(N_PAIRS, "first")
            for name in ("random", "predictor"):
                shutil.copytree(self.folder / "first", self.folder / name, dirs_exist_ok=True)
        options = {"n_pairs": N_PAIRS, "n_rounds": N_ROUNDS, "top_k": TOP_K, **self.options()}
        start = known_points(self.space) if known else ()
        return pk.search_space(self.space, self.model, self.tokenizer, start=start, folder=folder, **options).pairs

    def options(self) -> dict[str, Any]:
        return {"text": search_text(self.seed), "seed": self.seed, "n_jobs": self.n_jobs}


def judged(model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """Perplexity on the held-out text, and accuracy of the papers' seven tasks and of all, every fourth question."""
    few = [replace(task, questions=task.questions[::4]) for task in tasks().values()]
    found = zero_shot(model, tokenizer, few, batch_size=64)
    accuracy = found.accuracy()
    seven = sum(accuracy[name] for name in SEVEN) / len(SEVEN)
    return {"perplexity": pk.perplexity(model, tokenizer, validation_text()), "seven": seven, "mean": found.mean}


def measure(ratios: list[float], seeds: list[int], n_jobs: int) -> None:
    """Every cell that is not in the table yet."""
    model, tokenizer = pk.load("world")
    done = {(row["method"], float(row["ratio"]), int(row["seed"])) for row in rows(TABLE)}
    if ("dense", 0.0, 0) not in done:
        add(model, tokenizer, {"method": "dense", "ratio": 0.0, "seed": 0}, 0, 0.0)
    for seed in seeds:
        for ratio in ratios:
            wanted = METHODS if seed == SEEDS[0] else METHODS[:-1]
            missing = [method for method in wanted if (method, ratio, seed) not in done]
            cell = Cell(model, tokenizer, ratio, seed, n_jobs) if missing else None
            for method in missing:
                start = time.perf_counter()
                plan, n_measured = cell.plan(method)
                seconds = time.perf_counter() - start
                plan.save(cell.folder / f"{method}.json") if cell.folder.exists() else None
                told = {"method": method, "ratio": ratio, "seed": seed}
                add(pk.prune(model, plan), tokenizer, told, n_measured, seconds)
            if cell:
                curves(cell)


def add(model: Any, tokenizer: Any, told: dict[str, Any], n_measured: int, seconds: float) -> None:
    """A row of the table."""
    counts = {"parameters": model.num_parameters(), "n_measured": n_measured}
    append({**machine(), **told, **counts, **judged(model, tokenizer), "seconds": round(seconds, 1)}, TABLE)


def curves(cell: Cell) -> None:
    """What the predictor is worth on pairs that it has not seen, by how many it learned from, beside the ceiling.

    The ceiling: how well perplexities on one sample of text foretell those on another, of the same architectures.
    """
    pairs = cell.random(N)
    other = pk.measure_pairs(
        cell.space, cell.model, cell.tokenizer, N_CEILING, text=search_text(100 + cell.seed), seed=cell.seed,
        folder=cell.folder / "other", n_jobs=cell.n_jobs,
    )  # fmt: skip
    assert other.points == pairs.points[:N_CEILING]
    crossed = cross_validate(pairs)
    told = {**machine(), "ratio": cell.ratio, "seed": cell.seed}
    for name, found in (
        ("another text", agreement(other.values, pairs.values[:N_CEILING])),
        ("cross-validated", agreement(crossed["expected"], crossed["measured"])),
    ):
        append({**told, "what": name, "n_pairs": int(found["n"]), **found.drop("n").round(5).to_dict()}, CURVES)
    curve = learning_curve(pairs, SIZES).drop(columns="repeat").groupby("n_pairs").mean()
    for size, found in curve.iterrows():
        append({**told, "what": "learning curve", "n_pairs": size, **found.round(5).to_dict()}, CURVES)


def speed() -> None:
    """300 pairs on two workers, and what two are worth beside one, worker start included."""
    model, tokenizer = pk.load("world")
    cell = Cell(model, tokenizer, 0.35, 0, 1)
    for n, n_jobs in ((100, 1), (100, 2), (300, 1), (300, 2)):
        start = time.perf_counter()
        pk.measure_pairs(cell.space, model, tokenizer, n, text=search_text(0), n_jobs=n_jobs)
        append(
            {**machine(), "n_pairs": n, "n_workers": n_jobs, "seconds": round(time.perf_counter() - start, 1)}, SPEED
        )
    table = pd.read_csv(SPEED).tail(4).set_index(["n_pairs", "n_workers"])["seconds"]
    for n in (100, 300):
        print(f"{n} pairs: two workers are {table[n, 1] / table[n, 2]:.2f} times as fast as one")


def rows(path: Path) -> Iterator[dict[str, str]]:
    """Of a table, if it is there."""
    if path.exists():
        with path.open(newline="") as file:
            yield from csv.DictReader(file)


def main() -> None:
    """Measures what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("quality", "speed"), default="quality")
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    machine("optuna", "lightgbm")
    if given.what == "speed":
        speed()
    else:
        measure(given.ratios, given.seeds, given.jobs)


if __name__ == "__main__":
    main()
