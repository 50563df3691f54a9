"""How fast a shorter and a thinner SmolLM2 are at equal parameters, beside the dense one.

    python benchmarks/latency_real.py

Two, four or six of 30 layers go from the middle (which ones does not change the time), or as many parameters in width
by the package's default, as in `depth_smollm2.csv`, which has what each does to the loss; beside it the default with
widths that are multiples of eight. All models are timed in turn, round after round, so that what else the machine does
meets them all: CPU milliseconds of a prompt of 512 tokens, and of one new token behind it with the KV cache, as medians
and quartiles of the rounds.
"""

import argparse
import time
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from machine import RESULTS, machine, save, shared

import prunekit as pk
from prunekit.pruning.plan_options import default_units
from prunekit.pruning.planning import plan_without

LAYERS, LENGTH = (2, 4, 6), 512


def models(dense: Any, tokenizer: Any) -> dict[tuple[str, int], Any]:
    """The dense model, and the cut ones by way and number of layers."""
    groups = pk.discover(dense)
    layers = sorted(groups.of_kind("layer"), key=lambda group: group.layer or 0)
    calib = pk.calibration_set(shared("data/calibration/c4_demo.jsonl"), tokenizer, n_samples=32, seq_len=128, seed=0)
    scores = pk.score(dense, default_units(groups), pk.Curvature(), calib)
    made = {("dense", 0): dense}
    for n in LAYERS:
        first = (len(layers) - n) // 2
        shorter = plan_without(groups, {group.name: (0,) for group in layers[first : first + n]}, {})
        ratio = round(shorter.pruning_ratio, 4)
        plans = {"depth": shorter, "width": pk.plan(groups, scores, ratio)}
        plans["width, multiples of 8"] = pk.plan(groups, scores, ratio, round_to={"ffn_channel": 8})
        made |= {(way, n): pk.prune(dense, plan, measure=False) for way, plan in plans.items()}
    return made


@torch.inference_mode()
def milliseconds(model: Any, prompt: torch.Tensor) -> tuple[float, float]:
    """CPU milliseconds of the prompt, and of one token behind it."""
    began = time.process_time()
    cache = model(input_ids=prompt, use_cache=True, logits_to_keep=1).past_key_values
    read = time.process_time()
    model(input_ids=prompt[:, -1:], past_key_values=cache, use_cache=True)
    return 1000 * (read - began), 1000 * (time.process_time() - read)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "latency_smollm2.csv")
    args = parser.parse_args()
    machine()  # the commit, before anything is measured
    dense, tokenizer = pk.load("smollm2")
    made, prompt = models(dense, tokenizer), torch.arange(LENGTH)[None] + 100
    times: dict[tuple[str, int], list[tuple[float, float]]] = {key: [] for key in made}
    for number in range(args.rounds + 1):
        for key, model in made.items():
            taken = milliseconds(model, prompt)
            if number:  # the first round warms up
                times[key].append(taken)
    rows = []
    for (way, n), found in times.items():
        row: dict[str, Any] = {"way": way, "layers": n, "prompt_tokens": LENGTH, "rounds": args.rounds}
        row["kept"] = round(made[way, n].num_parameters() / dense.num_parameters(), 4)
        for name, column in zip(("prefill_ms", "decode_ms"), zip(*found, strict=True), strict=True):
            low, middle, high = quantiles(column, n=4)
            row |= {name: round(middle, 2), f"{name}_low": round(low, 2), f"{name}_high": round(high, 2)}
        rows.append(row)
        print(row)
    save(rows, args.out)


if __name__ == "__main__":
    main()
