"""Constants passed to modules, and buffers: which of their entries belong to which channels, and stay with them.

ALiBi gives each head a slope of its own, and the model makes all of them and passes them to every layer. A layer that
lost heads must pick the slopes of those it kept. A buffer, such as a router's correction bias, gets labels when
labelled channels first meet it, and is then cut with them. Until then it is only followed: a rotary frequency that no
channel meets in its own module stays a constant.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.compat import storage_key
from prunekit.errors import PrunekitError

Where = tuple[Any, ...]  # (position or keyword, then positions inside tuples)


LARGEST = 2**17  # elements; larger constants have no labels, so channels that meet them are locked


@dataclass(frozen=True)
class Argument:
    """A constant tensor among a module's arguments.

    Attributes:
        path: of the module.
        where: position or keyword, then positions inside nested tuples.
        shape: of the tensor when one token runs.
    """

    path: str
    where: Where
    shape: tuple[int, ...]


def constants_among(args: tuple, kwargs: dict) -> Iterator[tuple[Where, Tensor]]:
    """Tensors with more than one element, and their places."""
    for where, tensor in leaves(args, kwargs):
        if n_stored(tensor) > 1 and tensor.numel() <= LARGEST and not isinstance(tensor, nn.Parameter):
            yield where, tensor


def n_stored(tensor: Tensor) -> int:
    """Elements of a tensor, expanded ones counted once."""
    return math.prod([n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step])


def leaves(args: tuple, kwargs: dict) -> Iterator[tuple[Where, Tensor]]:
    """All tensors among arguments, and their places."""
    for key, value in (*enumerate(args), *kwargs.items()):
        yield from _leaves((key,), value)


def _leaves(where: Where, value: Any) -> Iterator[tuple[Where, Tensor]]:
    if isinstance(value, Tensor):
        yield where, value
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from _leaves((*where, i), item)


@dataclass(frozen=True)
class Selection:
    """A forward pre-hook that picks, from an argument, the entries of the units that a module kept.

    Attributes:
        argument: which one.
        dim: dimension to pick along.
        keep: ascending positions that stay.
    """

    argument: Argument
    dim: int
    keep: tuple[int, ...]

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments with the selected one made smaller."""
        key, *inner = self.argument.where
        if isinstance(key, int):
            if key < len(args):
                args = (*args[:key], self._within(args[key], inner), *args[key + 1 :])
        elif key in kwargs:
            kwargs = {**kwargs, key: self._within(kwargs[key], inner)}
        return args, kwargs

    def _within(self, value: Any, inner: list[int]) -> Any:
        if not inner:
            return value if value is None else self._select(value)
        first, *rest = inner
        return type(value)(self._within(item, rest) if i == first else item for i, item in enumerate(value))

    def _select(self, tensor: Tensor) -> Tensor:
        """Along the dimension; where a batch was folded into it, sequence by sequence."""
        dim, size = self.dim, self.argument.shape[self.dim]
        if tensor.shape[dim] % size:
            raise PrunekitError(
                f"{self.argument.path} was given a tensor of size {tensor.shape[dim]} along dimension {dim}, "
                f"where a multiple of {size} is needed: one for each head of the uncut model"
            )
        index = torch.tensor(self.keep, device=tensor.device)
        folded = tensor.unflatten(dim, (-1, size))
        return folded.index_select(dim + 1, index).flatten(dim, dim + 1)


def select(module: nn.Module, chosen: Selection) -> None:
    """Make a module select entries of an argument, out of any earlier selection."""
    hooks = module._forward_pre_hooks
    for key, hook in hooks.items():
        if isinstance(hook, Selection) and (hook.argument.where, hook.dim) == (chosen.argument.where, chosen.dim):
            hooks[key] = replace(chosen, keep=tuple(i for i in hook.keep if i in chosen.keep))
            return
    module.register_forward_pre_hook(chosen, with_kwargs=True)


# --- buffers ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Followed:
    """Memory whose numbers come from a buffer, one from one.

    Attributes:
        name: of the buffer.
        entries: int64 (n,), which entry of the buffer stands at each place of the memory.
        storage: the memory; it lives on, so that its key is given to no other.
        own: whether it is the buffer's own memory and not a copy.
    """

    name: str
    entries: Tensor
    storage: torch.UntypedStorage
    own: bool


class Buffers:
    """Follows the entries of buffers through views, copies, and operations with single numbers.

    Attributes:
        shapes: name → shape.
    """

    def __init__(self) -> None:
        self.shapes: dict[str, torch.Size] = {}
        self._followed: dict[int, Followed] = {}

    def follow(self, name: str, buffer: Tensor) -> Tensor:
        """Begin with a buffer; very large ones stay constants."""
        if 1 < n_stored(buffer) == buffer.numel() <= LARGEST:
            self.shapes[name] = buffer.shape
            self._note(buffer, name, torch.arange(buffer.numel()).view(buffer.shape), own=True)
        return buffer

    def follow_result(self, tensors: Sequence[Tensor], result: object) -> None:
        """Go on with the result of an operation on one followed tensor, or on that and single numbers."""
        if not self._followed or not isinstance(result, Tensor):
            return
        several = [tensor for tensor in tensors if tensor.numel() != 1]
        source = self.found(several[0]) if len(several) == 1 else None
        if source is None or several[0].numel() != result.numel() or self.found(result) is not None:
            return
        if several[0].squeeze().shape == result.squeeze().shape:
            entries = _laid(source.entries, several[0]).reshape(result.shape)
            self._note(result, source.name, entries, own=False)

    def found(self, tensor: Tensor) -> Followed | None:
        """What a tensor's memory comes from; None where that is no buffer."""
        return self._followed.get(storage_key(tensor.untyped_storage()))

    def _note(self, tensor: Tensor, name: str, entries: Tensor, *, own: bool) -> None:
        storage = tensor.untyped_storage()
        flat = torch.zeros(storage.nbytes() // tensor.element_size(), dtype=torch.long)
        _laid(flat, tensor).copy_(entries)
        self._followed[storage_key(storage)] = Followed(name, flat, storage, own)


def _laid(flat: Tensor, tensor: Tensor) -> Tensor:
    """Numbers of the places of some memory, in the form of a tensor that views it."""
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
