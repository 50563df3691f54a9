"""What is found in tiny models of every family against what their configurations imply, and whether cuts are exact.

Run it with `PYTHONPATH=tests python benchmarks/every_family.py [family ...]`. It prints a table and writes it to
`benchmarks/results/families.csv`. Units are told as found/implied, layer by layer; "~" marks kinds that are inexact
because a norm's statistics, or a router's choice, span their units. The difference is the largest over three random
cuts, between the logits of the cut model and of the full model with the same units zeroed. Heads and channels are
"zero" where they were cut and that difference is theirs, "inexact" where they were cut and none is owed, "locked"
where no part of them is offered. The effect is the smallest difference that zeroing the units made to the full model.
"""

import csv
import io
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import transformers
from families import (
    HEADS,
    Family,
    found,
    logits,
    plan_keeping,
    random_units,
    relative_difference,
    zero_units,
)
from other_families import EVERYONE

import prunekit as pk
from prunekit.discovery import Groups
from prunekit.files import write_text

SEEDS = (0, 1, 2)
OUT = Path(__file__).parent / "results" / "families.csv"
KINDS = {"heads": HEADS, "channels": ("ffn_channel",)}


class Row(NamedTuple):
    """One family with one attention implementation."""

    family: str
    attention: str
    dtype: str
    units: str
    as_implied: str
    inexact: str
    difference: str
    effect: str
    heads: str
    channels: str
    locked: int
    seconds: str


def measure(family: Family, attention: str) -> Row:
    began = time.perf_counter()
    groups = family.groups(attention)
    plans = [keep for seed in SEEDS if (keep := random_units(family, groups, seed))]
    compared = [cut_against_zero(family, groups, attention, keep) for keep in plans]
    cut = {groups[name].kind for keep in plans for name, units in keep.items() if len(units) < groups[name].n_units}
    inexact = cut_inexact(family, groups, attention)
    here, implied = found(groups), family.implied()
    return Row(
        family.name, attention, str(family.dtype).removeprefix("torch."), told(here, implied),
        "yes" if here == implied else "no",
        " ".join(sorted({k for units in here.values() for k in units if k.endswith("~")})),
        f"{max(difference for difference, _ in compared):.1e}" if compared else "",
        f"{min(effect for _, effect in compared):.1e}" if compared else "",
        *(how(kinds, cut, inexact) for kinds in KINDS.values()),
        len(groups.locked), f"{time.perf_counter() - began:.1f}",
    )  # fmt: skip


def told(here: dict, implied: dict) -> str:
    """Found/implied of every kind; layers that are alike once."""
    lines: dict[str, list[str]] = {}
    for layer in here:
        kinds = dict.fromkeys([*implied[layer], *here[layer]])
        text = ", ".join(f"{k} {plus(here[layer].get(k, ()))}/{plus(implied[layer].get(k, ()))}" for k in kinds)
        lines.setdefault(text, []).append("model" if layer is None else str(layer))
    return "; ".join(f"{'+'.join(layers)}: {text}" for text, layers in lines.items())


def plus(sizes: tuple[int, ...]) -> str:
    return "+".join(f"{n}×{size}" if n > 1 else str(size) for size, n in Counter(sizes).items()) or "0"


def how(kinds: tuple[str, ...], cut: set[str], inexact: set[str]) -> str:
    return "zero" if cut & set(kinds) else "inexact" if inexact & set(kinds) else "locked"


def cut_against_zero(family: Family, groups: Groups, attention: str, keep: dict[str, list[int]]) -> tuple[float, float]:
    """Relative differences of the cut and the zeroed model, and of the zeroed and the full one."""
    model, plan = family.model(attention), plan_keeping(groups, keep)
    full, small = logits(model), logits(cut_as_told(model, groups, keep))
    zeroed = logits(zero_units(model, groups, plan))
    return relative_difference(small, zeroed), relative_difference(zeroed, full)


def cut_inexact(family: Family, groups: Groups, attention: str) -> set[str]:
    """Kinds of heads and channels of which nothing but inexact groups is there, each cut once."""
    kinds = {g.kind for g in groups.of_kind(*HEADS, "ffn_channel") if g.n_units > 1 and not g.exact}
    kinds -= {g.kind for g in groups if g.exact}
    for kind in kinds:
        keep = {g.name: list(range(0, g.n_units, 2)) for g in groups.of_kind(kind)}
        assert logits(cut_as_told(family.model(attention), groups, keep)).isfinite().all()
    return kinds


def cut_as_told(model: object, groups: Groups, keep: dict[str, list[int]]) -> object:
    """A cut model that was discovered anew and has the units that were asked for."""
    small = pk.prune(model, plan_keeping(groups, keep))
    left = pk.discover(small)
    names = {g.name for g in left}
    assert all(left[name].n_units == len(units) for name, units in keep.items() if name in names), keep
    return small


def main(names: list[str]) -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    rows = []
    print("| " + " | ".join(Row._fields) + " |\n|" + " --- |" * len(Row._fields))
    for family in [EVERYONE[name] for name in names or EVERYONE]:
        for attention in family.attentions:
            rows.append(measure(family, attention))
            print("| " + " | ".join(map(str, rows[-1])) + " |", flush=True)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([Row._fields, *rows])
    OUT.parent.mkdir(exist_ok=True)
    write_text(OUT, text.getvalue())


if __name__ == "__main__":
    main(sys.argv[1:])
