"""Coupled groups as plain values."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, overload

import pandas as pd
import torch
from torch import Tensor

from prunekit.errors import PrunekitError
from prunekit.escaping import html_paragraph

KINDS = ("kv_head", "query_head", "ffn_channel", "hidden", "head_dim", "expert", "block", "layer", "rank", "vocabulary")


def layer_in(name: str) -> int | None:
    """The layer in the name of a group, a parameter or a module: the first number in its path; None without one."""
    found = re.search(r"(?:^|\.)(\d+)(?:[.:]|$)", name)
    return int(found[1]) if found else None


def kind_in(name: str) -> str:
    """The kind in a group's name."""
    return name.rpartition(":")[2].partition("#")[0]


@dataclass(frozen=True, eq=False)
class Member:
    """One parameter dimension that takes part in a group.

    Attributes:
        parameter: name as in `model.named_parameters()`.
        dim: dimension of that parameter.
        index: int64 (n_units, width), ascending in each row: the indices along `dim` each unit owns.
    """

    parameter: str
    dim: int
    index: Tensor

    @property
    def width(self) -> int:
        """Indices each unit owns."""
        return self.index.shape[1]

    def owned_by(self, units: Sequence[int] | Tensor) -> Tensor:
        """Ascending indices along `dim` that `units` own together, int64 (n,)."""
        return self.index[torch.as_tensor(units, dtype=torch.long)].flatten().sort().values

    def __repr__(self) -> str:
        return f"Member({self.parameter!r}, dim={self.dim}, {len(self.index)} units × {self.width})"


@dataclass(frozen=True, eq=False)
class CoupledGroup:
    """Interchangeable units in one place of a model, with all the slices that must go together.

    Attributes:
        name: unique, `"<module path>:<kind>"`.
        kind: one of `KINDS`.
        n_units: number of units, in the order of the first member.
        members: every parameter dimension that takes part, in the order of `named_parameters()`.
        exact: True where the smaller model equals the model with the units zeroed; False where a
            norm's statistics span units, so that removing some changes what is left.
        min_units: units that must stay: of experts, as many as the router chooses for each token.
    """

    name: str
    kind: str
    n_units: int
    members: tuple[Member, ...]
    exact: bool
    min_units: int = 1

    @property
    def layer(self) -> int | None:
        """First number in the group's module path; None where it belongs to no layer."""
        return layer_in(self.name)

    def __repr__(self) -> str:
        mark = "" if self.exact else ", inexact"
        return f"CoupledGroup({self.name!r}, {self.n_units} units, {len(self.members)} members{mark})"


@dataclass(frozen=True, eq=False)
class Groups(Sequence[CoupledGroup]):
    """The coupled groups of a model.

    Attributes:
        items: the groups, in the order of the model's layers.
        shapes: parameter name → shape, for every parameter of the model (tied ones once).
        locked: what may not be cut, module or parameter path → reason.
        locked_kinds: kind of the units that this would be, where that is known → the first of these places.
        traced: the trace that they were found in, for `prune`; it is not copied or saved with them.
    """

    items: tuple[CoupledGroup, ...]
    shapes: dict[str, tuple[int, ...]]
    locked: dict[str, str] = field(default_factory=dict)
    locked_kinds: dict[str, str] = field(default_factory=dict)
    traced: Any = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "traced": None}

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[CoupledGroup]:
        return iter(self.items)

    def __contains__(self, item: object) -> bool:
        """Whether a group of that name, or that very group, is one of these."""
        return item in self._by_name if isinstance(item, str) else any(item is group for group in self.items)

    @overload
    def __getitem__(self, key: int | str) -> CoupledGroup: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[CoupledGroup, ...]: ...
    def __getitem__(self, key: int | str | slice) -> CoupledGroup | tuple[CoupledGroup, ...]:
        """A group by position or by name.

        Raises:
            PrunekitError: no group has that name.
        """
        if not isinstance(key, str):
            return self.items[key]
        if key not in self._by_name:
            raise PrunekitError(f"no group is called {key!r}; this model has {', '.join(self._by_name)}")
        return self._by_name[key]

    @cached_property
    def _by_name(self) -> dict[str, CoupledGroup]:
        return {group.name: group for group in self.items}

    @property
    def n_parameters(self) -> int:
        """Parameters of the whole model, tied ones counted once."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def layers(self) -> list[int]:
        """Ascending numbers of the layers that have groups."""
        return sorted({group.layer for group in self.items if group.layer is not None})

    def of_kind(self, *kinds: str) -> tuple[CoupledGroup, ...]:
        """The groups of these kinds, in order."""
        return tuple(group for group in self.items if group.kind in kinds)

    def check_kinds(self, kinds: Iterable[str]) -> None:
        """Raise an error for a kind that this model has no groups of; it says where such units are locked, and why.

        Raises:
            PrunekitError: names the kinds that the model has.
        """
        for kind in kinds:
            if self.of_kind(kind):
                continue
            there = ", ".join(each for each in KINDS if self.of_kind(each)) or "no groups at all"
            place = self.locked_kinds.get(kind)
            if place is not None:
                why = f"; its units of this kind are locked: {place}: {self.locked[place]}"
            else:
                why = f"; {len(self.locked)} places are locked, groups.locked says why" if self.locked else ""
            raise PrunekitError(f"this model has no groups of the kind {kind!r}; it has {there}{why}")

    def without(self, names: Iterable[str]) -> "Groups":
        """All groups but those of these names; the model that they were found in stays the same.

        Raises:
            PrunekitError: no group has such a name.
        """
        left_out = {self[name].name for name in names}
        return replace(self, items=tuple(group for group in self.items if group.name not in left_out))

    def table(self) -> pd.DataFrame:
        """One row per member: group, kind, layer, n_units, exact, parameter, dim, width."""
        rows = [
            (g.name, g.kind, g.layer, g.n_units, g.exact, m.parameter, m.dim, m.width)
            for g in self.items
            for m in g.members
        ]
        columns = ["group", "kind", "layer", "n_units", "exact", "parameter", "dim", "width"]
        return pd.DataFrame(rows, columns=columns)

    def summary(self) -> pd.DataFrame:
        """One row per kind: number of groups, fewest and most units of one, units in all, whether all are exact."""
        table = self.table().drop_duplicates("group")
        return table.groupby("kind", sort=False).agg(
            groups=("group", "size"), fewest=("n_units", "min"), most=("n_units", "max"),
            units=("n_units", "sum"), exact=("exact", "all"),
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Everything but the indices, as plain values for JSON: n_parameters, groups (with their members), locked."""
        found = [
            {
                **{name: getattr(g, name) for name in ("name", "kind", "layer", "n_units", "exact")},
                "members": [{"parameter": m.parameter, "dim": m.dim, "width": m.width} for m in g.members],
            }
            for g in self.items
        ]
        return {"n_parameters": self.n_parameters, "groups": found, "locked": self.locked}

    def __repr__(self) -> str:
        counts = {kind: len(self.of_kind(kind)) for kind in KINDS if self.of_kind(kind)}
        found = ", ".join(f"{n} {kind}" for kind, n in counts.items()) or "none"
        return f"Groups({found}; {self.n_parameters:,} parameters; {len(self.locked)} locked)"

    def _repr_html_(self) -> str:
        return f"{html_paragraph(self)}{self.summary().to_html()}"
