"""Label rules of arithmetic: matrix products, pointwise operations, reductions, norms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunekit.compat import argument_names
from prunekit.discovery.labels import STATISTIC, varying_dims
from prunekit.discovery.operations import aten, rule, tensors_in, unknown
from prunekit.discovery.rules import Operand, combine, contract, reduce_labels, spread_rows

if TYPE_CHECKING:
    from prunekit.discovery.labelling import LabelMode

# --- products -----------------------------------------------------------------------------------


def _multiply(mode: LabelMode, a: Operand, b: Operand) -> tuple[Tensor, ...]:
    """Two- or three-dimensional matrix product; planes of the result's own shape."""
    if len(a.shape) == 3:
        return contract(mode.graph, a, b)
    return tuple(p.squeeze(0) for p in contract(mode.graph, _as_batch(a), _as_batch(b)))


def _as_batch(op: Operand) -> Operand:
    return Operand(tuple(p.unsqueeze(0) for p in op.planes), torch.Size((1, *op.shape)), op.parameter)


def _product(mode: LabelMode, a: Operand, b: Operand, bias: Operand | None, like: Tensor) -> Tensor:
    shape = torch.Size((*a.shape[:-1], b.shape[-1]))
    planes = tuple(p.expand(shape) for p in _multiply(mode, a, b))
    if a.parameter and b.parameter:
        return mode.mark_parameter(torch.zeros((), dtype=like.dtype).expand(shape), planes)
    if bias is not None:
        plane = combine(mode.graph, [Operand(planes, shape), bias], shape)
        planes = () if plane is None else (plane,)
    return mode.mark(torch.zeros(shape, dtype=like.dtype), planes[0] if planes else None)


def _with_numbers(
    mode: LabelMode, product: Tensor, func: Any, args: tuple, factors: tuple, kwargs: dict | None = None
) -> Tensor:
    """Numbers of a product are zeros, as parameters are. Where no factor is, its channels add something when zeroed."""
    if all(bool(factor.any()) for factor in factors):
        for plane in (plane for factor in factors for plane in mode.operand(factor).planes):
            reduce_labels(mode.graph, plane, tuple(varying_dims(plane)), True)
        product.copy_(func(*args, **(kwargs or {})))
    return product


