"""Importance scores as a value, one number per unit, and how scores of weights are reduced to them."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from prunekit.checks import check_choice, check_value
from prunekit.discovery.groups import CoupledGroup, Member, layer_in
from prunekit.errors import PrunekitError
from prunekit.escaping import html_paragraph
from prunekit.files import new_file, reading
from prunekit.gradients import Gradients
from prunekit.layer_gradients import LayerBackward

_FORMAT = "prunekit.scores/1"
SomeGroups = tuple[CoupledGroup, ...]
Calibration = Tensor | Gradients | None  # integers (n_samples, seq_len), or what was gathered over them
GradientSource = Calibration | LayerBackward  # or a backward pass that stands at the layer of the groups


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
            (name, self.kinds[name], layer_in(name), unit, score)
            for name, values in self.items()
            for unit, score in enumerate(values.tolist())
        ]
        return pd.DataFrame(rows, columns=["group", "kind", "layer", "unit", "score"])

    def summary(self) -> pd.DataFrame:
        """One row per kind: groups, units, and the range of the scores."""
        return self.table().groupby("kind", sort=False).agg(
            groups=("group", "nunique"), units=("unit", "size"),
            lowest=("score", "min"), median=("score", "median"), highest=("score", "max"),
        )  # fmt: skip

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
        return f"{html_paragraph(self)}{self.summary().to_html(float_format='{:.3g}'.format)}"


def _checked(name: str, values: Tensor, kinds: Mapping[str, str]) -> Tensor:
    """Scores of a group, as they may stand in a file."""
    if name not in kinds or values.dim() != 1 or not values.is_floating_point() or not bool(values.isfinite().all()):
        raise PrunekitError(f"{name!r} has no kind, or scores that are not finite numbers, one a unit")
    return values


GRANULARITIES = ("vector", "element")

# Each takes the slices of a group's units (n_units, n_slices, channels) along dimension 1 to (n_units, channels).
_FOLD: dict[str, Callable[..., Tensor]] = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax, "prod": torch.prod}
REDUCTIONS = (*_FOLD, "first", "second")

SliceScores = dict[tuple[str, int], Tensor]  # (parameter, dim) → one score an index of that dimension


def check_takes_tokens(model: nn.Module) -> None:
    """Raise an error for a model that does not take tokens as transformers models do.

    Raises:
        PrunekitError: the model has no input embeddings.
    """
    if not hasattr(model, "get_input_embeddings"):
        raise PrunekitError(
            f"a {type(model).__name__} is not a transformers model, so it cannot run on tokens; give one, or "
            "choose an importance that needs no data, such as Magnitude()"
        )


def tokens_for(who: str, calib: object) -> Tensor:
    """The calibration set of an importance that runs tokens itself, such as `"Reconstruction()"`.

    Raises:
        PrunekitError: it is something else, such as gradients.
    """
    if not isinstance(calib, Tensor):
        raise PrunekitError(f"{who} reads tokens, not {calib!r}; give integers (n_samples, seq_len)")
    return calib


def slice_scores(weights: Tensor, dim: int, granularity: str) -> Tensor:
    """One score per row, column or other slice along `dim`, from one score per weight.

    Args:
        weights: score of each weight, in the parameter's shape. For a bias a slice is one weight.
        dim: the dimension whose indices are scored: 0 for the rows of a Linear, 1 for its columns.
        granularity: `"vector"`, the absolute value of the sum, or `"element"`, the sum of absolute values.

    Returns:
        float (weights.shape[dim],), not negative.

    Source: LLM-Pruner, Eq. 3 (vector-wise) and Eq. 5 (element-wise).
    """
    if granularity == "element":
        weights = weights.abs()
    others = [d for d in range(weights.ndim) if d != dim]
    return (weights.sum(others) if others else weights).abs()


def all_slice_scores(
    groups: Iterable[CoupledGroup], weight_scores: Callable[[str], Tensor], granularity: str
) -> SliceScores:
    """Slice scores of all members, computed once per parameter.

    Args:
        groups: the groups to score.
        weight_scores: parameter name → one score per weight, in the parameter's shape.
        granularity: as in `slice_scores`.

    Returns:
        CPU tensors by (parameter, dim).
    """
    dims: dict[str, set[int]] = {}
    for group in groups:
        for member in group.members:
            dims.setdefault(member.parameter, set()).add(member.dim)
    found: SliceScores = {}
    for parameter, wanted in dims.items():
        weights = weight_scores(parameter)
        for dim in sorted(wanted):
            found[parameter, dim] = slice_scores(weights, dim, granularity).detach().cpu()
    return found


def unit_scores(group: CoupledGroup, slices: SliceScores, reduction: str) -> Tensor:
    """One score a unit: slices are reduced channel by channel, then the unit's channels are summed.

    A KV head of size d that serves `rep` query heads owns rep·d rows of q, rep·d columns of o, and d rows
    of k and of v. Its channel c is then row c of each of its own query heads, of k and of v, and column c
    of o for each of them: 2·rep + 2 slices in d channels. A fused QKV folds in the same way. Where the
    smallest width does not divide the others (a whole layer is the unit), the unit counts as one channel.

    Args:
        group: the group to score.
        slices: at least the slices of its members.
        reduction: one of `REDUCTIONS`. `"first"` and `"second"` take one parameter alone: the one that
            stands first in the model (q, gate), and the reference's second (for heads the projection that
            reads them, o; otherwise the second in the model, up).

    Returns:
        float (n_units,).

    Source: LLM-Pruner, section 3.2. Differs: with grouped-query attention the released code folds the
        heads the other way round and gives KV head h the query heads h, h + n_kv, …, which belong to others.
    """
    if reduction in _FOLD:
        rows = [slices[m.parameter, m.dim][m.index] for m in group.members]  # each (n_units, width)
        folded = torch.cat([r.reshape(group.n_units, -1, _n_channels(group.members)) for r in rows], 1)
        return _FOLD[reduction](folded, 1).sum(1)  # (n_units, n_slices, channels) → (n_units,)
    member = _one_member(group, reduction)
    return slices[member.parameter, member.dim][member.index].sum(1)


def _n_channels(members: Iterable[Member]) -> int:
    """The smallest width if it divides the others; 1 if the members' channels do not align."""
    widths = [m.width for m in members]
    smallest = min(widths)
    return smallest if all(width % smallest == 0 for width in widths) else 1


def _one_member(group: CoupledGroup, which: str) -> Member:
    """The weight for `"first"` or `"second"`, one per module, so that a bias is never the second."""
    modules: dict[str, Member] = {}
    for member in group.members:
        modules.setdefault(member.parameter.rpartition(".")[0], member)
    weights = list(modules.values())
    if which == "first" or len(weights) == 1:
        return weights[0]
    return weights[-1 if group.kind in ("kv_head", "query_head") else 1]
