"""LoRAShear against LLM-Pruner with LoRA, at equal parameters and equal training tokens, over seeds.

Every row is a real cut, trained for the same number of steps on as many tokens:

* `LLM-Pruner + LoRA`: one cut by Taylor (Element¹), the first and last layers spared as in the paper, then LoRA.
* `LLM-Pruner + LoRA, all layers`: the same without sparing.
* `LHSPG`: units shrink to zero during the first part of the steps, the rest is plain LoRA; no layer is protected and
  text is drawn as it comes.
* `LHSPG's units at once + LoRA`: the units that LHSPG chose, cut before all steps of LoRA; the control of leaving
  slowly.
* `LoRAShear, uniform`: distribution, protection and LHSPG, then sources drawn alike; the control.
* `LoRAShear`: the same, sources drawn by what was lost.
* `…, proxies`: units chosen by the authors' released proxies in place of Taylor.

Rows are appended as they are measured, so a run that was stopped goes on. `--report` prints what there is.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pandas as pd
import torch
from machine import RESULTS, SEVEN, append, machine, shared

import prunekit as pk
from prunekit import world
from prunekit.questions import Task
from prunekit.recipes import lorashear
from prunekit.recipes.one_shot import spared_layers
from prunekit.recovery.lhspg import importance_saliency
from prunekit.recovery.mixture import Mixture
from prunekit.recovery.progressive import Progressed, prune_progressively
from prunekit.world.corpus import ASKING, KINDS

SEEDS, RATIOS = (0, 1, 2), (0.2, 0.5)
TRAINING = pk.LoRA(max_steps=400, batch_size=8, learning_rate=1e-3)
SHARES = (0.6, 0.3, 0.1)
UNIFORM = Mixture(uniform_share=1.0)


@dataclass(frozen=True)
class Subject:
    """A model, its training text as it comes and by source, and what it is measured on."""

    model: Any
    tokenizer: Any
    text: Callable[[int], Any]
    sources: Callable[[int], dict[str, Any]]
    instructions: Callable[[int], dict[str, Any]]
    held_out: str
    tasks: list[Task]


@cache
def the_world() -> Subject:
    model, tokenizer = pk.load("world")
    kinds = [kind for kind, (_, _, weight, _) in KINDS.items() if weight]
    return Subject(
        model,
        tokenizer,
        lambda seed: world.documents(10_000, seed=seed + 1),
        lambda seed: {kind: world.documents(1_000, seed=seed + 1, kinds=[kind]) for kind in kinds},
        lambda seed: {kind: world.instructions(1_000, seed=seed + 1, kinds=[kind]) for kind in ASKING},
        world.validation_text(),
        list(world.tasks().values()),
    )


@cache
def stories() -> Subject:
    model, tokenizer = pk.load(shared("models/stories260K"))
    told = shared("data/tinystories/sample_niklas6.txt").read_text()
    at = len(told) * 4 // 5
    sources = {"first half": told[: at // 2], "second half": told[at // 2 : at]}  # all that it was trained on
    return Subject(model, tokenizer, lambda _: told[:at], lambda _: sources, lambda _: sources, told[at:], [])


SUBJECTS = {"world": the_world, "stories260K": stories}


def llm_pruner(subject: Subject, ratio: float, seed: int, *, spare: bool) -> Any:
    groups = pk.discover(subject.model)
    calib = calibration(subject, seed)
    scores = pk.score(subject.model, groups.of_kind("kv_head", "ffn_channel"), pk.Taylor(), calib)
    spared = spared_layers(groups, None) if spare else []
    small = pk.prune(subject.model, pk.plan(groups, scores, ratio, protect_layers=spared))
    return pk.recover(
        small, replace(TRAINING, seed=seed), subject.text(seed), tokenizer=subject.tokenizer, inplace=True
    )


def progressed(subject: Subject, ratio: float, seed: int, *, proxies: bool = False) -> Progressed:
    first = replace(TRAINING, seed=seed, max_steps=round(SHARES[0] * TRAINING.max_steps))
    options = {} if proxies else {"saliency": importance_saliency(pk.Taylor(), calibration(subject, seed))}
    return prune_progressively(subject.model, ratio, subject.text(seed), first, tokenizer=subject.tokenizer, **options)


def lhspg(subject: Subject, ratio: float, seed: int, *, proxies: bool = False) -> Any:
    done = progressed(subject, ratio, seed, proxies=proxies)
    last = replace(TRAINING, seed=seed, max_steps=TRAINING.max_steps - len(done.log.losses))
    small = pk.prune(done.model, done.plan)
    return pk.recover(small, last, subject.text(seed + 100), tokenizer=subject.tokenizer, inplace=True)


def same_units(subject: Subject, ratio: float, seed: int) -> Any:
    small = pk.prune(subject.model, progressed(subject, ratio, seed).plan)
    return pk.recover(
        small, replace(TRAINING, seed=seed), subject.text(seed), tokenizer=subject.tokenizer, inplace=True
    )


def shear(subject: Subject, ratio: float, seed: int, *, mixture: Mixture, proxies: bool = False) -> Any:
    done = lorashear(
        subject.model,
        subject.tokenizer,
        subject.sources(seed),
        ratio,
        instructions=subject.instructions(seed),
        method=replace(TRAINING, seed=seed),
        mixture=replace(mixture, seed=seed),
        importance=None if proxies else pk.Taylor(),
        shares=SHARES,
    )
    print(
        done.knowledge.unprunable(0.1), done.progress.before_the_end().to_string(), done.mixture, sep="\n", flush=True
    )
    return done.model


METHODS: dict[str, Callable[[Subject, float, int], Any]] = {
    "LLM-Pruner + LoRA": lambda *given: llm_pruner(*given, spare=True),
    "LLM-Pruner + LoRA, all layers": lambda *given: llm_pruner(*given, spare=False),
    "LHSPG": lhspg,
    "LHSPG's units at once + LoRA": same_units,
    "LoRAShear": lambda *given: shear(*given, mixture=Mixture()),
    "LoRAShear, uniform": lambda *given: shear(*given, mixture=UNIFORM),
    "LHSPG, proxies": lambda *given: lhspg(*given, proxies=True),
    "LoRAShear, proxies": lambda *given: shear(*given, mixture=Mixture(), proxies=True),
}


def calibration(subject: Subject, seed: int) -> torch.Tensor:
    return pk.calibration_set(subject.text(seed), subject.tokenizer, n_samples=32, seq_len=128, seed=seed)


def measured(subject: Subject, model: Any) -> dict[str, Any]:
    """Perplexity, every task, the mean of the papers' seven, and facts by tier and hops."""
    metrics = ["perplexity", "zero_shot"] if subject.tasks else ["perplexity"]
    report = pk.evaluate(model, subject.tokenizer, metrics, text=subject.held_out, tasks=subject.tasks or None)
    found = {"parameters": sum(p.numel() for p in model.parameters()), "perplexity": round(report["perplexity"], 4)}
    if report.zero_shot is not None:
        tasks = {str(name): round(float(value), 4) for name, value in report.zero_shot.accuracy().items()}
        found |= {"seven": round(sum(tasks[name] for name in SEVEN) / 7, 4), "mean": round(report.zero_shot.mean, 4)}
        found |= tasks
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    path = RESULTS / f"lorashear_{args.subject}.csv"
    if not args.report:
        torch.set_num_threads(1)
        for method in ["dense", *args.methods]:
            for ratio in args.ratios if method != "dense" else [0.0]:
                for seed in args.seeds if method != "dense" else [0]:
                    add(path, args.subject, method, ratio, seed)
    report(path)


def add(path: Any, name: str, method: str, ratio: float, seed: int) -> None:
    """One row, unless it is there."""
    done = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["method", "ratio", "seed"])
    if ((done["method"] == method) & (done["ratio"] == ratio) & (done["seed"] == seed)).any():
        return
    subject, start = SUBJECTS[name](), time.perf_counter()
    model = subject.model if method == "dense" else METHODS[method](subject, ratio, seed)
    told = {"commit": machine()["commit"], "method": method, "ratio": ratio, "seed": seed}
    row = told | measured(subject, model) | {"seconds": round(time.perf_counter() - start)}
    append(row, path)


def report(path: Any) -> None:
    """Mean and range over seeds."""
    table = pd.read_csv(path)
    figures = [column for column in ("perplexity", "seven", "mean", "facts_rare", "arc_easy") if column in table]
    print(table.groupby(["ratio", "method"], sort=False)[figures].agg(["mean", "min", "max"]).round(3).to_string())


if __name__ == "__main__":
    main()
