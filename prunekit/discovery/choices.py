"""Choosing by value, as a router chooses experts: from topk over labelled scores to the parameters looked up with it.

What is computed from a choice carries no labels, only the number of the choice. Where a parameter is looked up with
it, the entries of that dimension go together with the scores that were chosen from: an expert and its router row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunekit.discovery.labels import along, varying_dims
from prunekit.discovery.rules import Operand, reduce_labels

if TYPE_CHECKING:
    from prunekit.discovery.labelling import LabelMode


@dataclass(eq=False)
class Choice:
    """Labels (n,) that were chosen from, and whether parameters were looked up with what was chosen."""

    labels: Tensor
    looked_up: bool = False


def choose(mode: LabelMode, func: Any, args: tuple, kwargs: dict, unknown: Any) -> Any:
    """Topk over labelled scores: a statistic over them, and a choice that everything computed from it remembers."""
    source = mode.operand(args[0])
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", -1)) % len(source.shape)
    if len(source.planes) != 1 or dim not in varying_dims(source.planes[0]):
        return unknown(mode, func, args, kwargs)
    plane = source.planes[0]
    if varying_dims(plane) != {dim}:
        n_groups = source.shape.numel() // source.shape[dim]
        mode.lock(plane, f"is chosen from (topk) in {n_groups} groups of {source.shape[dim]}, which must stay as large")
    reduce_labels(mode.graph, plane, (dim,), True)
    labels = along(plane, varying_dims(plane)).flatten()
    mode.graph.picks.append((labels, int(args[1] if len(args) > 1 else kwargs["k"])))
    mode.choices.append(Choice(labels))
    return mode.mark_chosen(func(*args, **kwargs), len(mode.choices) - 1)


def chosen_by(mode: LabelMode, tensors: list[Tensor]) -> int | None:
    """The last choice that any of these tensors was computed from."""
    found = [op.choice for op in map(mode.operand, tensors) if op.choice is not None]
    return max(found) if found else None


def pick(mode: LabelMode, result: Tensor, source: Operand, moved: Tensor, choice: int) -> Tensor:
    """A movement by chosen indices; the result also counts as chosen if labels depend on the indices."""
    plane = source.planes[0]
    if torch.equal(plane.unique(), moved.unique()):
        return mode.mark(result, moved)
    reduce_labels(mode.graph, plane, tuple(varying_dims(plane)), True)
    return mode.mark_chosen(result, choice)


def look_up_chosen(mode: LabelMode, source: Operand, result: Tensor, moved: list[Tensor], choice: int) -> Tensor | None:
    """Entries of a parameter's first dimension picked by a choice; None where the sizes do not fit."""
    rows = [p for p in source.planes if 0 in varying_dims(p)]
    chosen = mode.choices[choice]
    if len(rows) != 1 or source.shape[0] != len(chosen.labels):
        return None
    chosen.looked_up = True
    mode.graph.unify(along(rows[0], {0}).flatten(), chosen.labels)
    mode.graph.chosen.append(chosen.labels)
    rest = tuple(m for m, p in zip(moved, source.planes, strict=True) if 0 not in varying_dims(p))
    return mode.mark_parameter(result, rest)


def lock_open_choices(mode: LabelMode) -> None:
    """The labels that were chosen from, if the use of the choice is unknown."""
    used = [choice.labels for choice in mode.choices if choice.looked_up]
    for choice in mode.choices:
        if not any(torch.equal(choice.labels, labels) for labels in used):  # it may also be chosen from beforehand
            mode.graph.lock(choice.labels, "is chosen from by value (topk), and it is not clear what for")
