"""Label rules shared by operations: move, contract, combine pointwise, reduce."""

from dataclasses import dataclass

import torch
from torch import Tensor

from prunekit.discovery.labels import PARAMETER, SCORE, STATISTIC, LabelGraph, along, varying_dims


@dataclass(frozen=True, eq=False)
class Operand:
    """A tensor as a label rule sees it.

    Attributes:
        planes: label planes of the tensor's shape; one for an activation, one a dimension for a
            parameter, none for a constant.
        shape: of the tensor.
        parameter: True where it is a parameter or made of parameters alone.
        uniform: True for a constant whose values are known to be equal (zeros, ones, a fill).
        choice: number of the choice by value that an unlabelled tensor was computed from.
    """

    planes: tuple[Tensor, ...]
    shape: torch.Size
    parameter: bool = False
    uniform: bool = False
    choice: int | None = None

    def framed(self, planes: tuple[Tensor, ...]) -> "Operand":
        """The same operand with its planes laid into another frame."""
        shape = planes[0].shape if planes else self.shape
        return Operand(planes, shape, self.parameter, self.uniform)


Laid = tuple[Tensor, frozenset[int], bool]  # a plane in the result's frame, where it varies, of a parameter or not


def combine(graph: LabelGraph, operands: list[Operand], shape: torch.Size) -> Tensor | None:
    """Pointwise: labels that meet are SAME; a label broadcast over others owns one copy for each.

    A constant that varies along labelled channels is met as a locked owner: whole slices of it
    may stay behind unused only if something else keeps them alive.

    Returns:
        The plane of the result, compact (expandable to `shape`), or None for a constant.
    """
    planes = [_laid(plane.expand(shape), op.parameter) for op in operands for plane in op.planes]
    if not planes:
        return None
    target = frozenset().union(*(dims for _, dims, _ in planes))
    for op in operands:
        if not op.planes and not op.uniform:
            planes += [_laid(pin, True) for pin in _pinned(graph, op, shape, target)]
    # an operand that varies everywhere is the result; broadcast ones are copied to its shape. Scores stay scores
    # also where a mask is as large as they are
    planes.sort(key=lambda item: (-len(item[1]), graph.kind_of(along(item[0], item[1])) != SCORE))
    return _join(graph, planes, target, shape)


def _laid(plane: Tensor, parameter: bool) -> Laid:
    return plane, varying_dims(plane), parameter


def _join(graph: LabelGraph, planes: list[Laid], target: frozenset[int], shape: torch.Size) -> Tensor:
    small = tuple(n if d in target else 1 for d, n in enumerate(shape))
    result: Tensor | None = None
    for plane, dims, parameter in planes:
        full = along(plane, target)
        if dims != target:
            full = graph.copies(along(plane, dims), small, parameter)
        if result is None:
            result = full
        else:
            graph.unify(result, full)
    assert result is not None
    return result


def _pinned(graph: LabelGraph, op: Operand, shape: torch.Size, target: frozenset[int]) -> list[Tensor]:
    """Locked nodes for a constant that has a size of its own along labelled channels."""
    offset = len(shape) - len(op.shape)
    dims = {d + offset for d, n in enumerate(op.shape) if n > 1} & target
    if not dims:
        return []
    fresh = graph.new(tuple(n if d in dims else 1 for d, n in enumerate(shape)), PARAMETER)
    graph.lock(fresh, "is multiplied with or added to a constant that differs from channel to channel")
    return [fresh.expand(shape)]


def contract(graph: LabelGraph, a: Operand, b: Operand) -> tuple[Tensor, ...]:
    """Matrix product (b, n, k) × (b, k, m): joins labels that meet along k, passes on the rest.

    Returns:
        Planes expandable to (b, n, m); several only where both are parameters, none for constants.
    """
    if not a.planes and not b.planes:
        return ()
    k, m = b.shape[-2], b.shape[-1]
    frame = torch.Size((a.shape[0], a.shape[1], k, m))  # (b, n, k, m)
    a = a.framed(tuple(p.unsqueeze(-1).expand(frame) for p in a.planes))
    b = b.framed(tuple(p.unsqueeze(1).expand(frame) for p in b.planes))
    narrow = a.shape[1] == m == 1 and bool(a.planes and b.planes)  # also where a cut has left heads one channel
    if k == 1 and not a.parameter and not b.parameter and not (narrow and _unweighed(graph, a, b)):
        if narrow:  # a score weighs copies, be it one
            a, b = (_copied(graph, op) if graph.kind_of(op.planes[0]) == SCORE else op for op in (a, b))
        joined = combine(graph, [a, b], frame)  # one position: each channel is weighed by itself
        return () if joined is None else (joined.squeeze(2),)
    a_in, a_out = _inner_and_outer(a)
    b_in, b_out = _inner_and_outer(b)
    if a_in is None or b_in is None:
        return _lock_contraction(graph, a, b)
    inner = combine(graph, [a.framed((a_in,)), b.framed((b_in,))], frame)
    assert inner is not None
    return _outer_planes(graph, inner.expand(frame), a, b, a_out + b_out, frame)


