"""Time and memory of a full Taylor prune, prunekit against Torch-Pruning on the same LLaMA, in turn.

Both cut a quarter of the heads and FFN channels by the same score, first-order and element by element, summed over a
unit, from the same 10 × 64 tokens. Both make one backward pass over all of them; what it takes of the whole is told,
and the ratio of the rest. (prunekit's leaves out the gradients of what is not cut: embeddings, norms, the head.)
Seconds are CPU seconds of this process, as in run.py, whose remarks hold here too. Peak memory is what a process of its
own holds beyond the model, measured once a tool; for prunekit that includes the new, smaller model, since the old one
is left alone.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
import torch_pruning as tp
from machine import RESULTS, machine, save
from run import (
    PEER,
    RATIO,
    SHAPES,
    Seconds,
    Shape,
    build,
    compare,
    count,
    stage,
    stage_medians,
    staged,
    torch_pruner,
)
from transformers import LlamaForCausalLM

import prunekit as pk
from prunekit.gradients import gather_gradients
from prunekit.pruning import surgery

SHAPES = {"8x256": Shape(8, 256, 8, 8, 688), **SHAPES}
TOKENS = (10, 64)


def tokens() -> torch.Tensor:
    return torch.randint(0, 2000, TOKENS, generator=torch.Generator().manual_seed(0))


def time_prunekit(model: LlamaForCausalLM) -> tuple[Seconds, int]:
    """Seconds a stage, and the parameters left."""
    seconds: Seconds = {}
    with stage(seconds, "discover"):
        groups = pk.discover(model)
        units = groups.of_kind("kv_head", "ffn_channel")
    with stage(seconds, "backward"):
        names = {member.parameter for group in units for member in group.members}
        gradients = gather_gradients(model, tokens(), names)
    with stage(seconds, "choose"):
        scores = pk.score(model, units, pk.Taylor(), gradients)
        plan = pk.plan(groups, scores, pruning_ratio=RATIO, of="units")
    del gradients
    with mock.patch.object(surgery, "verify", staged(seconds, "verify", surgery.verify)), stage(seconds, "cut"):
        small = pk.prune(model, plan, measure=False)  # the peer measures no loss
    return seconds, count(small)


def time_torch_pruning(model: LlamaForCausalLM) -> tuple[Seconds, int]:
    """The same for Torch-Pruning: its graph is `discover`, its one step chooses and cuts."""
    seconds: Seconds = {}
    with stage(seconds, "discover"):
        importance = tp.importance.GroupTaylorImportance(group_reduction="sum", normalizer=None, multivariable=False)
        pruner = torch_pruner(model, importance)
    with stage(seconds, "backward"):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    with stage(seconds, "choose and cut"):
        pruner.step()
    model.zero_grad()
    return seconds, count(model)


TOOLS = {"prunekit": time_prunekit, PEER: time_torch_pruning}


def peak_of(name: str, tool: str) -> int:
    """Bytes that a process of its own held at most beyond the model."""
    found = subprocess.run(
        [sys.executable, __file__, "--alone", name, tool], capture_output=True, text=True, check=True
    )
    return json.loads(found.stdout.splitlines()[-1])["bytes"]


def alone(name: str, tool: str) -> None:
    """Run once on a small model, so that libraries are loaded, then on the real one under watch."""
    TOOLS[tool](build(Shape(2, 64, 4, 4, 96)))
    model, process, highest, done = build(SHAPES[name]), psutil.Process(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            highest[0] = max(highest[0], process.memory_info().rss)
            time.sleep(0.002)

    before, watcher = process.memory_info().rss, threading.Thread(target=watch)
    watcher.start()
    TOOLS[tool](model)
    done.set()
    watcher.join()
    print(json.dumps({"bytes": highest[0] - before}))


def report(name: str, rows: list[dict[str, Any]], peaks: dict[str, int]) -> None:
    """Medians, the share of the backward pass, and how many times faster than Torch-Pruning."""
    medians = {tool: stage_medians([row for row in rows if row["tool"] == tool]) for tool in TOOLS}
    for tool, stages in medians.items():
        left = next(row["parameters_left"] for row in rows if row["tool"] == tool)
        told = ", ".join(f"{stage} {seconds:.3f}" for stage, seconds in stages.items())
        share = stages["backward"] / stages["total"]
        print(f"{name} {tool:13}: CPU s {told}; backward {share:.0%}; {left:.2%} left; peak {peaks[tool] / 1e6:.0f} MB")
    for total in ("total", "total without verify"):
        ours, theirs = (medians[tool] for tool in TOOLS)
        rest = [tool["backward"] for tool in (ours, theirs)]
        print(
            f"{name} ratio, {total}: {theirs['total'] / ours[total]:.2f}; without the backward pass: "
            f"{(theirs['total'] - rest[1]) / (ours[total] - rest[0]):.2f}"
        )
    print(f"{name} ratio of peak memory: {peaks[PEER] / peaks['prunekit']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES], default=["8x256", "12x768"])
    parser.add_argument("--alone", nargs=2, metavar=("SHAPE", "TOOL"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder")
    args = parser.parse_args()
    if args.alone:
        return alone(*args.alone)
    machine(PEER)  # the commit that is measured, whatever comes later
    for name in args.shapes:
        rows, peaks = compare(name, SHAPES[name], args.repeats, TOOLS), {tool: peak_of(name, tool) for tool in TOOLS}
        report(name, rows, peaks)
        save(
            [{**row, "peak_mb": round(peaks[row["tool"]] / 1e6, 1)} for row in rows],
            args.out / f"taylor_{name}.csv",
            PEER,
        )
    return None


if __name__ == "__main__":
    main()
