"""Why a cut breaks a real model: each head alone, each layer's part of a cut alone, and massive activations.

Two tables: results/heads_smollm2.csv has one row a KV head (with its query heads): the rise of the loss without it,
in nats, and what importances say of it. results/layers_smollm2.csv has one row a layer: the residual stream and the
attention on the first token, and of LLM-Pruner's default score at 20% (16 windows of C4, all layers alike) the rise of
the loss where this layer alone is cut (`alone`), and where all others are (`spared`). Losses are those of 8 windows of
128 tokens of C4 that no score has seen.
"""

from collections.abc import Iterable
from contextlib import ExitStack

import pandas as pd
from machine import RESULTS, machine, save, shared

import prunekit as pk
from prunekit.account import loss_on
from prunekit.importance.ablation import silenced

SCORES = {
    "taylor": pk.Taylor(),
    "taylor-vector": pk.Taylor(granularity="vector"),
    "l2": pk.Magnitude(p=2),
    "activation": pk.Activation(),
    "curvature": pk.Curvature(),
}


def main() -> None:
    machine()
    model, tokenizer = pk.load("smollm2")
    groups, text = pk.discover(model), shared("data/calibration/c4_demo.jsonl")
    calib = pk.calibration_set(text, tokenizer, n_samples=16, seq_len=128, seed=0)
    held = pk.calibration_set(text, tokenizer, n_samples=8, seq_len=128, seed=0, held_out=True)
    units = groups.of_kind("kv_head", "ffn_channel")
    dense = loss_on(model, held)

    def rise(removed: Iterable[tuple[str, list[int]]]) -> float:
        with ExitStack() as stack:
            for name, gone in removed:
                stack.enter_context(silenced(model, groups[name], gone))
            return round(loss_on(model, held) - dense, 4)

    scores = {name: pk.score(model, units, importance, calib) for name, importance in SCORES.items()}
    heads = []
    for group in groups.of_kind("kv_head"):
        for unit in range(group.n_units):
            said = {name: float(f"{float(found[group.name][unit]):.4g}") for name, found in scores.items()}
            heads.append({"layer": group.layer, "unit": unit, "loss": rise([(group.name, [unit])]), **said})
    save(heads, RESULTS / "heads_smollm2.csv")
    plan = pk.plan(groups, scores["taylor"], 0.2, ranking="local")
    gone = {name: sorted(set(range(groups[name].n_units)) - set(keep)) for name, keep in plan.keep.items()}
    massive = pk.massive_activations(model, groups, held).layers.round(4)
    layers = []
    for layer, row in massive.iterrows():
        mine = [(name, units) for name, units in gone.items() if units and groups[name].layer == layer]
        rest = [(name, units) for name, units in gone.items() if units and groups[name].layer != layer]
        layers.append({"layer": layer, **row, "alone": rise(mine), "spared": rise(rest)})
    save(layers, RESULTS / "layers_smollm2.csv")
    everything = rise(gone.items())
    print(f"dense {dense:.3f} nats, all layers cut +{everything:.3f}")
    print(pd.DataFrame(heads).drop(columns=["layer", "unit"]).corr("spearman").loc["loss"])


if __name__ == "__main__":
    main()
