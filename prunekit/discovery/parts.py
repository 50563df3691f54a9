"""Finds whole layers and blocks, each a group of one unit: modules that do nothing when their parameters are zero.

The trace runs with parameters that are all zero, so its numbers are those of the zeroed model. Where hidden channels
enter a layer they are made to differ from zero; a layer that hands them on unchanged may be taken out, and so may a
block that adds zeros. Nothing has to be known about how a layer is built.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunekit.compat import untraced
from prunekit.discovery.constants import Where, leaves
from prunekit.discovery.groups import CoupledGroup, Member
from prunekit.discovery.labels import LOCKED

if TYPE_CHECKING:
    from prunekit.discovery.labelling import LabelMode, Trace


@dataclass(frozen=True)
class Part:
    """A module whose result is zero, or one of its arguments, when its parameters are zero.

    Attributes:
        path: of the module.
        node: of the first channel of its result.
        like: argument that has the shape of its result.
        echo: True where the result is that argument, False where it is zero.
        result: place of the result in the module's output; () if it is the whole output.
        length: of the tuple that the module returns, or 0.
        layer: the element of a list of modules that this is, or lies in; None outside of any.
    """

    path: str
    node: int
    like: Where
    echo: bool
    result: Where
    length: int
    layer: str | None


def layer_of(path: str, layers: set[str]) -> str | None:
    """The outermost list element that a path is or lies in."""
    pieces = path.split(".")
    return next((p for i in range(len(pieces)) if (p := ".".join(pieces[: i + 1])) in layers), None)


def list_elements(model: nn.Module) -> set[str]:
    """Paths of the modules in lists."""
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return {f"{path}.{i}" for path, module in lists for i in range(len(module))}


def outermost_elements(model: nn.Module) -> list[str]:
    """Paths of the elements of the longest list of modules that lies in no other one, in order: the layers."""
    elements = list_elements(model)
    lists: dict[str, list[str]] = {}
    for path in elements:
        above = path.rpartition(".")[0]
        if not any(f"{above}.".startswith(f"{other}.") for other in elements):
            lists.setdefault(above, []).append(path)
    longest = max(lists.values(), key=lambda paths: len(paths), default=[])
    return sorted(longest, key=lambda path: int(path.rpartition(".")[2]))


@contextmanager
def probing(model: nn.Module, mode: LabelMode, found: dict[str, Part]) -> Iterator[None]:
    """A context that watches modules with submodules and collects those without effect in `found`."""
    layers = list_elements(model)
    stack: list[list[tuple[Where, Tensor]]] = []

    def watch(path: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            stack.append(_channels_among(mode, args, kwargs, path in layers, generator))

        def leave(_module: nn.Module, _args: Any, result: Any) -> None:
            part = _probe(mode, path, stack.pop(), result, layer_of(path, layers))
            if part is not None:
                found[path] = part

        return enter, leave

    uses, generator = uses_of(model), torch.Generator().manual_seed(0)
    with ExitStack() as hooks:
        for path, module in model.named_modules():
            if module._modules and layer_of(path, layers) and uses_of(module).items() <= uses.items():
                enter, leave = watch(path)
                hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield


def uses_of(model: nn.Module) -> Counter[int]:
    """How often each parameter occurs in a model; a shared one cannot be removed with a part."""
    modules = (module for _, module in model.named_modules(remove_duplicate=False))
    return Counter(id(p) for module in modules for p in module._parameters.values() if p is not None)


def _channels_among(
    mode: LabelMode, args: tuple, kwargs: dict, refill: bool, generator: torch.Generator
) -> list[tuple[Where, Tensor]]:
    """Values of the labelled arguments; on entering a layer, or where all are zero, they are made to differ."""
    kept = []
    with untraced():
        for where, tensor in leaves(args, kwargs):
            passing = mode.labelled(tensor) and not mode.is_handed(tensor) and not mode.operand(tensor).parameter
            if passing and tensor.is_floating_point():
                if refill or not bool(tensor.any()):
                    tensor.normal_(generator=generator)
                kept.append((where, tensor.clone()))
    return kept


def _probe(
    mode: LabelMode, path: str, arguments: list[tuple[Where, Tensor]], returned: Any, layer: str | None
) -> Part | None:
    with untraced():
        results = [(where[1:], t) for where, t in leaves((returned,), {}) if t.is_floating_point()]
        if not results or len(results[0][0]) > 1 or isinstance(returned, list):
            return None
        where, result = results[0]
        if not all(mode.is_score(other) for _, other in results[1:] if mode.labelled(other)):
            return None  # it returns more than attention weights beside its result, which would be missed
        alike = [(w, a) for w, a in arguments if a.shape == result.shape]
        echoed = [w for w, a in alike if torch.equal(a, result) and bool(a.any())]
        planes = mode.operand(result).planes
        if not alike or not planes or not (echoed or not bool(result.any())):
            return None
        node = int(planes[0].flatten()[0])
        length = len(returned) if where else 0
        like = (echoed or [alike[0][0]])[0]
        return Part(path, node, like, bool(echoed), where, length, layer) if node > LOCKED else None


def depth_groups(trace: Trace, hidden: NDArray[np.bool_]) -> list[CoupledGroup]:
    """Layers and outermost blocks that pass the hidden channels unchanged when their parameters are zero.

    Args:
        trace: of the model.
        hidden: (n_nodes,), True for hidden channels.
    """
    parts = [part for part in trace.parts.values() if hidden[part.node]]
    layers = [part for part in parts if part.path == part.layer and part.echo]
    inside = [part for part in parts if part.path != part.layer]
    blocks = [part for part in inside if not any(part.path.startswith(f"{other.path}.") for other in inside)]
    found = [_group(trace, part, kind) for kind, chosen in (("block", blocks), ("layer", layers)) for part in chosen]
    return [group for group in found if group.members]


def _group(trace: Trace, part: Part, kind: str) -> CoupledGroup:
    """All parameters of a module, whole, as the one unit of a group."""
    shapes = {name: shape for name, shape in trace.shapes.items() if name.startswith(f"{part.path}.")}
    members = (Member(name, 0, torch.arange(shape[0])[None]) for name, shape in shapes.items() if shape and shape[0])
    return CoupledGroup(f"{part.path}:{kind}", kind, 1, tuple(members), exact=True)
