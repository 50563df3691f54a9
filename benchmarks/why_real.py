"""What SmolLM2 shows in the notebooks: why a cut breaks it, what it writes afterwards, and what it holds where.

Losses are in nats per token, on windows of 128 tokens of C4 that no score has seen. Each table is made once:

- results/heads_smollm2.csv: one row a KV head (with its query heads), the rise of the loss without it alone, and what
  importances say of it (16 windows of C4).
- results/layers_smollm2.csv: one row a layer, the residual stream and the attention on the first token; and of a cut
  of 20% by first-order Taylor, all layers alike, the rise of the loss where only this layer is cut (`alone`) and where
  only this layer is left whole (`spared`).
- results/ffns_smollm2.csv: one row a layer, the rise of the loss without a fifth of its FFN channels (those with the
  lowest scores), and the rank correlation of their L2 scores with activation and curvature.
- results/sentences_smollm2.csv: how the dense model, that cut, and the shell's default cut of 20% go on.
- results/map_smollm2.csv: the rise of the loss, text by text, with half of each group of heads or channels zeroed.
- results/cut_smollm2.csv: the loss before and after the default cut of 10%, calibrated on eight windows of this
  project's guide: on held-out windows of the guide, and on those of C4.

Names of tables make these alone: `python benchmarks/why_real.py cut`.
"""

import argparse
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import cached_property

import pandas as pd
from machine import HERE, RESULTS, apart, machine, save, shared
from recovery_real import cut_model
from torch import Tensor

import prunekit as pk
from prunekit.account import loss_on
from prunekit.importance.ablation import ablated

SCORES = {
    "taylor": pk.Taylor(),
    "taylor-vector": pk.Taylor(granularity="vector"),
    "l2": pk.Magnitude(p=2),
    "activation": pk.Activation(),
    "curvature": pk.Curvature(),
}
PROMPTS = (
    "The capital of France is",
    "Water boils when",
    "Once upon a time, there was a little girl who",
    "To make a good cup of tea, you should",
)
TEXTS = {
    "encyclopedia": "calibration/wiki_demo.txt",
    "news": "ptb/ptb.test.txt",
    "stories": "tinystories/sample_niklas6.txt",
    "plays": "tinyshakespeare/input.txt",
    "web": "calibration/c4_demo.jsonl",
}
Removed = Iterable[tuple[str, list[int]]]


class Evidence:
    """The model, and what several tables share."""

    def __init__(self) -> None:
        self.model, self.tokenizer = pk.load("smollm2")
        self.groups = pk.discover(self.model)
        self.units = self.groups.of_kind("kv_head", "ffn_channel")
        self.held = apart(self.calibration(8, held_out=True), [self.calibration(16)])
        self.dense = loss_on(self.model, self.held)

    def calibration(self, n: int, **options: bool) -> Tensor:
        text = shared("data/calibration/c4_demo.jsonl")
        return pk.calibration_set(text, self.tokenizer, n_samples=n, seq_len=128, seed=0, **options)

    @cached_property
    def taylor_cut(self) -> pk.PruningPlan:
        scores = pk.score(self.model, self.units, pk.Taylor(), self.calibration(16))
        return pk.plan(self.groups, scores, 0.2, ranking="local")

    def rise(self, removed: Removed) -> float:
        with ExitStack() as stack:
            for name, gone in removed:
                stack.enter_context(ablated(self.model, self.groups[name], gone))
            return round(loss_on(self.model, self.held) - self.dense, 4)


def heads(found: Evidence) -> list[dict]:
    calib = found.calibration(16)
    scores = {name: pk.score(found.model, found.units, how, calib) for name, how in SCORES.items()}
    rows = []
    for group in found.groups.of_kind("kv_head"):
        for unit in range(group.n_units):
            said = {name: float(f"{float(values[group.name][unit]):.4g}") for name, values in scores.items()}
            rows.append({"layer": group.layer, "unit": unit, "loss": found.rise([(group.name, [unit])]), **said})
    print(pd.DataFrame(rows).drop(columns=["layer", "unit"]).corr("spearman")["loss"])
    return rows


