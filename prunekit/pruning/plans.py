"""`PruningPlan`: which units of which groups stay, as plain data."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from prunekit.discovery import Groups
from prunekit.discovery.groups import kind_in, layer_in
from prunekit.errors import PrunekitError, reason
from prunekit.escaping import html_paragraph
from prunekit.files import read_text, write_text

_SAVED = ("keep", "n_units", "n_parameters", "n_parameters_kept", "notes")
_NO_PLAN, _GIVE = "this is no pruning plan", "give JSON as PruningPlan.save writes"


@dataclass(frozen=True)
class PruningPlan:
    """A pruning plan: the units of each group that stay.

    Attributes:
        keep: group name → ascending list of the units kept.
        n_units: group name → number of units before.
        n_parameters: parameters of the model before.
        n_parameters_kept: parameters of the model after.
        notes: how the plan was made.
        groups: what the plan was made of, so that `prune` need not find it again; None in a plan that was read.
        tokens: some of the calibration set that the scores were computed from, int64 (n, seq_len), on which `prune`
            measures the loss; None without tokens, and in a plan from a file.

    Raises:
        PrunekitError: units that a group does not have, or numbers of parameters that cannot be.
    """

    keep: dict[str, list[int]]
    n_units: dict[str, int]
    n_parameters: int
    n_parameters_kept: int
    notes: dict[str, Any] = field(default_factory=dict)
    groups: Groups | None = field(default=None, repr=False, compare=False)
    tokens: Tensor | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("keep", "n_units", "notes"):
            if not isinstance(getattr(self, name), Mapping):
                raise PrunekitError(f"{name} of a plan is {getattr(self, name)!r:.60}; it must be a dictionary")
        if self.groups is not None and not isinstance(self.groups, Groups):
            raise PrunekitError(f"groups of a plan are {self.groups!r:.60}; leave them out, or give discover(model)'s")
        if self.tokens is not None and not isinstance(self.tokens, Tensor):
            raise PrunekitError(f"tokens of a plan are {self.tokens!r:.60}; leave them out, or give a calibration set")
        _check_sizes(self.n_parameters, self.n_parameters_kept)
        for name, units in self.keep.items():
            _check_units(name, units, self.n_units.get(name))

    @property
    def pruning_ratio(self) -> float:
        """Fraction of the model's parameters that is removed."""
        return 1 - self.n_parameters_kept / self.n_parameters

    @property
    def n_removed(self) -> dict[str, int]:
        """Group → number of removed units."""
        return {name: self.n_units[name] - len(units) for name, units in self.keep.items()}

    def cut_groups(self, kind: str) -> list[str]:
        """Names of the groups of a kind that lose units."""
        return [name for name in self._cut() if kind_in(name) == kind]

    @property
    def cut_kinds(self) -> set[str]:
        """Kinds of the groups that lose units."""
        return {kind_in(name) for name in self._cut()}

    def _cut(self) -> list[str]:
        """Names of the groups that lose units; units are not listed, of which a damaged file may name 10**12."""
        return [name for name, n in self.n_removed.items() if n]

    @property
    def takes_tokens(self) -> bool:
        """Whether tokens are removed, so that the remaining ones have new ids."""
        return "vocabulary" in self.cut_kinds

    @property
    def removed_parts(self) -> list[str]:
        """Paths of the layers and blocks that are removed whole."""
        return [name.rpartition(":")[0] for name, units in self.keep.items() if not units]

    @property
    def removed_layers(self) -> list[str]:
        """Paths of the layers that are removed whole."""
        return [name.removesuffix(":layer") for name in self.cut_groups("layer")]

    def removed(self, name: str) -> list[int]:
        """Ascending list of the removed units of a group."""
        kept = set(self.keep[name])
        return [unit for unit in range(self.n_units[name]) if unit not in kept]

    @property
    def gone(self) -> dict[str, list[int]]:
        """Group name → removed units, of the groups that lose any.

        `prunekit.knowledge.ablate(model, groups, plan.gone)` sets them to zero for a while. Where all these groups are
        exact, the model then computes what `prune(model, plan)` does, without the time of a cut. A plan that removes
        nothing gives an empty dictionary, which `ablate` refuses.
        """
        return {name: units for name in self.keep if (units := self.removed(name))}

    def table(self) -> pd.DataFrame:
        """One row per group: group, n_units, kept, kept_fraction."""
        rows = [(name, self.n_units[name], len(units)) for name, units in self.keep.items()]
        table = pd.DataFrame(rows, columns=["group", "n_units", "kept"])
        table.insert(1, "kind", table["group"].map(kind_in))
        table.insert(2, "layer", table["group"].map(layer_in).astype("Int64"))
        return table.assign(kept_fraction=table["kept"] / table["n_units"])

    def summary(self) -> pd.DataFrame:
        """One row per kind: groups, and their units before and after."""
        table = self.table().groupby("kind", sort=False)
        return table.agg(groups=("group", "size"), before=("n_units", "sum"), after=("kept", "sum"))

    def summary_rows(self) -> list[tuple[str, str, str, str]]:
        """Summary table as cells, header first: parameters and the units of each kind."""
        counts = [("parameters", self.n_parameters, self.n_parameters_kept)]
        counts += [(f"{kind} units", row["before"], row["after"]) for kind, row in self.summary().iterrows()]
        body = [(name, f"{a:,}", f"{b:,}", f"{1 - b / a:.1%}") for name, a, b in counts]
        return [("", "before", "after", "removed"), *body]

    def to_json(self) -> str:
        """The whole plan as JSON text."""
        return json.dumps({name: getattr(self, name) for name in _SAVED}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "PruningPlan":
        """The plan from the text that `to_json` wrote.

        Raises:
            PrunekitError: the text is no plan.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:  # no JSON, numbers too long, too deep
            raise PrunekitError(f"{_NO_PLAN} ({reason(error)}); {_GIVE}") from error
        _check_fields(data, cls)
        return cls(**data)

    def save(self, path: str | Path) -> Path:
        """Write JSON; the file is complete or not written.

        Raises:
            PrunekitError: the folder is missing or cannot be written to.
        """
        write_text(Path(path), self.to_json())
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> "PruningPlan":
        """Read a plan written by `save`.

        Raises:
            PrunekitError: there is no such file, it cannot be read, or it is no plan.
        """
        return cls.from_json(read_text(path, "PruningPlan.save"))

    def __repr__(self) -> str:
        whole = f"; {self.notes['whole']}" if "whole" in self.notes else ""
        return (
            f"PruningPlan({self.pruning_ratio:.2%} of {self.n_parameters:,} parameters go; "
            f"{len(self._cut())} of {len(self.keep)} groups are cut{whole})"
        )

    def _repr_html_(self) -> str:
        table = self.table().pivot_table(index="layer", columns="kind", values="kept_fraction", dropna=False)
        return f"{html_paragraph(self)}{table.style.format('{:.0%}', na_rep='', escape='html').to_html()}"


def _check_fields(data: Any, plan: type[PruningPlan]) -> None:
    if not isinstance(data, Mapping):
        raise PrunekitError(f"{_NO_PLAN}: it is a {type(data).__name__}; {_GIVE}")
    needed = {each.name: each.default is each.default_factory for each in fields(plan)}  # both MISSING
    for name in (name for name in needed if needed[name] and name not in data):
        raise PrunekitError(f"{_NO_PLAN}: it has no {name!r}; {_GIVE}")
    for name in (name for name in data if name not in needed):
        raise PrunekitError(f"{_NO_PLAN}: it has a field {name!r:.60}; {_GIVE}")


def _check_sizes(before: Any, after: Any) -> None:
    if type(before) is not int or type(after) is not int or not 0 <= after <= before or before == 0:
        raise PrunekitError(
            f"a plan has n_parameters={before!r} and n_parameters_kept={after!r}; both must be integers, the first "
            "above 0 and the second not larger"
        )


def _check_units(name: str, units: Any, total: Any) -> None:
    if not isinstance(units, list) or any(type(unit) is not int for unit in units):
        raise PrunekitError(f"plan for {name!r} keeps {str(units)[:60]}; it must be a list of integers")
    if type(total) is not int:
        raise PrunekitError(f"plan for {name!r} has n_units {total!r}; it must be an integer, the size of the group")
    if not units and total == 1:
        return  # a whole layer or block goes
    if not units or units != sorted(set(units)) or not 0 <= units[0] <= units[-1] < total:
        raise PrunekitError(
            f"plan for {name!r} keeps {str(units)[:60]} of {total} units; "
            f"it must be an ascending, non-empty list of distinct numbers from 0 to {total - 1}"
        )
