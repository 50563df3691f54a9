"""Makes a model smaller: removes layers, blocks and list elements, and slices parameters and buffers."""

import copy
import inspect
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig

from prunekit.discovery.constants import leaves
from prunekit.discovery.parts import Part
from prunekit.errors import PrunekitError, reason
from prunekit.models import configurations_of

Keep = dict[tuple[str, int], Tensor]  # (parameter, dim) → ascending indices that stay


class Skipped(nn.Module):
    """Replaces a removed block, and returns what the block returns with all parameters zero.

    Args:
        part: how the block returned its result.
        writes: whether the block wrote keys to the cache. The cache counts tokens there, so it is given a channel of
            zeros.

    Attributes:
        layer_idx: where the block kept its keys.
    """

    def __init__(self, part: Part, writes: bool) -> None:
        super().__init__()
        self.part, self.writes, self.layer_idx = part, writes, int(str(part.layer).rpartition(".")[2])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros, or the argument that the block passes through."""
        like = dict(leaves(args, kwargs))[self.part.like]
        if self.writes:
            self._count_tokens(like, (*args, *kwargs.values()))
        result = like if self.part.echo else torch.zeros_like(like)
        if not self.part.result:
            return result
        return tuple(result if i == self.part.result[0] else None for i in range(self.part.length))

    def _count_tokens(self, like: Tensor, arguments: tuple) -> None:
        for cache in arguments:
            if isinstance(cache, Cache):
                empty = like.new_zeros(like.shape[0], 1, like.shape[1], 1)  # (batch, head, seq, d_head)
                cache.update(empty, empty, self.layer_idx)

    def extra_repr(self) -> str:
        """Name of the replaced block."""
        return self.part.path


def drop(model: nn.Module, parts: list[Part], writers: set[str]) -> dict[str, str]:
    """Remove layers and blocks from a model, in place.

    Args:
        model: its modules and its configurations change, its parameters are not touched.
        parts: what goes.
        writers: paths of the blocks that write keys to a cache.

    Returns:
        Path before → path after, for every layer that stays and stands elsewhere now.

    Raises:
        PrunekitError: no layer would stay, or the configuration cannot express the remaining layers.
    """
    layers = {part.path for part in parts if part.path == part.layer}
    for part in parts:
        if part.layer not in layers:
            parent, _, name = part.path.rpartition(".")
            setattr(model.get_submodule(parent), name, Skipped(part, part.path in writers))
    if not layers:
        return {}
    n_layers = {path: len(model.get_submodule(path)._modules) for path in {_list_of(layer) for layer in layers}}
    moved = remove_elements(model, layers)
    for path, n in n_layers.items():
        kept = [i for i in range(n) if f"{path}.{i}" not in layers]
        _shorten_configurations(_configurations_around(model, path), n, kept)
    return moved


def renamed(name: str, moved: dict[str, str]) -> str:
    """New name of a parameter, module or group after list elements have moved up."""
    pieces = name.split(".")
    for i in range(len(pieces), 0, -1):
        head = ".".join(pieces[:i])
        stem, colon, kind = head.partition(":")
        if stem in moved:
            return ".".join([moved[stem] + colon + kind, *pieces[i:]])
    return name


def remove_elements(model: nn.Module, gone: set[str]) -> dict[str, str]:
    """Remove elements from lists of modules, in place; later ones move up.

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
    """Integers that equal the layer's position in two or more layers are layer numbers."""
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


def _configurations_around(model: nn.Module, path: str) -> list[Any]:
    """The configurations of the modules that a list of layers lies in, and of its elements; no other tower's."""
    above = [module for name, module in model.named_modules() if f"{path}.".startswith(f"{name}." if name else "")]
    held = [vars(module).get("config") for module in above]
    return list({id(c): c for c in (*held, *configurations_of(model.get_submodule(path))) if c is not None}.values())


def _shorten_configurations(configs: list[Any], n_layers: int, kept: list[int]) -> None:
    """The number of layers, and the layer-wise fields of configurations."""
    for config in configs:
        if getattr(config, "num_hidden_layers", None) == n_layers:
            computed = {name: [value[i] for i in kept] for name, value in _computed_lists(config, n_layers)}
            for name, value in list(layer_lists(config, n_layers)):
                vars(config)[name] = type(value)(value[i] for i in kept)
            config.num_hidden_layers = len(kept)
            for name, expected in computed.items():
                _check_computed(config, name, expected)


def layer_lists(config: Any, n_layers: int) -> Iterator[tuple[str, Any]]:
    """Layer-wise fields of a configuration, with their values."""
    for name, value in vars(config).items():
        if isinstance(value, (list, tuple)) and len(value) == n_layers and "layer" in name:
            yield name, value


