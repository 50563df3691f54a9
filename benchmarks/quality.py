"""What is left of a model at equal size: perplexity and zero-shot accuracy of many ways to prune it, over seeds.

Every row is a real cut: scored and re-fitted on one calibration set, drawn by the seed, to one fraction of the model's
parameters, before and (with the first seed) after the same recovery. Rows are appended as they are measured, each with
its commit, so a run that was stopped goes on where it was. `--report` only draws what there is and prints medians.

`--methods dense default --table default` measures the package's default, and the dense model after the same recovery as
its control. They have a table of their own: the others were measured when BOS stood before a text alone, and not in
each window, so that perplexities of the two tables do not compare.

The embedded world is measured on its validation text and tasks, stories260K on the last fifth of a sample of
TinyStories and on PIQA and ARC-easy, where a model of that size is at chance.
"""

import argparse
import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
from machine import RESULTS, machine, shared

import prunekit as pk
from prunekit import world
from prunekit.plotting import plot_tradeoff
from prunekit.questions import Question, Task

RATIOS = (0.2, 0.5, 0.1, 0.3, 0.4, 0.6)  # in the order of interest
SEEDS = (0, 1, 2)
N_SAMPLES, SEQ_LEN = 32, 128
N_QUESTIONS = 60  # a task
RECOVERY = pk.LoRA(max_steps=60)


class Method(NamedTuple):
    """A way to prune: what is scored, how units compete, and what is re-fitted."""

    importance: Any
    ranking: str | None = "local"  # None: as the scores say
    normalize: str | None = None
    fit: str | None = None


def methods(seed: int) -> dict[str, Method]:
    return {
        "random": Method(pk.Random(seed=seed)),
        "L2": Method(pk.Magnitude(p=2)),
        "vector": Method(pk.Taylor("vector")),
        "element": Method(pk.Taylor("element")),
        "HyWIA attention": Method(pk.HyWIA("attention")),
        "HyWIA uncertainty": Method(pk.HyWIA("uncertainty")),
        "FLAP-style": Method(pk.Fluctuation(), fit="bias"),
        "element, re-fit": Method(pk.Taylor("element"), fit="weights"),
        "reconstruction, re-fit": Method(pk.Reconstruction(), fit="weights"),
        "reconstruction, re-fit, global": Method(pk.Reconstruction(), "global", "loss", "weights"),
        "default": Method(pk.Curvature(), None, fit="weights"),
    }


@dataclass(frozen=True)
class Subject:
    """A model, what it is calibrated, recovered and measured on."""

    model: Any
    tokenizer: Any
    training: Any
    text: str
    tasks: list[Task]


def the_world() -> Subject:
    model, tokenizer = pk.load("world")
    return Subject(model, tokenizer, "world", world.validation_text(), [some(task) for task in world.tasks().values()])


def stories() -> Subject:
    model, tokenizer = pk.load(shared("models/stories260K"))
    text = shared("data/tinystories/sample_niklas6.txt").read_text()
    at = len(text) * 4 // 5
    tasks = [some(piqa()), some(arc_easy())]
    return Subject(model, tokenizer, text[:at], text[at:], tasks)


def some(task: Task) -> Task:
    return replace(task, questions=task.questions[:N_QUESTIONS])


def rows_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in shared(path).read_text().splitlines()]


def piqa() -> Task:
    questions = [
        Question(f"Question: {row['goal']}\nAnswer:", (f" {row['sol1']}", f" {row['sol2']}"), row["label"], "physical")
        for row in rows_of("data/zeroshot/piqa/validation.jsonl")
    ]
    return Task("piqa", "piqa", short(questions), normalize=True)


def arc_easy() -> Task:
    questions = [
        Question(
            f"Question: {row['question']}\nAnswer:",
            tuple(f" {text}" for text in row["choices"]["text"]),
            row["choices"]["label"].index(row["answerKey"]),
            "science",
        )
        for row in rows_of("data/zeroshot/arc_easy/validation.jsonl")
    ]
    return Task("arc_easy", "arc_easy", short(questions), normalize=True)


def short(questions: list[Question]) -> tuple[Question, ...]:
    """Those that fit into 512 tokens of about two letters."""
    return tuple(q for q in questions if len(q.context) + max(map(len, q.choices)) < 500)


SUBJECTS = {"world": the_world, "stories260K": stories}


def measured(subject: Subject, model: Any) -> dict[str, float]:
    report = pk.evaluate(
        model, subject.tokenizer, ["perplexity", "zero_shot"], text=subject.text, tasks=subject.tasks, batch_size=64
    )
    figures = report.headline()
    return {"perplexity": round(figures["perplexity"], 4), "mean_accuracy": round(figures["mean_accuracy"], 4)}