@rule("mm", "bmm")
def matrix_product(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Tensor:
    """A @ b."""
    product = _product(mode, mode.operand(args[0]), mode.operand(args[1]), None, args[0])
    return _with_numbers(mode, product, func, args, args[:2])


@rule("addmm", "baddbmm")
def biased_matrix_product(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Tensor:
    """Bias + a @ b; with beta = 0 the bias is not read."""
    bias = None if kwargs.get("beta", 1) == 0 else mode.operand(args[0])
    product = _product(mode, mode.operand(args[1]), mode.operand(args[2]), bias, args[1])
    return _with_numbers(mode, product, func, args, args[1:3], kwargs)


@rule("linear")
def linear(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Any:
    """Input @ weightᵀ + bias in one step, where the weight is a plain matrix of rows and columns."""
    source, weight = mode.operand(args[0]), mode.operand(args[1])
    wide = [{d} if n > 1 else set() for d, n in enumerate(weight.shape)]
    plain = any(wide) and [varying_dims(plane) for plane in weight.planes] == wide
    if source.parameter or not plain or not any(map(_tells_last, source.planes)):
        return unknown(mode, func, args, kwargs)
    rows, columns = weight.planes[0][:, 0], weight.planes[1][0]
    inner = combine(mode.graph, [source, Operand((columns,), columns.shape, True)], source.shape)
    assert inner is not None
    shape = torch.Size((*source.shape[:-1], len(rows)))
    operands = [Operand((spread_rows(mode.graph, inner, rows),), shape), *map(mode.operand, tensors_in(args[2:]))]
    return mode.mark(torch.zeros(shape, dtype=args[0].dtype), combine(mode.graph, operands, shape))


def _tells_last(plane: Tensor) -> bool:
    """Whether a plane labels each channel of the last dimension, or there is only one channel."""
    dims, last = varying_dims(plane), plane.dim() - 1
    return last in dims or (plane.shape[last] == 1 and not dims)


@rule("matmul")
def activations_product(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Any:
    """A @ b in one step, where both are activations with the same leading dimensions."""
    a, b = operands = [mode.operand(t) for t in args]
    if not all(op.planes and not op.parameter for op in operands) or not a.shape[:-2] == b.shape[:-2] != ():
        return unknown(mode, func, args, kwargs)
    for op in operands:
        mode.record_rectangle(op.planes[0])
    shape = torch.Size((*a.shape[:-1], b.shape[-1]))
    planes = contract(mode.graph, *(op.framed((op.planes[0].flatten(0, -3),)) for op in operands))
    plane = planes[0].expand(shape[:-2].numel(), *shape[-2:])
    product = mode.mark(torch.zeros(shape, dtype=args[0].dtype), plane.reshape(shape))
    return _with_numbers(mode, product, func, args, args)


# --- pointwise and reductions -------------------------------------------------------------------

_LINEAR = {aten.add, aten.sub, aten.neg, aten.add_, aten.sub_, aten.rsub, aten.mul, aten.mul_, aten.div, aten.div_}


@rule("pointwise", "native_dropout", "where", "masked_fill", "masked_fill_")
def pointwise(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Any:
    """Pointwise operations: channels that meet become one."""
    operands = [mode.operand(t) for t in tensors_in((args, kwargs))]
    if any(len(op.planes) > 1 for op in operands) and not any(op.planes and not op.parameter for op in operands):
        return _pointwise_parameters(mode, func, args, kwargs, operands)
    result = func(*args, **kwargs)
    if not isinstance(result, Tensor):
        return unknown(mode, func, args, kwargs)
    plane = combine(mode.graph, operands, result.shape)
    if plane is not None:
        mode.graph.take_part(plane)
    if plane is not None and _is_nonlinear(mode, func, operands):
        mode.graph.nonlinear.append(plane.flatten())
    if plane is not None and all(op.parameter or len(op.shape) == 0 for op in operands):
        return mode.mark_parameter(result, (plane.expand(result.shape),))
    return mode.mark(result, plane)


def _is_nonlinear(mode: LabelMode, func: Any, operands: list[Operand]) -> bool:
    packet = func.overloadpacket
    if packet not in _LINEAR:
        return True
    if packet not in (aten.mul, aten.mul_, aten.div, aten.div_):
        return False
    activations = [op for op in operands if op.planes and not op.parameter]
    return len(activations) > 1 and all(mode.graph.kind_of(op.planes[0]) != STATISTIC for op in activations)


def _pointwise_parameters(mode: LabelMode, func: Any, args: tuple, kwargs: dict, operands: list[Operand]) -> Any:
    """Matrices added or scaled before they are used: dimension by dimension."""
    labelled = [op for op in operands if op.planes]
    ranks = {len(op.planes) for op in labelled}
    plain = all(op.planes or op.uniform for op in operands)
    if len(ranks) != 1 or not plain or not all(op.parameter for op in labelled):
        return unknown(mode, func, args, kwargs)
    shape = labelled[0].shape
    joined = []
    for planes in zip(*(op.planes for op in labelled), strict=True):
        plane = combine(mode.graph, [Operand((p,), p.shape, True) for p in planes], shape)
        assert plane is not None
        joined.append(plane.expand(shape))
    return mode.mark_parameter(torch.zeros((), dtype=tensors_in(args)[0].dtype).expand(shape), tuple(joined))


@rule("mean", "sum", "var", "std", "amax", "amin", "max", "min", "linalg_vector_norm", "norm", "logsumexp", "prod")
def reduction(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Any:
    """A statistic over channels."""
    if torch.Tag.pointwise in func.tags:  # the larger of two tensors
        return pointwise(mode, func, args, kwargs)
    source = mode.operand(args[0])
    result = func(*args, **kwargs)
    if len(source.planes) != 1:
        return unknown(mode, func, args, kwargs)
    bound = dict(zip(argument_names(func), args, strict=False)) | kwargs
    dims = bound.get("dim")
    dims = (dims,) if isinstance(dims, int) else tuple(dims or range(len(source.shape)))
    statistic = reduce_labels(mode.graph, source.planes[0], dims, bool(bound.get("keepdim")))
    for tensor in tensors_in(result):  # extremes come with their positions
        mode.mark(tensor, statistic)
    return result


@rule("_softmax", "_log_softmax", "softmax", "_safe_softmax")
def softmax(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Tensor:
    """Channel for channel; over labelled channels it is also a statistic."""
    source = mode.operand(args[0])
    plane = source.planes[0]
    reduce_labels(mode.graph, plane, (args[1],), True)
    mode.graph.nonlinear.append(plane.flatten())
    return mode.mark(func(*args, **kwargs), plane)


@rule("native_layer_norm", "_fused_rms_norm")
def norm(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Any:
    """A statistic over the last dimensions, then scale and shift, channel for channel."""
    source, result = mode.operand(args[0]), func(*args, **kwargs)
    affine = [mode.operand(t) for t in tensors_in(args[2:4])]
    dims = tuple(range(-len(args[1]), 0))
    statistic = reduce_labels(mode.graph, source.planes[0], dims, True)
    operands = [source, Operand((statistic,), statistic.shape), *affine]
    mode.mark(result[0], combine(mode.graph, operands, source.shape))
    return result
