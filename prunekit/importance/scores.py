"""Importance scores as a value: one number per unit."""

import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from prunekit.checks import check_choice, check_value
from prunekit.discovery.groups import CoupledGroup
from prunekit.errors import PrunekitError
from prunekit.escaping import html_paragraph
from prunekit.files import new_file, reading

_FORMAT = "prunekit.scores/1"


class Scores(dict[str, Tensor]):
    """Group name → detached float CPU tensor (n_units,). Higher means keep.

    Attributes:
        label: name of the importance, for legends.
        kinds: group name → kind, as in `CoupledGroup`.
        ranking: default ranking of `plan`: `"global"` if scores are comparable across groups, as those of
            `Curvature`, else `"local"`.
        tokens: some tokens of the calibration set, int64 (n, seq_len), on which `prune` measures the change of the
            loss; None for scores from weights alone or from a file.
    """

    tokens: Tensor | None = None

    def __init__(
        self, values: Mapping[str, Tensor], *, label: str, kinds: Mapping[str, str], ranking: str = "local"
    ) -> None:
        super().__init__(values)
        self.label = label
        self.ranking = ranking
        self.kinds = dict(kinds)

    def table(self) -> pd.DataFrame:
        """One row per unit: group, kind, layer, unit, score."""
        rows = [
            (name, self.kinds[name], layer_of(name), unit, score)
            for name, values in self.items()
            for unit, score in enumerate(values.tolist())
        ]
        return pd.DataFrame(rows, columns=["group", "kind", "layer", "unit", "score"])

    def summary(self) -> pd.DataFrame:
        """One row per kind: groups, units, and the range of the scores."""
        return (
            self.table()
            .groupby("kind", sort=False)
            .agg(
                groups=("group", "nunique"),
                units=("unit", "size"),
                lowest=("score", "min"),
                median=("score", "median"),
                highest=("score", "max"),
            )
        )

    def save(self, path: str | Path) -> Path:
        """Write to one safetensors file, replacing an old one only when it is complete.

        Raises:
            PrunekitError: the folder does not exist.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise PrunekitError(f"cannot save scores to {str(path)!r}: create the folder {str(path.parent)!r} first")
        meta = {"format": _FORMAT, "label": self.label, "ranking": self.ranking, "kinds": json.dumps(self.kinds)}
        meta["order"] = json.dumps([*self])
        with new_file(path) as beside:
            save_file({name: values.contiguous() for name, values in self.items()}, beside, meta)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Scores":
        """Read scores that `save` wrote.


        Raises:
            PrunekitError: the file is missing, or contains no scores.
        """
        with reading(path, "scores", "Scores.save"), safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            if meta.get("format") != _FORMAT:
                raise PrunekitError("it is a safetensors file, but Scores.save did not write it")
            order, kinds = json.loads(meta["order"]), json.loads(meta["kinds"])
            ranking = meta.get("ranking", "local")  # older files do not have it
            check_value("order", order, list[str])
            check_value("kinds", kinds, dict[str, str])
            check_choice("ranking", ranking, ("local", "global"))
            values = {name: _checked(name, file.get_tensor(name), kinds) for name in order}
        return cls(values, label=meta["label"], kinds=kinds, ranking=ranking)

    def __repr__(self) -> str:
        units = sum(len(values) for values in self.values())
        return f"Scores({self.label}; {len(self)} groups, {units:,} units)"

    def _repr_html_(self) -> str:
        return f"{html_paragraph(self)}{self.summary().to_html()}"


def _checked(name: str, values: Tensor, kinds: Mapping[str, str]) -> Tensor:
    """Scores of a group, as they may stand in a file."""
    if name not in kinds or values.dim() != 1 or not values.is_floating_point() or not bool(values.isfinite().all()):
        raise PrunekitError(f"{name!r} has no kind, or scores that are not finite numbers, one a unit")
    return values


def layer_of(name: str) -> int | None:
    """Layer number in a group's name."""
    return CoupledGroup(name, "", 0, (), True).layer
