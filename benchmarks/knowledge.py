"""Time of the knowledge distribution of the embedded world, prunekit against the plain loop over the same ablations.

The plain loop is a fair one: questions are tokenised once, the model stays in memory, weights are zeroed in place, and
each pass is `log_likelihoods`, as `zero_shot` runs it. It takes as long for
each ablation, so that some of them, evenly spread, stand for all; ours is timed on all. Half of them go before ours
and half after it, so that a machine that grows busier is unfair to neither. Whether both give the same is asserted.
Seconds are CPU seconds of this process, with as many threads as OMP_NUM_THREADS says; they count everything from the
groups and scores on (questions, the trial of packing, and the table).
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import RESULTS, machine, save

import prunekit as pk
from prunekit import world
from prunekit.discovery.groups import CoupledGroup
from prunekit.evaluation.likelihood import pack, unpacked
from prunekit.evaluation.sequence_scores import log_likelihoods
from prunekit.importance.ablation import ablated
from prunekit.importance.scores import Scores
from prunekit.knowledge import KnowledgeDistribution, knowledge_distribution
from prunekit.knowledge.question_spans import EvaluationSet, make_evaluation_set

RATIOS = (0.25, 0.5, 0.75, 1.0)
KINDS = ("kv_head", "query_head", "ffn_channel", "block", "layer")


def timed(work: Callable[[], Any]) -> tuple[Any, np.ndarray]:
    """A result, and its CPU and wall seconds."""
    before = np.array([time.process_time(), time.perf_counter()])
    return work(), np.array([time.process_time(), time.perf_counter()]) - before


def every_ablation(groups: list[CoupledGroup], scores: Scores) -> list[tuple[CoupledGroup, list[int]]]:
    """What is ablated, as `knowledge_distribution` has it."""
    return [
        (group, sorted(scores[group.name].argsort(stable=True)[: round(ratio * group.n_units)].tolist()))
        for group in groups
        for ratio in (RATIOS if group.n_units > 1 else (1.0,))
    ]


def naive(model: Any, asked: EvaluationSet, some: list[tuple[CoupledGroup, list[int]]]) -> list[Any]:
    """Hits and losses, measured by the plain loop."""
    marks = []
    for group, units in some:
        with ablated(model, group, units):
            marks.append(asked.outcomes(log_likelihoods(model, asked.spans, batch_size=32).sums))
    return marks


def check_equal(found: KnowledgeDistribution, rows: list[int], marks: list[Any]) -> float:
    """The largest difference of a loss, in nats; no hit may differ but where two choices are all but equal."""
    differences = [np.abs(found.loss[row] - loss).max() for row, (_, loss) in zip(rows, marks, strict=True)]
    flipped = sum(int((found.hit[row] != hit).sum()) for row, (hit, _) in zip(rows, marks, strict=True))
    assert max(differences) < 2e-3 and flipped <= len(rows), (max(differences), flipped)
    return float(max(differences))


def count_tokens(asked: EvaluationSet) -> dict[str, int]:
    """Positions that a pass of all questions runs through, read in three ways."""
    contexts = {span.tokens[: span.start - 1] for span in asked.spans}
    shared = sum(map(len, contexts)) + sum(len(span.tokens) - span.start for span in asked.spans)
    return {
        "tokens, each choice alone": sum(len(row.tokens) for row in unpacked(asked.spans)),
        "tokens, contexts shared": shared,
        "tokens, packed": sum(len(row.tokens) for row in pack(asked.spans)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=8, help="ablations that the plain loop measures")
    parser.add_argument("--every", type=int, default=2, help="ask every so many-th question of each task")
    parser.add_argument("--layers", type=int, nargs="*", help="only these layers (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder")
    args = parser.parse_args()
    machine()  # the commit that is measured, whatever comes later
    model, tokenizer = pk.load("world")
    groups = pk.discover(model)
    chosen = [g for g in groups.of_kind(*KINDS) if args.layers is None or g.layer in args.layers]
    scores = pk.score(model, chosen, pk.Taylor(), pk.calibration_set("world", tokenizer, seq_len=64, seed=0))
    tasks = {name: replace(task, questions=task.questions[:: args.every]) for name, task in world.tasks().items()}
    asked, plan = make_evaluation_set(model, tokenizer, tasks, None), every_ablation(chosen, scores)
    log_likelihoods(model, asked.spans[:64], batch_size=32)  # warm
    n = len(plan)
    rows = np.linspace(0, n - 1, min(args.sample, n)).round().astype(int).tolist()
    some, half = [plan[row] for row in rows], len(rows) // 2
    before, seconds_before = timed(lambda: naive(model, asked, some[:half]))
    found, ours = timed(lambda: knowledge_distribution(model, tokenizer, chosen, scores, ratios=RATIOS, tasks=tasks))
    after, seconds_after = timed(lambda: naive(model, asked, some[half:]))
    assert found.ablations["units"].tolist() == [units for _, units in plan]
    theirs = seconds_before + seconds_after
    apart, tokens = check_equal(found, rows, before + after), count_tokens(asked)
    table = [
        {"method": name, "ablations": count, "cpu_seconds": round(cpu, 1), "wall_seconds": round(wall, 1)}
        for name, count, (cpu, wall) in (("plain loop", len(rows), theirs), ("prunekit", n, ours))
    ]
    for row in table:
        row["seconds_an_ablation"] = round(row["cpu_seconds"] / row["ablations"], 3)
        row["questions"], row["spans"] = len(asked.table), len(asked.spans)
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    each = table[0]["seconds_an_ablation"]
    print(", ".join(f"{name}: {value:,}" for name, value in tokens.items()))
    print(f"the plain loop would take {each * n:.0f} CPU s for all {n}; factor {each * n / ours[0]:.2f}")
    print(f"{found!r}; largest difference of a loss {apart:.1e} nats; {torch.get_num_threads()} thread(s)")
    save(table, args.out / ("knowledge.csv" if args.layers is None else "knowledge_some.csv"))


if __name__ == "__main__":
    main()
