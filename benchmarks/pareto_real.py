"""Loss against parameters and against latency on a real model: cuts in width and in depth, 10 to 50% of all parameters.

    python benchmarks/pareto_real.py            # measures what the table lacks, then draws
    python benchmarks/pareto_real.py --draw     # only draws

Each way takes what comes nearest to a share of all parameters, by one calibration set of C4 (seed 0, 64 windows of
128 tokens), and nothing is trained. `layers` and `blocks` (attention or FFN) go by block influence, the lowest first,
measured once. Perplexity is that of the first characters of WikiText-2 and PTB, in windows of 128. Latency is that of
one forward pass of 512 tokens and of one of a single token, by CPU seconds of one thread, divided by the dense
model's, which takes turns with it. Rows are appended as they are measured: what stands in the table is not run again.
"""

import argparse
import time
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import real
import torch
from machine import RESULTS, append, done, machine
from matplotlib.ticker import PercentFormatter

import prunekit as pk
from prunekit.plot_curves import DASHES
from prunekit.plot_style import MARKERS, colors_of
from prunekit.pruning.planning import plan_without

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)
TIMED = {"prefill": (512, 5), "one_token": (1, 20)}  # tokens a forward pass, and how often it is run


def in_depth(kind: str, bench: real.Bench, ratio: float, seed: int, gaps: str | None = None) -> Any:
    """Without the layers or blocks of least influence, as many as come nearest to a share of the parameters."""
    calib = bench.calibration(seed)
    scores = pk.score(bench.model, bench.groups.of_kind(kind), pk.BlockInfluence(), calib)
    order = sorted(scores, key=lambda name: float(scores[name]))
    plans = [plan_without(bench.groups, dict.fromkeys(order[:n], (0,)), {}) for n in range(1, len(order))]
    plan = min(plans, key=lambda plan: abs(plan.pruning_ratio - ratio))
    fitted: dict[str, Any] = {} if gaps is None else {"compensate": calib, "gaps": gaps}
    return pk.prune(bench.model, plan, measure=False, **fitted)


WAYS: dict[str, real.Way] = {
    "default (curvature, re-fit)": real.WAYS["default (curvature, re-fit)"],
    "curvature, no re-fit": real.WAYS["curvature"],
    "LLM-Pruner's selection": real.WAYS["LLM-Pruner (taylor, ends spared)"],
    "optipfair, data-driven": real.WAYS["optipfair, data-driven"],
    "layers": partial(in_depth, "layer"),
    "layers, linear map": partial(in_depth, "layer", gaps="map"),
    "blocks": partial(in_depth, "block"),
}


def times_dense(model: Any, dense: Any) -> dict[str, float]:
    """CPU seconds of a forward pass, divided by the dense model's in the same turn: medians over turns."""
    torch.set_num_threads(1)  # the time of a process is that of all its threads
    found = {}
    for name, (n_tokens, repeats) in TIMED.items():
        tokens, ratios = torch.zeros(1, n_tokens, dtype=torch.long), []
        for _ in range(repeats + 1):
            seconds = []
            for one in (model, dense):
                began = time.process_time()
                with torch.inference_mode():
                    one(input_ids=tokens, use_cache=False)
                seconds.append(time.process_time() - began)
            ratios.append(seconds[0] / seconds[1])
        found[name] = round(median(ratios[1:]), 3)  # the first turn warms both up
    return found


def draw(table: pd.DataFrame, path: Path) -> None:
    """Perplexity against what is left of parameters and of time, a curve a way."""
    dense, rows = table[table["way"] == "dense"].iloc[0], table[table["way"] != "dense"]
    across = {"kept": "parameters left", "prefill": "time of 512 tokens", "one_token": "time of one token"}
    fig, axes = plt.subplots(1, 3, figsize=(16, 6), layout="constrained", sharey=True)
    colors = colors_of(table["way"])
    for ax, (column, label) in zip(axes, across.items(), strict=True):
        for number, (way, curve) in enumerate(rows.groupby("way", sort=False)):
            sorted_by = curve.sort_values("kept")
            style = {"marker": MARKERS[number % len(MARKERS)], "linestyle": DASHES[number % len(DASHES)]}
            ax.plot(sorted_by[column], sorted_by["wikitext2"], color=colors[str(way)], label=way, linewidth=2, **style)
        ax.axhline(dense["wikitext2"], color=colors["dense"], linestyle=":", label="dense")
        ax.set(xlabel=f"{label}, of the dense model's", yscale="log")
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes[0].set_ylabel("perplexity on WikiText-2 (logarithmic)")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    fig.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", type=float, nargs="+", default=[*RATIOS])
    parser.add_argument("--ways", nargs="+", choices=[*WAYS], default=[*WAYS])
    parser.add_argument("--out", type=Path, default=RESULTS / "pareto_smollm2.csv")
    parser.add_argument("--draw", action="store_true", help="measure nothing, draw what there is")
    args = parser.parse_args()
    there = done(args.out, "way", "ratio")
    wanted = [("dense", 0.0), *product(args.ways, args.ratios)]
    missing = [] if args.draw else [(way, ratio) for way, ratio in wanted if (way, str(ratio)) not in there]
    if missing:
        told, bench = machine(), real.Bench("smollm2", 13_000, 64, ["wikitext2", "ptb"], 0)
        for way, ratio in missing:
            small = bench.model if way == "dense" else WAYS[way](bench, ratio, 0)
            kept = sum(p.numel() for p in small.parameters()) / bench.groups.n_parameters
            row = {"way": way, "ratio": ratio, "kept": round(kept, 4), **times_dense(small, bench.model)}
            append({**told, **row, **bench.measured(small)}, args.out)
    draw(pd.read_csv(args.out), args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
