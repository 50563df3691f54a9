"""The table of label rules by operation; an operation without a rule locks its channels.

What is computed from a choice by value, as a router chooses experts, carries no labels, only the number of the choice.
Where a parameter is looked up with it, the entries of that dimension go together with the scores that were chosen
from: an expert and its router row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunekit.compat import decomposed
from prunekit.discovery.labels import CONSTANT, LOCKED, along, varying_dims
from prunekit.discovery.rules import Operand, reduce_labels

if TYPE_CHECKING:
    from prunekit.discovery.labelling import LabelMode

aten = torch.ops.aten


@dataclass(frozen=True)
class Rule:
    """The rule of an operation; `always` runs it even if no argument has labels."""

    apply: Callable[..., Any]
    always: bool = False


RULES: dict[Any, Rule] = {}


def rule(*packets: str, always: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function for operations by name; names that this torch lacks are passed over."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in packets:
            packet = getattr(aten, name, name if name == "pointwise" else None)
            if packet is not None:
                RULES[packet] = Rule(function, always)
        return function

    return register


def tensors_in(tree: Any) -> list[Tensor]:
    """Every tensor among nested arguments."""
    if isinstance(tree, Tensor):
        return [tree]
    found: list[Tensor] = []
    for item in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ():
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple, dict)):
            found += tensors_in(item)
    return found


# --- what only makes a constant -----------------------------------------------------------------


@rule(
    "empty", "zeros", "ones", "full", "new_empty", "new_zeros", "new_ones", "new_full", "empty_like", "zeros_like",
    "ones_like", "full_like", "new_empty_strided", "empty_strided", "scalar_tensor", always=True,
)  # fmt: skip
def create(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Tensor:
    """Result of `zeros`, `full_like` and the like: a uniform constant, without the labels of any tensor argument."""
    mode.note_numbers(func, [kwargs.get("fill_value"), *args[1:2]] if "full" in func.overloadpacket.__name__ else [])
    return mode.mark_uniform(func(*args, **kwargs))


# --- writes in place ----------------------------------------------------------------------------


@rule("copy_", "fill_", "zero_")
def overwrite(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Tensor:
    """An in-place write: the target takes the labels of the source."""
    if mode.operand(args[0]).parameter:
        return unknown(mode, func, args, kwargs)
    written = tensors_in(args[1:])
    plane = mode.operand(written[0]).planes[:1] if written else ()
    result = func(*args, **kwargs)
    source = plane[0] if plane else torch.full((), CONSTANT)
    mode.mark(args[0], source)
    return result


@rule("index_add_", "index_add")
def add_at(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Tensor:
    """Rows added to rows: along every other dimension, channel for channel."""
    into, source = mode.operand(args[0]), mode.operand(args[3])
    dim = args[1] % len(into.shape)
    planes = [op.planes[0] for op in (into, source) if len(op.planes) == 1]
    if into.parameter or len(source.planes) != 1 or any(dim in varying_dims(p) for p in planes):
        return unknown(mode, func, args, kwargs)
    rows = [p.narrow(dim, 0, 1) for p in planes]
    if len(rows) > 1:
        mode.graph.unify(*rows)
    return mode.mark(func(*args, **kwargs), rows[0].expand(into.shape))


def unknown(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Any:
    """Operation without a rule: decompose it if torch can; else lock inputs and outputs."""
    with mode:
        simpler = decomposed(func, args, kwargs)
    if simpler is not NotImplemented:
        return simpler
    for tensor in tensors_in((args, kwargs)):
        for plane in mode.operand(tensor).planes:
            mode.lock(along(plane, varying_dims(plane)), f"{func.overloadpacket.__name__} is not understood")
    result = func(*map(_solid, args), **{name: _solid(value) for name, value in kwargs.items()})
    for tensor in tensors_in(result):
        if not mode.operand(tensor).parameter and tensor.numel():
            mode.mark(tensor, torch.full((), LOCKED))
    return result


def _solid(value: Any) -> Any:
    """A tensor with memory of its own: kernels of any kind may not expect one number in place of a matrix."""
    return value.contiguous() if isinstance(value, Tensor) else value


@rule("_local_scalar_dense", "is_nonzero", "item")
def read_out(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Any:
    """A value read by Python code: lock its channels."""
    for plane in mode.operand(args[0]).planes:
        mode.lock(plane, "its value is read by Python code")
    return func(*args, **kwargs)


# --- choices by value ---------------------------------------------------------------------------


@dataclass(eq=False)
class Choice:
    """Labels (n,) that were chosen from, and whether parameters were looked up with what was chosen."""

    labels: Tensor
    looked_up: bool = False


@rule("topk")
def choose(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Any:
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
