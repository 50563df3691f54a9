"""Taking whole layers and blocks out of a model."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from prunekit.discovery.constants import leaves
from prunekit.discovery.parts import Part
from prunekit.errors import PrunekitError


class Skipped(nn.Module):
    """Stands where a block was, and returns what the block would return with all its parameters zero.

    Args:
        part: how the block returned its result.

    Attributes:
        layer_idx: where the block kept its keys. The cache counts tokens there, so it is given a channel of zeros.
    """

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part, self.layer_idx = part, int(str(part.layer).rpartition(".")[2])

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Zeros, or the argument that the block handed on."""
        like = dict(leaves(args, kwargs))[self.part.like]
        self._count_tokens(like, (*args, *kwargs.values()))
        result = like if self.part.echo else torch.zeros_like(like)
        if not self.part.result:
            return result
        return tuple(result if i == self.part.result[0] else None for i in range(self.part.length))

    def _count_tokens(self, like: Tensor, arguments: tuple) -> None:
        for cache in arguments:
            if isinstance(cache, Cache):
                kept = cache.layers[self.layer_idx : self.layer_idx + 1]
                if all(hasattr(layer, "update") for layer in kept):  # not so for the states of linear attention
                    empty = like.new_zeros(like.shape[0], 1, like.shape[1], 1)  # (batch, head, seq, d_head)
                    cache.update(empty, empty, self.layer_idx)

    def extra_repr(self) -> str:
        """What stood here."""
        return self.part.path


def drop(model: nn.Module, parts: list[Part]) -> dict[str, str]:
    """Take layers and blocks out of a model, in place.

    Args:
        model: its modules and its configurations change, its parameters are not touched.
        parts: what goes.

    Returns:
        Path before → path after, for every layer that stays and stands elsewhere now.

    Raises:
        PrunekitError: no layer would stay.
    """
    layers = {part.path for part in parts if part.path == part.layer}
    for part in parts:
        if part.layer not in layers:
            parent, _, name = part.path.rpartition(".")
            setattr(model.get_submodule(parent), name, Skipped(part))
    if not layers:
        return {}
    n_layers = {path: len(model.get_submodule(path)._modules) for path in {_list_of(layer) for layer in layers}}
    moved = remove_elements(model, layers)
    for path, n in n_layers.items():
        kept = [i for i in range(n) if f"{path}.{i}" not in layers]
        _shorten_configurations(model, n, kept)
    return moved


def renamed(name: str, moved: dict[str, str]) -> str:
    """Where a parameter, module or group stands after list elements have moved up."""
    pieces = name.split(".")
    for i in range(len(pieces), 0, -1):
        head = ".".join(pieces[:i])
        stem, colon, kind = head.partition(":")
        if stem in moved:
            return ".".join([moved[stem] + colon + kind, *pieces[i:]])
    return name


def remove_elements(model: nn.Module, gone: set[str]) -> dict[str, str]:
    """Take elements out of lists of modules, in place; those behind them move up.

    Returns:
        Path before → path after, for every element that stands elsewhere now.

    Raises:
        PrunekitError: nothing would stay of a list.
    """
    moved: dict[str, str] = {}
    for path in sorted({_list_of(element) for element in gone}):
        elements: Any = model.get_submodule(path)
        kept = [i for i in range(len(elements)) if f"{path}.{i}" not in gone]
        if not kept:
            raise PrunekitError(f"the plan leaves nothing in {path}; keep at least one of its {len(elements)} parts")
        _renumber(list(elements), kept)
        for i in sorted(set(range(len(elements))) - set(kept), reverse=True):
            del elements[i]
        moved |= {f"{path}.{old}": f"{path}.{new}" for new, old in enumerate(kept) if new != old}
    return moved


def _list_of(element: str) -> str:
    return element.rpartition(".")[0]


def _renumber(layers: list[nn.Module], kept: list[int]) -> None:
    """Integers that equal the position wherever they stand, in two layers or more, are positions."""
    held = [
        (position, module, name, value)
        for position, layer in enumerate(layers)
        for module in layer.modules()
        for name, value in vars(module).items()
        if type(value) is int
    ]
    positions: dict[str, set[int]] = {}
    for position, _, name, _ in held:
        positions.setdefault(name, set()).add(position)
    others = {name for position, _, name, value in held if value != position}
    for position, module, name, _ in held:
        known = isinstance(module, Skipped) and name == "layer_idx"
        if position in kept and (known or (name not in others and len(positions[name]) > 1)):
            vars(module)[name] = kept.index(position)


def _shorten_configurations(model: nn.Module, n_layers: int, kept: list[int]) -> None:
    """The number of layers, and what a configuration lists layer by layer."""
    configs = {id(config): config for module in model.modules() if (config := vars(module).get("config")) is not None}
    for config in configs.values():
        if getattr(config, "num_hidden_layers", None) == n_layers:
            for name, value in list(_layer_lists(config, n_layers)):
                vars(config)[name] = type(value)(value[i] for i in kept)
            config.num_hidden_layers = len(kept)


def _layer_lists(config: Any, n_layers: int) -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    for name, value in vars(config).items():
        if isinstance(value, (list, tuple)) and len(value) == n_layers and "layer" in name:
            yield name, value
