"""Which rule each operation follows. What has no rule locks everything it touches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from prunekit.discovery.choices import choose, chosen_by, look_up_chosen, pick
from prunekit.discovery.labels import CONSTANT, LOCKED, STATISTIC, along, varying_dims
from prunekit.discovery.rules import Operand, combine, contract, reduce_labels, spread_rows

if TYPE_CHECKING:
    from prunekit.discovery.tracing import LabelMode

aten = torch.ops.aten


@dataclass(frozen=True)
class Rule:
    """What to do for an operation; `always` also where no argument carries labels."""

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


def tensors_in(tree: Any) -> list[Tensor]:  # noqa: ANN401
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
def create(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Tensor:  # noqa: ANN401
    """A fresh constant of equal values, whatever the labels of the tensor it takes its shape from."""
    return mode.mark_uniform(func(*args, **kwargs))


# --- movement -----------------------------------------------------------------------------------


@rule(
    "view", "_unsafe_view", "reshape", "_reshape_alias", "unflatten", "t", "transpose", "permute", "slice", "select",
    "split", "split_with_sizes", "chunk", "unbind", "unsqueeze", "squeeze", "narrow", "detach", "alias", "diagonal",
    "as_strided", "movedim", "swapaxes", "swapdims", "lift_fresh", "numpy_T", "mT",
)  # fmt: skip
def look(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Any:  # noqa: ANN401
    """A view: activations share the labels with the storage; parameters have their planes viewed too."""
    source = mode.operand(args[0])
    result = func(*args, **kwargs)
    if source.parameter:
        _look_at_parameter(mode, func, args, kwargs, source, result)
    elif isinstance(result, Tensor) and source.planes:
        mode.record_rectangle(mode.operand(result).planes[0])
    return result


def _look_at_parameter(mode: LabelMode, func: Any, args: tuple, kwargs: dict, source: Operand, result: Any) -> None:  # noqa: ANN401
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
def pair_up(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Tensor:  # noqa: ANN401
    """Two channels become one complex one: they go together from here on."""
    source = mode.operand(args[0])
    if len(source.planes) != 1:
        return unknown(mode, func, args, kwargs)
    real, imaginary = source.planes[0].unbind(-1)
    mode.graph.unify(real, imaginary)
    return mode.mark(func(args[0].clone()), real)


@rule("view_as_real")
def split_up(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Tensor:  # noqa: ANN401
    """One complex channel becomes two that bear its label."""
    result = func(args[0].clone())
    return mode.mark(result, mode.operand(args[0]).planes[0].unsqueeze(-1).expand(result.shape))


@rule("expand", "broadcast_to")
def expand(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Tensor:  # noqa: ANN401
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
def move(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Any:  # noqa: ANN401
    """Data movement into a new tensor: the same movement of the labels."""
    data, rest = args[0], args[1:]
    sources = [mode.operand(t) for t in tensors_in(data)]
    if any(mode.operand(t).planes for t in tensors_in((rest, kwargs))):
        return unknown(mode, func, args, kwargs)
    if func.overloadpacket in (aten._to_copy, aten.clone):
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


def _convert(mode: LabelMode, func: Any, args: tuple, kwargs: dict, source: Operand) -> Tensor:  # noqa: ANN401
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


def _move_parameters(mode: LabelMode, func: Any, args: tuple, kwargs: dict, sources: list[Operand]) -> Any:  # noqa: ANN401
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
def embedding(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Tensor:  # noqa: ANN401
    """Rows looked up by data: the rows are pinned, the columns are the channels of what comes out."""
    source = mode.operand(args[0])
    result = func(*args, **kwargs)
    if mode.operand(args[1]).planes or not source.planes:
        return unknown(mode, func, args, kwargs)
    return _looked_up(mode, source, result, [p[args[1]] for p in source.planes], args[1])


def _looked_up(mode: LabelMode, source: Operand, result: Tensor, planes: list[Tensor], index: Any) -> Tensor:  # noqa: ANN401
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


@rule("mm", "bmm")
def matrix_product(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Tensor:  # noqa: ANN401
    """A @ b. The numbers are not computed: nothing reads them."""
    return _product(mode, mode.operand(args[0]), mode.operand(args[1]), None, args[0])


@rule("addmm", "baddbmm")
def biased_matrix_product(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Tensor:  # noqa: ANN401
    """Bias + a @ b; with beta = 0 the bias is not read."""
    bias = None if kwargs.get("beta", 1) == 0 else mode.operand(args[0])
    return _product(mode, mode.operand(args[1]), mode.operand(args[2]), bias, args[1])


@rule("linear")
def linear(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Any:  # noqa: ANN401
    """Input @ weightᵀ + bias in one step, where the weight is a plain matrix of rows and columns."""
    source, weight = mode.operand(args[0]), mode.operand(args[1])
    plain = [varying_dims(plane) for plane in weight.planes] == [{0}, {1}]
    last = len(source.shape) - 1
    if source.parameter or not plain or not any(last in varying_dims(plane) for plane in source.planes):
        return unknown(mode, func, args, kwargs)
    rows, columns = weight.planes[0][:, 0], weight.planes[1][0]
    inner = combine(mode.graph, [source, Operand((columns,), columns.shape, True)], source.shape)
    assert inner is not None
    shape = torch.Size((*source.shape[:-1], len(rows)))
    operands = [Operand((spread_rows(mode.graph, inner, rows),), shape), *map(mode.operand, tensors_in(args[2:]))]
    return mode.mark(torch.zeros(shape, dtype=args[0].dtype), combine(mode.graph, operands, shape))


@rule("matmul")
def activations_product(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Any:  # noqa: ANN401
    """A @ b in one step, where both are activations with the same leading dimensions."""
    a, b = operands = [mode.operand(t) for t in args]
    if not all(op.planes and not op.parameter for op in operands) or not a.shape[:-2] == b.shape[:-2] != ():
        return unknown(mode, func, args, kwargs)
    for op in operands:
        mode.record_rectangle(op.planes[0])
    shape = torch.Size((*a.shape[:-1], b.shape[-1]))
    planes = contract(mode.graph, *(op.framed((op.planes[0].flatten(0, -3),)) for op in operands))
    plane = planes[0].expand(shape[:-2].numel(), *shape[-2:])
    return mode.mark(torch.zeros(shape, dtype=args[0].dtype), plane.reshape(shape))


# --- pointwise and reductions -------------------------------------------------------------------

_LINEAR = {aten.add, aten.sub, aten.neg, aten.add_, aten.sub_, aten.rsub, aten.mul, aten.mul_, aten.div, aten.div_}


@rule("pointwise", "native_dropout", "where", "masked_fill", "masked_fill_")
def pointwise(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Any:  # noqa: ANN401
    """Channels that meet are one channel."""
    operands = [mode.operand(t) for t in tensors_in((args, kwargs))]
    if any(len(op.planes) > 1 for op in operands) and not any(op.planes and not op.parameter for op in operands):
        return _pointwise_parameters(mode, func, args, kwargs, operands)
    result = func(*args, **kwargs)
    if not isinstance(result, Tensor):
        return unknown(mode, func, args, kwargs)
    plane = combine(mode.graph, operands, result.shape)
    if plane is not None and _is_nonlinear(mode, func, operands):
        mode.graph.nonlinear.append(plane.flatten())
    if plane is not None and all(op.parameter or len(op.shape) == 0 for op in operands):
        return mode.mark_parameter(result, (plane.expand(result.shape),))
    return mode.mark(result, plane)


def _is_nonlinear(mode: LabelMode, func: Any, operands: list[Operand]) -> bool:  # noqa: ANN401
    packet = func.overloadpacket
    if packet not in _LINEAR:
        return True
    if packet not in (aten.mul, aten.mul_, aten.div, aten.div_):
        return False
    activations = [op for op in operands if op.planes and not op.parameter]
    return len(activations) > 1 and all(mode.graph.kind_of(op.planes[0]) != STATISTIC for op in activations)


def _pointwise_parameters(mode: LabelMode, func: Any, args: tuple, kwargs: dict, operands: list[Operand]) -> Any:  # noqa: ANN401
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
def reduction(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Any:  # noqa: ANN401
    """A statistic over channels."""
    if torch.Tag.pointwise in func.tags:  # the larger of two tensors
        return pointwise(mode, func, args, kwargs)
    source = mode.operand(args[0])
    result = func(*args, **kwargs)
    if len(source.planes) != 1:
        return unknown(mode, func, args, kwargs)
    names = [argument.name for argument in func._schema.arguments]
    bound = dict(zip(names, args, strict=False)) | kwargs
    dims = bound.get("dim")
    dims = (dims,) if isinstance(dims, int) else tuple(dims or range(len(source.shape)))
    statistic = reduce_labels(mode.graph, source.planes[0], dims, bool(bound.get("keepdim")))
    for tensor in tensors_in(result):  # extremes come with their positions
        mode.mark(tensor, statistic)
    return result


@rule("_softmax", "_log_softmax", "softmax", "_safe_softmax")
def softmax(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Tensor:  # noqa: ANN401
    """Channel for channel; over labelled channels it is also a statistic."""
    source = mode.operand(args[0])
    plane = source.planes[0]
    reduce_labels(mode.graph, plane, (args[1],), True)
    mode.graph.nonlinear.append(plane.flatten())
    return mode.mark(func(*args, **kwargs), plane)


@rule("native_layer_norm", "_fused_rms_norm")
def norm(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Any:  # noqa: ANN401
    """A statistic over the last dimensions, then scale and shift, channel for channel."""
    source, result = mode.operand(args[0]), func(*args, **kwargs)
    affine = [mode.operand(t) for t in tensors_in(args[2:4])]
    dims = tuple(range(-len(args[1]), 0))
    statistic = reduce_labels(mode.graph, source.planes[0], dims, True)
    operands = [source, Operand((statistic,), statistic.shape), *affine]
    mode.mark(result[0], combine(mode.graph, operands, source.shape))
    return result


@rule("topk")
def topk(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Any:  # noqa: ANN401
    """A choice by value."""
    return choose(mode, func, args, kwargs, unknown)


# --- writes in place ----------------------------------------------------------------------------


@rule("copy_", "fill_", "zero_")
def overwrite(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Tensor:  # noqa: ANN401
    """What is written brings its labels with it."""
    if mode.operand(args[0]).parameter:
        return unknown(mode, func, args, kwargs)
    written = tensors_in(args[1:])
    plane = mode.operand(written[0]).planes[:1] if written else ()
    result = func(*args, **kwargs)
    source = plane[0] if plane else torch.full((), CONSTANT)
    mode.mark(args[0], source)
    return result


@rule("index_add_", "index_add")
def add_at(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Tensor:  # noqa: ANN401
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


def unknown(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Any:  # noqa: ANN401
    """No rule: decompose it if torch can; else what goes in is locked, and what comes out counts as locked."""
    with mode:
        decomposed = func.decompose(*args, **kwargs)
    if decomposed is not NotImplemented:
        return decomposed
    for tensor in tensors_in((args, kwargs)):
        for plane in mode.operand(tensor).planes:
            mode.lock(along(plane, varying_dims(plane)), f"{func.overloadpacket.__name__} is not understood")
    result = func(*args, **kwargs)
    for tensor in tensors_in(result):
        if not mode.operand(tensor).parameter and tensor.numel():
            mode.mark(tensor, torch.full((), LOCKED))
    return result


@rule("_local_scalar_dense", "is_nonzero", "item")
def read_out(mode: LabelMode, func: Any, args: tuple, kwargs: dict) -> Any:  # noqa: ANN401
    """A value that leaves the trace may decide anything."""
    for plane in mode.operand(args[0]).planes:
        mode.lock(plane, "its value is read by Python code")
    return func(*args, **kwargs)
