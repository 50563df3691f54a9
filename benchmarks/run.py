"""Time prunekit against Torch-Pruning on the same models, in turn, in one process.

Both cut a quarter of the heads and of the FFN channels of a randomly initialised LLaMA by L2 magnitude. Nothing is
asserted: absolute times belong to the machine, so the ratios are what to read. They are of CPU seconds of this process,
which a busy machine disturbs less than the clock on the wall; both are written down.

What differs: prunekit leaves the model alone and builds a smaller one, and before that it traces the cut once more to
prove it (`verify`; ratios are told with and without it). It finds out by itself what goes together, heads included, and
keeps scores and plan as values. Torch-Pruning changes the model in place, proves nothing, and is told where the heads
are. Its one step scores, chooses and cuts. The 7B and 70B shapes, on no memory, are discovered by prunekit alone.
"""

import argparse
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch_pruning as tp
from machine import RESULTS, machine, save
from transformers import LlamaConfig, LlamaForCausalLM

import prunekit as pk
from prunekit.pruning import surgery

RATIO = 0.25
PEER = "torch-pruning"


class Shape(NamedTuple):
    """A LLaMA's widths."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int = 2000


SHAPES = {
    "12x768": Shape(12, 768, 12, 12, 2048),
    "32x512": Shape(32, 512, 8, 8, 1376),
    "80x256": Shape(80, 256, 4, 4, 688),
}
WEIGHTLESS = {
    "7B": Shape(32, 4096, 32, 32, 11008, 32000),
    "70B": Shape(80, 8192, 64, 8, 28672, 32000),
}

Seconds = dict[str, tuple[float, float]]  # stage → (CPU, wall)


def build(shape: Shape) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.ffn,
        vocab_size=shape.vocabulary,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


def time_prunekit(model: LlamaForCausalLM) -> tuple[Seconds, int]:
    """Seconds a stage, and the parameters left; `verify` is a part of `cut`."""
    seconds: Seconds = {}
    with stage(seconds, "discover"):
        groups = pk.discover(model)
    with stage(seconds, "choose"):
        scores = pk.score(model, groups.of_kind("kv_head", "ffn_channel"), pk.Magnitude(p=2))
        plan = pk.plan(groups, scores, pruning_ratio=RATIO, of="units")
    with mock.patch.object(surgery, "verify", staged(seconds, "verify", surgery.verify)), stage(seconds, "cut"):
        small = pk.prune(model, plan)
    return seconds, count(small)


def time_torch_pruning(model: LlamaForCausalLM) -> tuple[Seconds, int]:
    """The same for Torch-Pruning: its graph is `discover`, its one step chooses and cuts."""
    seconds: Seconds = {}
    with stage(seconds, "discover"):
        pruner = torch_pruner(model)
    with stage(seconds, "choose and cut"):
        pruner.step()
    return seconds, count(model)


def torch_pruner(model: LlamaForCausalLM, importance: tp.importance.Importance | None = None) -> tp.pruner.BasePruner:
    heads = model.config.num_attention_heads
    attentions = [layer.self_attn for layer in model.model.layers]
    channels = [linear for layer in model.model.layers for linear in (layer.mlp.gate_proj, layer.mlp.up_proj)]
    projections = [linear for one in attentions for linear in (one.q_proj, one.k_proj, one.v_proj)]
    return tp.pruner.BasePruner(
        model,
        torch.zeros(1, 8, dtype=torch.long),
        importance or tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio_dict=dict.fromkeys([*channels, *projections], RATIO),  # heads are cut where theirs is above 0
        pruning_ratio=0.0,
        num_heads=dict.fromkeys(projections, heads),
        prune_num_heads=True,
        prune_head_dims=False,
        head_pruning_ratio=RATIO,
        ignored_layers=[model.lm_head],
        root_module_types=[torch.nn.Linear],
        output_transform=lambda out: out.logits.sum(),
    )


@contextmanager
def stage(seconds: Seconds, name: str) -> Iterator[None]:
    """Write down how long what stands within took."""
    cpu, wall = time.process_time(), time.perf_counter()
    yield
    seconds[name] = (time.process_time() - cpu, time.perf_counter() - wall)


def staged(seconds: Seconds, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, timed."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        with stage(seconds, name):
            return work(*args, **kwargs)

    return timed


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


TOOLS = {"prunekit": time_prunekit, "torch-pruning": time_torch_pruning}


Tools = dict[str, Callable[[LlamaForCausalLM], tuple[Seconds, int]]]


def compare(name: str, shape: Shape, repeats: int, tools: Tools) -> list[dict[str, Any]]:
    """One row a tool, stage and repeat; the tools take turns at going first, after one round that does not count."""
    rows: list[dict[str, Any]] = []
    for repeat in range(-1, repeats):
        for tool, run in [*tools.items()][:: -1 if repeat % 2 else 1]:
            model = build(shape)
            dense = count(model)
            seconds, left = run(model)
            told = {"shape": name, "tool": tool, "repeat": repeat, "parameters_left": round(left / dense, 4)}
            rows += [{**told, **row} for row in stage_rows(seconds)]
    return [row for row in rows if row["repeat"] >= 0]


def stage_rows(seconds: Seconds) -> list[dict[str, Any]]:
    """One row a stage, then their totals with and without `verify`, which `cut` holds already."""
    cpu, wall = (sum(pair[i] for name, pair in seconds.items() if name != "verify") for i in (0, 1))
    proof = seconds.get("verify", (0.0, 0.0))
    totals = {"total": (cpu, wall), "total without verify": (cpu - proof[0], wall - proof[1])}
    return [
        {"stage": name, "cpu_seconds": round(pair[0], 4), "wall_seconds": round(pair[1], 4)}
        for name, pair in {**seconds, **totals}.items()
    ]


def report(name: str, rows: list[dict[str, Any]]) -> None:
    """Medians, and how many times faster than Torch-Pruning."""
    medians = {tool: stage_medians([row for row in rows if row["tool"] == tool]) for tool in TOOLS}
    for tool, stages in medians.items():
        left = next(row["parameters_left"] for row in rows if row["tool"] == tool)
        told = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in stages.items())
        print(f"{name} {tool:13}: CPU s {told}; {left:.2%} of the parameters left")
    for total in ("total", "total without verify"):
        print(f"{name} ratio, {total}: {medians['torch-pruning'][total] / medians['prunekit'][total]:.2f}")


def stage_medians(rows: list[dict[str, Any]]) -> dict[str, float]:
    stages = dict.fromkeys(row["stage"] for row in rows)
    return {name: statistics.median(row["cpu_seconds"] for row in rows if row["stage"] == name) for name in stages}


def discover_weightless(name: str, repeats: int) -> list[dict[str, Any]]:
    """Discovery of a model without weights, one row a repeat; memory is the highest of this process so far."""
    with torch.device("meta"):
        model = build(WEIGHTLESS[name])
    rows = []
    for repeat in range(repeats):
        seconds: Seconds = {}
        with stage(seconds, "discover"):
            pk.discover(model)
        rows.append(
            {"shape": name, "repeat": repeat, **stage_rows(seconds)[0], "peak_gb": round(peak_bytes() / 1e9, 2)}
        )
    cpu, wall = (statistics.median(row[f"{clock}_seconds"] for row in rows) for clock in ("cpu", "wall"))
    print(f"{name} without weights: discover {cpu:.2f} CPU s, {wall:.2f} s on the wall, peak {rows[-1]['peak_gb']} GB")
    return rows


def peak_bytes() -> int:
    """Most memory this process held; Linux counts in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    every = [*WEIGHTLESS, *SHAPES]  # in this order, so that no weights count towards the memory of the former
    parser.add_argument("--shapes", nargs="+", choices=every, default=every)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder")
    args = parser.parse_args()
    machine(PEER)  # the commit that is measured, whatever comes later
    warnings.filterwarnings("ignore", "Unwrapped parameters", module="torch_pruning")
    for name in sorted(args.shapes, key=every.index):
        if name in WEIGHTLESS:
            save(discover_weightless(name, args.repeats), args.out / f"discover_{name}.csv", PEER)
            continue
        rows = compare(name, SHAPES[name], args.repeats, TOOLS)
        report(name, rows)
        save(rows, args.out / f"discover_and_prune_{name}.csv", PEER)


if __name__ == "__main__":
    main()