def _computed_lists(config: Any, n_layers: int) -> Iterator[tuple[str, Any]]:
    """As `layer_lists`, of what is no field but follows from others, such as a period."""
    for name, member in inspect.getmembers_static(type(config)):
        own = isinstance(member, property) and not hasattr(PreTrainedConfig, name)  # all families have deprecated ones
        value = _answer(config, name) if own else None
        if isinstance(value, (list, tuple)) and len(value) == n_layers:
            yield name, value


def _answer(config: Any, name: str) -> Any:
    try:
        return getattr(config, name)
    except Exception:  # whatever a property raises where it does not apply
        return None


def _check_computed(config: Any, name: str, expected: list[Any]) -> None:
    """Masks and caches are made from such lists, so that one which is off gives wrong logits."""
    pairs = enumerate(zip_longest(_answer(config, name) or (), expected))
    wrong = next(((number, *pair) for number, pair in pairs if pair[0] != pair[1]), None)
    if wrong is not None:
        raise PrunekitError(
            f"{name} of a {type(config).__name__} is computed from its other fields: without the layers that go it "
            f"would call layer {wrong[0]} {wrong[1]!r}, which is {wrong[2]!r}; take layers from the end instead, or "
            "such that the kinds of those that stay follow one another as before"
        )


def copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy.

    Args:
        model: to copy.
        memo: address of an object → what stands in its place in the copy.

    Raises:
        PrunekitError: something in it cannot be copied.
    """
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever an object in it refuses with
        raise PrunekitError(
            f"this {type(model).__name__} cannot be copied, and cuts are tried on a copy first ({reason(error)}); take "
            "out of it what cannot be copied, such as locks, open files, or weights that are computed from others"
        ) from error


def without_weights(model: nn.Module, keep: Keep) -> nn.Module:
    """A deep copy whose parameters have the new shapes and no weights; the old ones are never copied.

    Raises:
        PrunekitError: as `copied`.
    """
    kept = _per_parameter(keep)
    return copied(model, {id(p): _hollow(p, kept.get(name, {})) for name, p in model.named_parameters()})


def fill(skeleton: nn.Module, model: nn.Module, keep: Keep, moved: dict[str, str]) -> nn.Module:
    """Fill a model without weights with the slices that stay.

    Args:
        skeleton: what `without_weights` gave, changed in place.
        model: whose weights they are.
        keep: indices that stay.
        moved: list elements that stand elsewhere in the skeleton, path before → path after.
    """
    kept, weights = _per_parameter(keep), dict(model.named_parameters())
    came_from = {new: old for old, new in moved.items()}
    for new, hollow in list(skeleton.named_parameters()):
        name = renamed(new, came_from)
        torch.utils.swap_tensors(hollow, _slice(weights[name], kept.get(name, {})))
    return skeleton


def replace_parameters(model: nn.Module, keep: Keep) -> None:
    """Replace cut parameters by smaller ones, in place."""
    kept = _per_parameter(keep)
    small = {id(p): _slice(p, kept[name]) for name, p in model.named_parameters() if name in kept}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) in small:
                module._parameters[name] = small[id(p)]


def remaining(size: int, gone: Tensor) -> Tensor:
    """Ascending indices below a size that stay, int64 (n,)."""
    stays = torch.ones(size, dtype=torch.bool)
    stays[gone] = False
    return stays.nonzero().flatten()


def cut_buffers(model: nn.Module, keep: dict[str, tuple[int, Tensor]]) -> None:
    """Replace buffers by the entries that stay, in place; one that several modules hold stays one.

    Args:
        model: that holds them.
        keep: name of a buffer → dimension and ascending indices that stay.
    """
    whole = {id(b): (b, *keep[name]) for name, b in model.named_buffers() if name in keep}
    small = {key: b.index_select(dim, index.to(b.device)) for key, (b, dim, index) in whole.items()}
    for module in model.modules() if small else ():
        for name, b in module._buffers.items():
            module._buffers[name] = small.get(id(b), b)


def _per_parameter(keep: Keep) -> dict[str, dict[int, Tensor]]:
    out: dict[str, dict[int, Tensor]] = {}
    for (name, dim), index in keep.items():
        out.setdefault(name, {})[dim] = index
    return out


def _slice(p: nn.Parameter, keep: dict[int, Tensor]) -> nn.Parameter:
    data = p.detach()
    for dim, index in keep.items():
        data = data.index_select(dim, index.to(data.device))
    return nn.Parameter(data.contiguous() if keep else data.clone(), requires_grad=p.requires_grad)


def _hollow(p: nn.Parameter, keep: dict[int, Tensor]) -> nn.Parameter:
    shape = [len(keep[d]) if d in keep else n for d, n in enumerate(p.shape)]
    return nn.Parameter(torch.empty(shape, dtype=p.dtype, device="meta"), requires_grad=False)