def measure(
    name: str, seeds: list[int], ratios: list[float], chosen: list[str], done: set[tuple[str, int, float, str]]
) -> Iterator[dict[str, Any]]:
    """One row a cut: all methods at one ratio, ratio after ratio, seed after seed; recoveries last."""
    subject = SUBJECTS[name]()
    groups = pk.discover(subject.model)
    units = groups.of_kind("kv_head", "ffn_channel")
    if ("dense", 0, 0.0, "untuned") not in done:
        yield row_of("dense", 0, 0.0, "untuned", 0.0) | measured(subject, subject.model)
    for seed, stage in [*((seed, "untuned") for seed in seeds), (seeds[0], "recovered")]:
        sizes = {"n_samples": N_SAMPLES, "seq_len": SEQ_LEN, "seed": seed}
        calib = pk.calibration_set(subject.training, subject.tokenizer, **sizes)
        if "dense" in chosen and stage == "recovered" and ("dense", seed, 0.0, stage) not in done:
            trained = pk.recover(subject.model, RECOVERY, subject.training, tokenizer=subject.tokenizer)
            yield row_of("dense", seed, 0.0, stage, 0.0) | measured(subject, trained)
        scores: dict[str, Any] = {}
        for ratio, (label, method) in product(ratios, methods(seed).items()):
            if label not in chosen or (label, seed, ratio, stage) in done:
                continue
            if label not in scores:
                scores[label] = pk.score(subject.model, units, method.importance, calib, normalize=method.normalize)
            plan = pk.plan(groups, scores[label], ratio, ranking=method.ranking)
            options = {"compensate": calib, "fit": method.fit} if method.fit else {}
            small = pk.prune(subject.model, plan, **options)
            if stage == "recovered":
                small = pk.recover(small, RECOVERY, subject.training, tokenizer=subject.tokenizer, inplace=True)
            yield row_of(label, seed, ratio, stage, plan.pruning_ratio) | measured(subject, small)


def row_of(method: str, seed: int, ratio: float, stage: str, removed: float) -> dict[str, Any]:
    return {"method": method, "seed": seed, "ratio": ratio, "stage": stage, "removed": round(removed, 4)}


def known(path: Path) -> set[tuple[str, int, float, str]]:
    """What was measured before, and is not measured again."""
    if not path.exists():
        return set()
    table = pd.read_csv(path)
    return set(zip(table["method"], table["seed"], table["ratio"], table["stage"], strict=True))


def append(row: dict[str, Any], path: Path) -> None:
    """One row more, flushed at once."""
    row = {**machine(), **row}
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow(row)


def draw(name: str, path: Path) -> None:
    """Perplexity and accuracy against what went, before and after recovery, as one picture; medians in the shell."""
    table = pd.read_csv(path)
    fig, axes = plt.subplots(2, 2, figsize=(16, 11), layout="constrained", sharex=True)
    for column, stage in enumerate(("untuned", "recovered")):
        dense = table[table["method"] == "dense"].sort_values("stage", key=lambda found: found == stage).tail(1)
        rows = pd.concat([dense, table[(table["stage"] == stage) & (table["method"] != "dense")]])
        for line, measure in enumerate(("perplexity", "mean_accuracy")):
            ax = plot_tradeoff(rows, y=measure, ax=axes[line, column])
            ax.set_title(f"{name}, {stage}", loc="left")
            ax.get_legend().remove()
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    fig.savefig(path.with_suffix(".png"), dpi=80)
    for stage, rows in table[table["method"] != "dense"].groupby("stage", sort=False):
        for measure in ("perplexity", "mean_accuracy"):
            wide = rows.pivot_table(index="method", columns="ratio", values=measure, aggfunc="median", sort=False)
            print(f"\n{name}, {stage}, median {measure} over {rows['seed'].nunique()} seeds\n{wide.round(3)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=[*SUBJECTS], default=[*SUBJECTS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[*SEEDS], help="the first one's cuts are recovered too")
    parser.add_argument("--ratios", nargs="+", type=float, default=[*RATIOS])
    parser.add_argument("--methods", nargs="+", default=[name for name in methods(0) if name != "default"])
    parser.add_argument("--table", default="quality", help="how the names of the tables begin")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder; what is measured there already stays")
    parser.add_argument("--report", action="store_true", help="measure nothing, draw what there is")
    args = parser.parse_args()
    machine()  # the commit that is measured, whatever comes later
    for name in args.models:
        if name != "world" and not shared("models").is_dir():
            print(f"{name} is left out: there is no {shared('models')}; set PRUNEKIT_SHARED")
            continue
        path = args.out / f"{args.table}_{name}.csv"
        args.out.mkdir(parents=True, exist_ok=True)
        for row in () if args.report else measure(name, args.seeds, args.ratios, args.methods, known(path)):
            append(row, path)
        draw(name, path)


if __name__ == "__main__":
    main()
