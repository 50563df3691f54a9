"""Records where stored integers are used as sizes of views, splits and slices, as equations to solve after a cut."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from prunekit.compat import SHAPE_READ, below_autograd
from prunekit.discovery.stored_integers import Attribute, Key, Operation, Remembered

if TYPE_CHECKING:
    from prunekit.discovery.labelling import LabelMode


SHAPE = "shape"  # holder of the sizes that code reads off tensors


@dataclass(frozen=True, eq=False)
class Span:
    """A dimension of a labelled tensor, up to `stop`."""

    planes: tuple[Tensor, ...]
    dim: int
    stop: int | None = None

    def survivors(self, dead: Tensor) -> int:
        """Elements left in every line along `dim` that is not dead whole; where lines differ, in the longest.

        Args:
            dead: bool (n_nodes,).
        """
        if not self.planes[0].numel():
            return self.planes[0].shape[self.dim]
        gone = torch.zeros(self.planes[0].shape, dtype=torch.bool)
        for plane in self.planes:
            gone = gone | dead[plane]
        alive = (~gone).movedim(self.dim, 0).reshape(gone.shape[self.dim], -1)
        return int(alive[: self.stop].sum(0).amax())


@dataclass(frozen=True, eq=False)
class Equation:
    """`expression` must equal the number of surviving positions of `span`."""

    expression: Attribute | Operation
    span: Span
    where: str


class Picked(int):
    """An `int` that was read out of a choice by value, such as the number of an expert."""

    choice: int

    @classmethod
    def of(cls, value: Any, choice: int | None) -> Any:
        """Wrap an integer; any other number stays as it is."""
        if type(value) is not int or choice is None:
            return value
        number = cls(value)
        number.choice = choice
        return number


@dataclass(frozen=True, eq=False)
class _Sighting:
    number: Remembered
    tensor: Tensor
    dim: int
    stop: int | None
    where: str


def _sizes(args: tuple) -> tuple:
    return tuple(args[0]) if args and isinstance(args[0], (tuple, list)) else tuple(args)


class IntegerWatcher(TorchFunctionMode):
    """Records the uses of stored integers, and computes attention in an eager implementation."""

    def __init__(self, mode: LabelMode) -> None:
        super().__init__()
        self._mode = mode
        self._seen: list[_Sighting] = []
        self._chosen: list[Equation] = []
        self._measures: dict[Key, tuple[Tensor, int, tuple[Tensor, ...]]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            with self:
                return attention(*args, **kwargs)
        if func is Tensor.__getitem__ and self._is_choice(args[1]):  # a plain look-up would read the number out
            return args[0].index_select(0, args[1].view(1)).squeeze(0)
        if func is Tensor.__getitem__ and isinstance(args[1], Picked):
            index = self._mode.mark_chosen(torch.tensor([int(args[1])]), args[1].choice)
            return args[0].index_select(0, index).squeeze(0)
        if func is Tensor.item and self._is_choice(args[0]):
            return Picked.of(func(*args), self._mode.operand(args[0]).choice)
        if func in _PRODUCTS:
            with below_autograd():  # one operation with a rule, not the many that it is made of
                return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in _SIZE_READS:
            return self._measured(args[0], result, *_named(args, kwargs, "input", "dim")[1:])
        if func in _VALUE_READS:
            for plane in self._mode.operand(args[0]).planes:
                self._mode.lock(plane, f"its values are read by Python code ({func.__name__})")
        note = _NOTES.get(func)
        if note is not None:
            note(self, result, args, kwargs)
        return result

    def _is_choice(self, index: Any) -> bool:
        return isinstance(index, Tensor) and index.dim() == 0 and self._mode.operand(index).choice is not None

    def see_classes(self, number: Any, chosen: Tensor) -> None:
        """Record a number of classes to choose from; there may be one more than scores, for "none"."""
        choice = self._mode.operand(chosen).choice
        if isinstance(number, Remembered) and choice is not None:
            labels = self._mode.choices[choice].labels
            scored = Operation(operator.sub, number.origin, int(number) - len(labels))
            self._chosen.append(Equation(scored, Span((labels,), 0), self._mode.path))

    def see(self, number: Any, tensor: Any, dim: int, stop: int | None = None) -> None:
        """Record a size if it is a stored integer."""
        if isinstance(number, Remembered) and isinstance(tensor, Tensor):
            self._seen.append(_Sighting(number, tensor, dim, stop, self._mode.path))

    def _measured(self, tensor: Tensor, sizes: Any, dim: int | None) -> Any:
        """Make sizes of a labelled tensor change with the tensor."""
        if not self._mode.labelled(tensor):
            return sizes
        if dim is not None:
            return self._size(tensor, dim, sizes) if sizes > 1 else sizes
        return torch.Size(self._size(tensor, d, n) if n > 1 else n for d, n in enumerate(sizes))

    def _size(self, tensor: Tensor, dim: int, size: int) -> Remembered:
        key = ("", SHAPE, str(len(self._measures)))
        handed = self._mode.operand(tensor).planes if self._mode.is_handed(tensor) else ()
        self._measures[key] = (tensor, dim, handed)
        return Remembered.of(size, Attribute(key, size))

    def sizes(self) -> dict[Key, Span]:
        """The dimensions whose sizes code has read, with their labels at the end of the trace."""
        now = self._mode.operand
        return {key: Span(then or now(tensor).planes, dim) for key, (tensor, dim, then) in self._measures.items()}

    def equations(self) -> list[Equation]:
        """All uses in labelled tensors, with their labels at the end of the trace."""
        found = list(self._chosen)
        for s in self._seen:
            planes = self._mode.operand(s.tensor).planes
            if planes and any(a.key[1] != SHAPE for a in s.number.origin.attributes()):
                span = Span(planes, s.dim % s.tensor.dim(), s.stop)
                found.append(Equation(s.number.origin, span, s.where))
        return found


def _named(args: tuple, kwargs: dict, *names: str) -> list[Any]:
    """Arguments in this order, positional or by name; `self` counts as the first name."""
    bound = dict(zip(names, args, strict=False)) | kwargs
    return [bound.get(name) for name in names]


def _note_shape(watcher: IntegerWatcher, result: Any, args: tuple, kwargs: dict) -> None:
    sizes = _sizes(args[1:]) or _sizes((kwargs.get("shape") or kwargs.get("size") or (),))
    for dim, size in enumerate(sizes):
        watcher.see(size, result, dim - len(sizes))


def _note_created(watcher: IntegerWatcher, result: Any, args: tuple, kwargs: dict) -> None:
    for dim, size in enumerate(_sizes(args)):
        watcher.see(size, result, dim)


def _note_split(watcher: IntegerWatcher, result: Any, args: tuple, kwargs: dict) -> None:
    size = args[1] if len(args) > 1 else kwargs.get("split_size_or_sections", kwargs.get("split_size"))
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    for i, part in enumerate(result):
        watcher.see(size[i] if isinstance(size, (list, tuple)) else size, part, dim)


def _note_slice(watcher: IntegerWatcher, result: Any, args: tuple, kwargs: dict) -> None:
    tensor, index = args
    index = index if isinstance(index, tuple) else (index,)
    if not any(isinstance(i, slice) for i in index) or any(isinstance(i, (list, Tensor)) for i in index):
        return
    used = sum(i is not None and i is not Ellipsis for i in index)
    dim = 0
    for i in index:
        if i is Ellipsis:
            dim += tensor.dim() - used
        elif i is not None:
            for end in (i.start, i.stop) if isinstance(i, slice) else ():
                watcher.see(end, tensor, dim, int(end) if isinstance(end, Remembered) else None)
            dim += 1


def _note_narrow(watcher: IntegerWatcher, result: Any, args: tuple, kwargs: dict) -> None:
    tensor, dim, start, length = _named(args, kwargs, "input", "dim", "start", "length")
    watcher.see(length, result, dim)
    watcher.see(start, tensor, dim, int(start))


def _note_norm(watcher: IntegerWatcher, result: Any, args: tuple, kwargs: dict) -> None:
    source, shape = _named(args, kwargs, "input", "normalized_shape")
    for dim, size in enumerate(shape):
        watcher.see(size, source, dim - len(shape))


def _note_unflatten(watcher: IntegerWatcher, result: Any, args: tuple, kwargs: dict) -> None:
    tensor, dim, sizes = _named(args, kwargs, "input", "dim", "sizes")
    for i, size in enumerate(sizes):
        watcher.see(size, result, dim % tensor.dim() + i)


def _note_one_hot(watcher: IntegerWatcher, result: Any, args: tuple, kwargs: dict) -> None:
    chosen, number = _named(args, kwargs, "tensor", "num_classes")
    watcher.see_classes(number, chosen)


_PRODUCTS = {functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__}

_VALUE_READS = {Tensor.tolist, Tensor.numpy, Tensor.__array__}  # these pass by the operations

_SIZE_READS = {SHAPE_READ, Tensor.size}

_NOTES: dict[Any, Callable[[IntegerWatcher, Any, tuple, dict], None]] = {
    **dict.fromkeys(
        (Tensor.view, Tensor.reshape, torch.reshape, Tensor.expand, torch.broadcast_to, Tensor.new_zeros,
         Tensor.new_empty, Tensor.new_ones), _note_shape,
    ),
    **dict.fromkeys((torch.zeros, torch.empty, torch.ones), _note_created),
    **dict.fromkeys((Tensor.split, torch.split, torch.functional.split, Tensor.split_with_sizes), _note_split),
    **dict.fromkeys((functional.layer_norm, functional.rms_norm), _note_norm),
    **dict.fromkeys((Tensor.narrow, torch.narrow), _note_narrow),
    **dict.fromkeys((Tensor.unflatten, torch.unflatten), _note_unflatten),
    Tensor.__getitem__: _note_slice,
    functional.one_hot: _note_one_hot,
}  # fmt: skip


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Eager scaled dot-product attention, so that labels can follow it.

    Args:
        query: (..., n_heads, seq, d_head).
        key: (..., n_kv_heads, seq, d_head).
        value: (..., n_kv_heads, seq, d_head).
        attn_mask: added to the scores; where a boolean mask is False, scores are masked.
        dropout_p: ignored: the trace runs in evaluation mode.
        is_causal: ignored: there is one token.
        scale: of the scores; 1/√d_head by default. Labels do not depend on it, but the proof of a cut does.
        enable_gqa: repeat key and value heads up to the number of query heads.
    """
    if enable_gqa and key.size(-3) != query.size(-3):
        repeats = query.size(-3) // key.size(-3)
        key, value = (_repeat_heads(t, repeats) for t in (key, value))
    scores = query @ key.transpose(-2, -1)
    scores = scores * (query.size(-1) ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -1.0) if attn_mask.dtype == torch.bool else scores + attn_mask
    return torch.softmax(scores, -1) @ value


def _repeat_heads(heads: Tensor, repeats: int) -> Tensor:
    shape = heads.shape  # (..., n_kv_heads, seq, d_head)
    wide = heads.unsqueeze(-3).expand(*shape[:-2], repeats, *shape[-2:])
    return wide.reshape(*shape[:-3], shape[-3] * repeats, *shape[-2:])