def layers(found: Evidence) -> list[dict]:
    plan = found.taylor_cut
    gone = [(name, plan.removed(name)) for name in plan.keep if plan.removed(name)]
    print(f"dense {found.dense:.3f} nats, all layers cut +{found.rise(gone):.3f}")
    rows = []
    for layer, row in pk.massive_activations(found.model, found.groups, found.held).layers.iterrows():
        mine = [(name, units) for name, units in gone if found.groups[name].layer == layer]
        rest = [(name, units) for name, units in gone if found.groups[name].layer != layer]
        rows.append({"layer": layer, **row.round(4), "alone": found.rise(mine), "spared": found.rise(rest)})
    return rows


def ffns(found: Evidence) -> list[dict]:
    how = {"random": pk.Random(), **SCORES}
    scores = {name: pk.score(found.model, found.units, each, found.calibration(16)) for name, each in how.items()}
    rows = []
    for group in found.groups.of_kind("ffn_channel"):
        lowest = {name: said[group.name].argsort()[: group.n_units // 5].tolist() for name, said in scores.items()}
        ranks = pd.DataFrame({name: said[group.name].numpy() for name, said in scores.items()}).corr("spearman")["l2"]
        rises = {name: found.rise([(group.name, units)]) for name, units in lowest.items()}
        with_l2 = {f"l2 and {name}": round(ranks[name], 3) for name in ("activation", "curvature")}
        rows.append({"layer": group.layer, **rises, **with_l2})
    print(pd.DataFrame(rows).drop(columns="layer").describe())
    return rows


def sentences(found: Evidence) -> list[dict]:
    models = {
        "dense": found.model,
        "first-order Taylor, 20%": pk.prune(found.model, found.taylor_cut, measure=False),
        "default, 20%": cut_model()[0],
    }
    return pk.generations(models, found.tokenizer, PROMPTS, max_new_tokens=16).table.to_dict("records")


def knowledge_map(found: Evidence) -> list[dict]:
    scores = pk.score(found.model, found.units, pk.Curvature(), found.calibration(16))
    windows = 6 * 128 * 4  # characters, some six windows of each
    text = {name: shared(f"data/{path}") for name, path in TEXTS.items()}
    text = {name: path.read_text()[-windows:] for name, path in text.items() if path.suffix == ".txt"}
    text["web"] = found.tokenizer.decode(found.held[:6].flatten())
    options = {"ratios": (0.5,), "text": text}
    known = pk.knowledge_distribution(found.model, found.tokenizer, found.units, scores, **options)
    return known.table().round(5).to_dict("records")


def cut(found: Evidence) -> list[dict]:
    guide = HERE.parent / "docs" / "guide.md"
    calib, held = (
        pk.calibration_set(guide, found.tokenizer, n_samples=8, seq_len=128, seed=0, held_out=out)
        for out in (False, True)
    )
    scores = pk.score(found.model, found.units, pk.Curvature(), calib)
    small = pk.prune(found.model, pk.plan(found.groups, scores, 0.1), compensate=calib, held_out=held)
    losses = {
        "this project's guide": (small.loss_change.before, small.loss_change.after),
        "C4": (found.dense, loss_on(small, found.held)),
    }
    return [
        {"text": text, "calibrated_on": "this project's guide", "before": round(b, 4), "after": round(a, 4)}
        for text, (b, a) in losses.items()
    ]


TABLES: dict[str, Callable[[Evidence], list[dict]]] = {
    "heads": heads,
    "layers": layers,
    "ffns": ffns,
    "sentences": sentences,
    "map": knowledge_map,
    "cut": cut,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", default=list(TABLES), help=f"of {', '.join(TABLES)}; all by default")
    machine()
    found = None
    for name in parser.parse_args().tables:
        path = RESULTS / f"{name}_smollm2.csv"
        if not path.exists():
            found = found or Evidence()
            save(TABLES[name](found), path)
            print(f"wrote {path.name}", flush=True)


if __name__ == "__main__":
    main()
