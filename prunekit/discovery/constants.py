"""Constants passed to modules: which of their entries stay when channels are removed.

ALiBi gives each head a slope of its own, and the model makes all of them and hands them to every layer. A layer that
lost heads must pick the slopes of those it kept.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

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
