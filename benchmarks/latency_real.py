"""How fast a shorter and a thinner SmolLM2 are at equal parameters, beside the dense one.

    python benchmarks/latency_real.py

Two, four or six of 30 layers go, or as many parameters as heads and channels, the same share in every layer. Which
units go does not change the time, so layers go from the middle and units by L2; what the choice does to the loss is in
`depth_smollm2.csv`. All models are timed in turn, round after round, so that what else the machine does meets them all:
CPU milliseconds of a prompt of 512 tokens, and of one new token behind it with the KV cache. Medians of the rounds.
"""

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import RESULTS, append, machine

import prunekit as pk
from prunekit.pruning.planning import plan_without

LAYERS, LENGTH = (2, 4, 6), 512


def models(dense: Any) -> dict[tuple[str, int], Any]:
    """The dense model, and the cut ones by way and number of layers."""
    groups = pk.discover(dense)
    layers = sorted(groups.of_kind("layer"), key=lambda group: group.layer or 0)
    scores = pk.score(dense, groups.of_kind("kv_head", "ffn_channel"), pk.Magnitude(p=2))
    made = {("dense", 0): dense}
    for n in LAYERS:
        first = (len(layers) - n) // 2
        shorter = plan_without(groups, {group.name: (0,) for group in layers[first : first + n]}, {})
        thinner = pk.plan(groups, scores, round(shorter.pruning_ratio, 4))
        made |= {("depth", n): pk.prune(dense, shorter, measure=False)}
        made |= {("width", n): pk.prune(dense, thinner, measure=False)}
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
    dense, _ = pk.load("smollm2")
    made, prompt = models(dense), torch.arange(LENGTH)[None] + 100
    times: dict[tuple[str, int], list[tuple[float, float]]] = {key: [] for key in made}
    for number in range(args.rounds + 1):
        for key, model in made.items():
            taken = milliseconds(model, prompt)
            if number:  # the first round warms up
                times[key].append(taken)
    args.out.unlink(missing_ok=True)
    whole = dense.num_parameters()
    for (way, n), found in times.items():
        prefill, decode = (median(column) for column in zip(*found, strict=True))
        row = {"way": way, "layers": n, "kept": round(made[way, n].num_parameters() / whole, 4)}
        row |= {"prompt_tokens": LENGTH, "rounds": args.rounds}
        append({**machine(), **row, "prefill_ms": round(prefill, 1), "decode_ms": round(decode, 2)}, args.out)


if __name__ == "__main__":
    main()
