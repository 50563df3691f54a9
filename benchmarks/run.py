"""Time prunekit against Torch-Pruning on the same models, in turn, in one process.

Both cut a quarter of the heads and of the FFN channels of a randomly initialised LLaMA by L2 magnitude. Nothing is
asserted: absolute times belong to the machine, so the ratios are what to read. Times are CPU seconds of this process,
which a busy machine disturbs less than the clock on the wall.

What differs: prunekit leaves the model alone, builds a smaller one, and traces that again to prove the cut;
Torch-Pruning changes the model in place.
"""

import argparse
import csv
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from transformers import LlamaConfig, LlamaForCausalLM

import prunekit as pk

RATIO = 0.25
HERE = Path(__file__).parent
SHAPES = {"12x768": (12, 768, 12, 2048), "32x256": (32, 256, 8, 688)}  # layers, hidden, heads, FFN


def build(layers: int, hidden: int, heads: int, ffn: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=ffn,
        vocab_size=2000,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


def time_prunekit(model: LlamaForCausalLM) -> tuple[dict[str, float], int]:
    """CPU seconds a stage, and the parameters left."""
    seconds: dict[str, float] = {}
    groups = timed(seconds, "discover", lambda: pk.discover(model))
    scores = timed(seconds, "score", lambda: pk.score(model, groups, pk.Magnitude(p=2)))
    plan = timed(seconds, "plan", lambda: pk.plan(groups, scores, pruning_ratio=RATIO, of="units"))
    small = timed(seconds, "prune", lambda: pk.prune(model, plan))
    return seconds, count(small)


def time_torch_pruning(model: LlamaForCausalLM) -> tuple[dict[str, float], int]:
    """The same for Torch-Pruning: its graph is `discover`, its one step scores, plans and prunes."""
    seconds: dict[str, float] = {}
    pruner = timed(seconds, "discover", lambda: torch_pruner(model))
    timed(seconds, "prune", pruner.step)
    return seconds, count(model)


def torch_pruner(model: LlamaForCausalLM) -> tp.pruner.BasePruner:
    heads = model.config.num_attention_heads
    attentions = [layer.self_attn for layer in model.model.layers]
    channels = [linear for layer in model.model.layers for linear in (layer.mlp.gate_proj, layer.mlp.up_proj)]
    projections = [linear for one in attentions for linear in (one.q_proj, one.k_proj, one.v_proj)]
    return tp.pruner.BasePruner(
        model,
        torch.zeros(1, 8, dtype=torch.long),
        tp.importance.GroupMagnitudeImportance(p=2),
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


def timed(seconds: dict[str, float], stage: str, work: Callable[[], Any]) -> Any:
    began = time.process_time()
    result = work()
    seconds[stage] = time.process_time() - began
    return result


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


TOOLS = {"prunekit": time_prunekit, "torch-pruning": time_torch_pruning}


def compare(name: str, repeats: int) -> list[dict[str, Any]]:
    """One row a tool, stage and repeat; the tools take turns, after one round that does not count."""
    rows: list[dict[str, Any]] = []
    for repeat in range(-1, repeats):
        for tool, run in TOOLS.items():
            model = build(*SHAPES[name])
            dense = count(model)
            seconds, left = run(model)
            told: dict[str, Any] = {
                "shape": name,
                "tool": tool,
                "repeat": repeat,
                "parameters_left": round(left / dense, 4),
            }
            stages = {**seconds, "total": sum(seconds.values())}
            rows += [{**told, "stage": stage, "cpu_seconds": round(value, 4)} for stage, value in stages.items()]
    return [row for row in rows if row["repeat"] >= 0]


def median(rows: list[dict[str, Any]], tool: str, stage: str) -> float:
    return statistics.median(row["cpu_seconds"] for row in rows if (row["tool"], row["stage"]) == (tool, stage))


def report(name: str, rows: list[dict[str, Any]]) -> None:
    ours, theirs = (median(rows, tool, "total") for tool in TOOLS)
    left = {row["tool"]: row["parameters_left"] for row in rows}
    times = f"prunekit {ours:.2f} CPU s, torch-pruning {theirs:.2f} CPU s, ratio {theirs / ours:.2f}"
    print(f"{name}: {times}; parameters left {left}")


def machine() -> dict[str, Any]:
    """What the figures belong to, without naming the machine."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return {
        "commit": commit.stdout.strip() or "unknown",
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_pruning": importlib.metadata.version("torch-pruning"),
    }


def save(rows: list[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    beside = path.with_suffix(".part")
    with beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*machine(), *rows[0]])
        writer.writeheader()
        writer.writerows({**machine(), **row} for row in rows)
    beside.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "Unwrapped parameters", module="torch_pruning")
    for name in args.shapes:
        rows = compare(name, args.repeats)
        report(name, rows)
        save(rows, HERE / f"results/discover_and_prune_{name}.csv")


if __name__ == "__main__":
    main()