def _copied(graph: LabelGraph, op: Operand) -> Operand:
    plane = along(op.planes[0], varying_dims(op.planes[0]))
    return op.framed((graph.copies(plane, tuple(plane.shape), False).expand(op.shape),))


def _unweighed(graph: LabelGraph, a: Operand, b: Operand) -> bool:
    """Whether neither operand is a score, as where queries meet keys and a cut has left them one channel."""
    return all(graph.kind_of(op.planes[0]) != SCORE for op in (a, b) if op.planes)


def _inner_and_outer(op: Operand) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """The plane that labels the contracted dimension (2 of the frame), and the others."""
    inner = [i for i, plane in enumerate(op.planes) if 2 in varying_dims(plane)]
    if not inner and op.shape[2] == 1:
        inner = [i for i, plane in enumerate(op.planes) if not op.parameter or not varying_dims(plane)][-1:]
    if len(inner) != 1:
        return None, ()
    return op.planes[inner[0]], tuple(p for i, p in enumerate(op.planes) if i != inner[0])


def _lock_contraction(graph: LabelGraph, a: Operand, b: Operand) -> tuple[Tensor, ...]:
    for plane in a.planes + b.planes:
        graph.lock(along(plane, varying_dims(plane)), "is contracted with a tensor that carries no labels")
    return (torch.ones((1, 1, 1), dtype=torch.long),)


def _outer_planes(
    graph: LabelGraph, inner: Tensor, a: Operand, b: Operand, outer: tuple[Tensor, ...], frame: torch.Size
) -> tuple[Tensor, ...]:
    if a.parameter and b.parameter:
        return tuple(plane.narrow(2, 0, 1).squeeze(2) for plane in outer)
    rows = varying_dims(inner) - {2}
    if not outer:  # two activations: one scalar that owns the channels behind it
        small = tuple(n if d in rows else 1 for d, n in enumerate(frame))
        score = graph.new(small, SCORE)
        compact = along(inner, varying_dims(inner))
        graph.own(SCORE, score.expand(compact.shape), compact)
        return (score.squeeze(2),)
    out_shape = torch.Size((*frame[:2], 1, frame[3]))
    planes = [_laid(plane.narrow(2, 0, 1), True) for plane in outer]
    target = frozenset(rows).union(*(dims for _, dims, _ in planes))
    return (_join(graph, planes, target, out_shape).squeeze(2),)


def spread_rows(graph: LabelGraph, inner: Tensor, rows: Tensor) -> Tensor:
    """Labels (..., n_rows) of input @ matrixᵀ: the labels of the matrix's rows, copied along the input's other labels.

    Args:
        graph: where the copies are recorded.
        inner: labels of the input, whose last dimension is contracted.
        rows: labels of the matrix's rows, (n_rows,).
    """
    last = inner.dim() - 1
    target = varying_dims(inner) - {last} | varying_dims(rows.view(*[1] * last, -1))
    shape = torch.Size((*inner.shape[:-1], len(rows)))
    return _join(graph, [_laid(rows.expand(shape), True)], target, shape)


def reduce_labels(graph: LabelGraph, plane: Tensor, dims: tuple[int, ...], keepdim: bool) -> Tensor:
    """A statistic over labelled channels: no coupling, but an owner that records what it was taken over."""
    dims = tuple(d % plane.dim() for d in dims)
    varying = varying_dims(plane)
    if not varying & set(dims):
        kept = along(plane, set(range(plane.dim())) - set(dims))
    else:
        shape = tuple(n if d in varying and d not in dims else 1 for d, n in enumerate(plane.shape))
        statistic = graph.new(shape, STATISTIC)
        compact = along(plane, varying)
        graph.own(STATISTIC, statistic.expand(compact.shape), compact)
        kept = statistic.expand(tuple(1 if d in dims else n for d, n in enumerate(plane.shape)))
    if keepdim:
        return kept
    return kept.reshape([n for d, n in enumerate(kept.shape) if d not in dims])
