"""Rules of operations that move data: views, copies, rows looked up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from prunekit.discovery.labels import LOCKED, along, varying_dims
from prunekit.discovery.operations import aten, chosen_by, look_up_chosen, pick, rule, tensors_in, unknown
from prunekit.discovery.rules import Operand

if TYPE_CHECKING:
    from prunekit.discovery.labelling import LabelMode


_VIEWS = (
    "view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "t", "transpose", "permute", "slice", "select",
    "split", "split_with_sizes", "chunk", "unbind", "unsqueeze", "squeeze", "narrow", "detach", "alias", "diagonal",
    "as_strided", "movedim", "swapaxes", "swapdims", "lift_fresh", "numpy_T", "mT",
)  # fmt: skip
VIEWS = {getattr(aten, name) for name in (*_VIEWS, "expand") if hasattr(aten, name)}
COPIES = {aten._to_copy, aten.clone}
LOOK_UPS = {aten.embedding, aten.index, aten.index_select}


@rule(*_VIEWS)
def look(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Any:
    """A view: activations share the labels with the storage; parameters have their planes viewed too."""
    source = mode.operand(args[0])
    result = func(*args, **kwargs)
    if source.parameter:
        _look_at_parameter(mode, func, args, kwargs, source, result)
    elif isinstance(result, Tensor) and source.planes:
        mode.record_rectangle(mode.operand(result).planes[0])
    return result


def _look_at_parameter(mode: LabelMode, func: Any, args: tuple, kwargs: dict, source: Operand, result: Any) -> None:
    viewing = func.overloadpacket in (aten.view, aten._unsafe_view, aten._reshape_alias)
    move = (lambda p: p.reshape(result.shape)) if viewing else (lambda p: func(p, *args[1:], **kwargs))
    moved = [move(plane) for plane in source.planes]
    if isinstance(result, Tensor):
        mode.mark_parameter(result, tuple(moved))
        for plane in moved:
            mode.record_rectangle(along(plane, varying_dims(plane)))
        return
    for i, part in enumerate(result):
        mode.mark_parameter(part, tuple(pieces[i] for pieces in moved))


@rule("view_as_complex")
def pair_up(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Tensor:
    """Two real channels become one complex channel, and are removed together."""
    source = mode.operand(args[0])
    if len(source.planes) != 1:
        return unknown(mode, func, args, kwargs)
    real, imaginary = source.planes[0].unbind(-1)
    mode.graph.unify(real, imaginary)
    return mode.mark(func(args[0].clone()), real)


@rule("view_as_real")
def split_up(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Tensor:
    """One complex channel becomes two with its label."""
    result = func(args[0].clone())
    return mode.mark(result, mode.operand(args[0]).planes[0].unsqueeze(-1).expand(result.shape))


@rule("expand", "broadcast_to")
def expand(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Tensor:
    """An expanded activation owns its copies, so that one copy can go and the others stay."""
    source = mode.operand(args[0])
    result = func(*args, **kwargs)
    if source.parameter:
        return mode.mark_parameter(result, tuple(plane.expand(result.shape) for plane in source.planes))
    offset = result.dim() - args[0].dim()
    grown = {d for d, n in enumerate(result.shape) if n > 1 and (d < offset or args[0].shape[d - offset] == 1)}
    if not grown:
        return result
    plane = source.planes[0].expand(result.shape)
    dims = grown | varying_dims(plane)
    shape = tuple(n if d in dims else 1 for d, n in enumerate(result.shape))
    return mode.mark(result.clone(), mode.graph.copies(along(plane, varying_dims(plane)), shape, False))


@rule(
    "clone", "contiguous", "cat", "stack", "repeat", "flip", "roll", "constant_pad_nd", "repeat_interleave", "copy",
    "index_select", "index", "gather", "tril", "triu", "_to_copy",
)  # fmt: skip
def move(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Any:
    """Data movement into a new tensor: labels move in the same way."""
    data, rest = args[0], args[1:]
    sources = [mode.operand(t) for t in tensors_in(data)]
    if any(mode.operand(t).planes for t in tensors_in((rest, kwargs))):
        return unknown(mode, func, args, kwargs)
    if func.overloadpacket in COPIES:
        return _convert(mode, func, args, kwargs, sources[0])
    if any(s.parameter for s in sources) and not all(len(s.planes) == 1 for s in sources if s.planes):
        return _move_parameters(mode, func, args, kwargs, sources)
    planes = [s.planes[0] if s.planes else torch.zeros(s.shape, dtype=torch.long) for s in sources]
    if func.overloadpacket is aten.constant_pad_nd:
        rest = rest[:1]  # what is padded with is a constant, whatever its value
    moved = func(planes if isinstance(data, (list, tuple)) else planes[0], *rest, **kwargs)
    result = func(*args, **kwargs)
    choice = chosen_by(mode, tensors_in((rest, kwargs))) if mode.choices else None
    if choice is not None:
        return pick(mode, result, sources[0], moved, choice)
    if func.overloadpacket in (aten.cat, aten.stack):
        _align(mode, planes, (rest[0] if rest else kwargs.get("dim", 0)) % moved.dim())
        mode.record_rectangle(moved)
    mode.mark(result, _own_duplicates(mode, planes, moved))
    return result


def _align(mode: LabelMode, planes: list[Tensor], dim: int) -> None:
    """Thin parts laid side by side keep one length. Scores and parameters beside them (sinks) go together one by one;
    of parts that are alike, one may also go whole.
    """
    known = [p for p in planes if varying_dims(p) and bool((p > LOCKED).all())]
    if len(known) < 2 or any(p.dim() > dim and dim in varying_dims(p) for p in known):
        return
    first, *others = known
    for other in others:
        if other.shape == first.shape and mode.graph.kind_of(other) != mode.graph.kind_of(first):
            mode.graph.unify(first, other)


def _convert(mode: LabelMode, func: Any, args: tuple, kwargs: dict, source: Operand) -> Tensor:
    if not source.parameter:
        return mode.mark(func(*args, **kwargs), source.planes[0])
    dtype = kwargs.get("dtype") or args[0].dtype
    return mode.mark_parameter(torch.zeros((), dtype=dtype).expand(source.shape), source.planes)


def _own_duplicates(mode: LabelMode, planes: list[Tensor], moved: Tensor) -> Tensor:
    """Where a movement repeats labels that were distinct before, each repetition is an owned copy."""
    if _all_distinct([moved]) or not _all_distinct(planes):
        return moved
    return mode.graph.copies(moved, tuple(moved.shape), False)


def _all_distinct(planes: list[Tensor]) -> bool:
    labels = np.concatenate([plane.numpy().ravel() for plane in planes])
    labels = labels[labels > LOCKED]
    return len(np.unique(labels)) == len(labels)


def _move_parameters(mode: LabelMode, func: Any, args: tuple, kwargs: dict, sources: list[Operand]) -> Any:
    """Rows taken from one table by data (an embedding), or matrices laid side by side."""
    packet = func.overloadpacket
    if packet is aten.cat and len({len(s.planes) for s in sources}) == 1:
        result = func(*args, **kwargs)
        planes = zip(*(s.planes for s in sources), strict=True)
        return mode.mark_parameter(result, tuple(func(list(ps), *args[1:], **kwargs) for ps in planes))
    if packet in (aten.index_select, aten.index) and len(sources) == 1:
        result = func(*args, **kwargs)
        moved = [func(p, *args[1:], **kwargs) for p in sources[0].planes]
        choice = chosen_by(mode, tensors_in(args[1:])) if mode.choices else None
        found = None if choice is None else look_up_chosen(mode, sources[0], result, moved, choice)
        return _looked_up(mode, sources[0], result, moved, tensors_in(args[1:])[0]) if found is None else found
    return unknown(mode, func, args, kwargs)


@rule("embedding")
def embedding(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Tensor:
    """Rows looked up by data: the rows are pinned, the columns are the channels of what comes out."""
    source = mode.operand(args[0])
    result = func(*args, **kwargs)
    if mode.operand(args[1]).planes or not source.planes:
        return unknown(mode, func, args, kwargs)
    return _looked_up(mode, source, result, [p[args[1]] for p in source.planes], args[1])


def _looked_up(mode: LabelMode, source: Operand, result: Tensor, planes: list[Tensor], index: Any) -> Tensor:
    rows = [along(p, {0}) for p in source.planes if 0 in varying_dims(p)]
    if mode.is_input(index):
        mode.token_rows += rows
    else:
        for plane in rows:
            mode.lock(plane, "rows are looked up by position, or by numbers computed from the input")
    columns = [moved for moved, p in zip(planes, source.planes, strict=True) if 0 not in varying_dims(p)]
    if len(columns) == 1:
        mode.graph.embedded.append(columns[0].flatten())
        return mode.mark(result, columns[0])
    return mode.mark(result, torch.full(result.shape, LOCKED))
