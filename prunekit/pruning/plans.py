"""A pruning plan: which units of which groups stay, as plain data."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from prunekit.discovery import Groups
from prunekit.errors import PrunekitError
from prunekit.files import write_text


@dataclass(frozen=True)
class PruningPlan:
    """Which units stay.

    Attributes:
        keep: group name → ascending list of the units kept.
        n_units: group name → number of units before.
        n_parameters: parameters of the model before.
        n_parameters_kept: parameters of the model after.
        notes: how the plan was made, for the reader.
        groups: what the plan was made of, so that `prune` need not find it again; None in a plan that was read.
    """

    keep: dict[str, list[int]]
    n_units: dict[str, int]
    n_parameters: int
    n_parameters_kept: int
    notes: dict[str, Any] = field(default_factory=dict)
    groups: Groups | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, units in self.keep.items():
            total = self.n_units.get(name)
            if not isinstance(units, list) or any(type(unit) is not int for unit in units):
                raise PrunekitError(f"plan for {name!r} keeps {str(units)[:60]}; it must be a list of integers")
            if not units and total == 1:
                continue  # a whole layer or block goes
            if total is None or not units or units != sorted(set(units)) or not 0 <= units[0] <= units[-1] < total:
                raise PrunekitError(
                    f"plan for {name!r} keeps {str(units)[:60]} of {total} units; "
                    f"it must be an ascending, non-empty list of distinct numbers from 0 to {(total or 1) - 1}"
                )

    @property
    def pruning_ratio(self) -> float:
        """Fraction of the model's parameters that goes."""
        return 1 - self.n_parameters_kept / self.n_parameters

    def removed(self, name: str) -> list[int]:
        """Ascending list of the units of a group that go."""
        kept = set(self.keep[name])
        return [unit for unit in range(self.n_units[name]) if unit not in kept]

    def table(self) -> pd.DataFrame:
        """One row a group: group, n_units, kept, kept_fraction."""
        rows = [(name, self.n_units[name], len(units)) for name, units in self.keep.items()]
        table = pd.DataFrame(rows, columns=["group", "n_units", "kept"])
        table.insert(1, "kind", table["group"].str.extract(r"([a-z_]+)(?:#\d+)?$", expand=False))
        table.insert(2, "layer", table["group"].str.extract(r"(?:^|\.)(\d+)(?:\.|:)", expand=False).astype("Int64"))
        return table.assign(kept_fraction=table["kept"] / table["n_units"])

    def to_json(self) -> str:
        """The whole plan as JSON text."""
        return json.dumps(
            {
                "keep": self.keep,
                "n_units": self.n_units,
                "n_parameters": self.n_parameters,
                "n_parameters_kept": self.n_parameters_kept,
                "notes": self.notes,
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str) -> "PruningPlan":
        """Read back what `to_json` wrote.

        Raises:
            PrunekitError: the text is no plan.
        """
        try:
            data = json.loads(text)
            return cls(**data) if isinstance(data, Mapping) else cls(**{"keep": data})
        except (TypeError, AttributeError, json.JSONDecodeError) as error:
            raise PrunekitError(f"this is no pruning plan ({error}); give JSON as PruningPlan.save writes") from None

    def save(self, path: str | Path) -> None:
        """Write JSON; the file is complete or not there."""
        write_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "PruningPlan":
        """Read a plan written by `save`.

        Raises:
            PrunekitError: there is no such file, or it is no plan.
        """
        if not Path(path).is_file():
            raise PrunekitError(f"{str(path)!r} is no file; give the path of a plan written by PruningPlan.save")
        return cls.from_json(Path(path).read_text())

    def __repr__(self) -> str:
        cut = sum(len(units) < self.n_units[name] for name, units in self.keep.items())
        return (
            f"PruningPlan({self.pruning_ratio:.2%} of {self.n_parameters:,} parameters go; "
            f"{cut} of {len(self.keep)} groups are cut)"
        )

    def _repr_html_(self) -> str:
        table = self.table().pivot_table(index="layer", columns="kind", values="kept_fraction", dropna=False)
        return f"<p>{self!r}</p>{table.style.format('{:.0%}', na_rep='').to_html()}"
