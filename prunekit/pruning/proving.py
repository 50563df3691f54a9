"""Checks a cut: traces the smaller model, and compares its structure with the old one, restricted."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache

from prunekit.discovery.labelling import LabelMode, Trace
from prunekit.discovery.labels import Sites, levels, roles
from prunekit.discovery.parts import Part
from prunekit.discovery.stored_integers import remembering
from prunekit.discovery.tracing import free_parameters, module_paths, trace
from prunekit.errors import PrunekitError, reason
from prunekit.models import evaluating
from prunekit.pruning.removal import copied, drop, renamed

OTHER = "the cut model's structure is not the full model's structure restricted to the units kept"
APART = (
    "without the removed parts, channels that belong together are separated, since others reach the rest of the model "
    "only through it, as where a residual sum is made and normed inside it"
)


@dataclass(frozen=True, eq=False)
class Change:
    """The expected differences of a cut model.

    Attributes:
        dead: bool (n_nodes,), nodes of the full model's trace that go.
        gone: parameters that are removed completely.
        moved: list elements that stand elsewhere, path before → path after.
    """

    dead: np.ndarray
    gone: frozenset[str] = frozenset()
    moved: dict[str, str] = field(default_factory=dict)


def verify(before: Trace, small: nn.Module, change: Change, *, exact: bool) -> None:
    """Trace the cut model and compare its partition with the old one restricted to the survivors.

    Where every group that is cut is exact, no plain number that channels are added to or multiplied with may
    change either: one that does was computed from a width.

    Raises:
        PrunekitError: it does not run, or anything differs.
    """
    try:
        after = trace(small)
    except PrunekitError as error:
        raise _refusal(error) from error
    if exact:
        _compare_scalars(before, after)
    old, new = Sites.of(before), Sites.of(after)
    stays = np.array([name not in change.gone for name, _ in old.names], np.bool_)
    alive = ~old.of_nodes(change.dead) & stays[old.site]
    names = tuple((renamed(name, change.moved), dim) for name, dim in old.names if name not in change.gone)
    same_sites = names == new.names and np.array_equal((np.cumsum(stays) - 1)[old.site[alive]], new.site)
    same_parts = same_sites
    dead = change.dead | _only_in(before, old, change, ~stays)
    for number, (expected, found) in enumerate(zip(levels(before.graph, dead), levels(after.graph), strict=True)):
        then, now = old.of_nodes(expected)[alive], new.of_nodes(found)
        same_parts = same_parts and _same_partition(then, now)
        if same_parts and exact and number == 0:
            same_parts = np.array_equal(roles(before.graph, expected)[then], roles(after.graph, found)[now])
        if not same_parts:
            apart = same_sites and not change.dead.any() and _follows(now, then)
            raise _refusal(APART if apart else OTHER)


def _only_in(before: Trace, sites: Sites, change: Change, gone: np.ndarray) -> np.ndarray:
    """Nodes held only by removed parameters, which no longer join what they own."""
    if not change.gone:
        return change.dead
    label = next(levels(before.graph, change.dead))
    held = sites.of_nodes(label)
    alone = np.zeros(int(label.max()) + 1, np.bool_)
    alone[held] = True
    alone[held[~gone[sites.site]]] = False
    return alone[label]


def check_scales(model: nn.Module, small: nn.Module) -> None:
    """Check that non-eager attention uses the same scale as eager attention after the head size changed.

    Raises:
        PrunekitError: it does.
    """
    _compare_scalars(*(trace(m, written_out=False) for m in (model, small)))


def _compare_scalars(before: Trace, after: Trace) -> None:
    if before.scalars != after.scalars:
        raise _refusal("it scales or shifts channels by a number that it computes from a width")


def _refusal(why: object) -> PrunekitError:
    return PrunekitError(
        f"this model cannot be cut that way, nothing was changed: {str(why).rstrip('.')}; keep the groups that are cut "
        "there whole, or plan with other kinds"
    )


def _same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two labellings are the same partition."""
    return _follows(a, b) and _follows(b, a)


def _follows(label: np.ndarray, other: np.ndarray) -> bool:
    stands_for = np.zeros(label.max(initial=0) + 1, np.int64)
    stands_for[label] = other
    return bool((stands_for[label] == other).all())


def find_writers(model: nn.Module, paths: set[str]) -> set[str]:
    """Run one token through a model with its cache, its parameters costing nothing.

    Args:
        model: whose weights are not read and may stand on the meta device.
        paths: of the modules that are watched.

    Returns:
        The modules, of those, that write keys.

    Raises:
        PrunekitError: it does not run with a cache.
    """
    found: set[str] = set()
    mode = LabelMode(Trace())
    with (
        evaluating(model),
        free_parameters(model, mode),
        remembering(model),
        module_paths(model, mode),
        _watching(model, paths, found),
    ):
        try:
            with torch.no_grad(), mode:
                model(mode.input((1, 1)), use_cache=True)
        except Exception as error:  # whatever the family raises
            raise PrunekitError(
                f"the model does not run with its cache: in {mode.entered or type(model).__name__}, {reason(error)}"
            ) from error
    return found


@contextmanager
def _watching(model: nn.Module, paths: set[str], found: set[str]) -> Iterator[None]:
    """A context in which the paths of modules in which a layer of the cache gets other keys go into `found`."""
    before: dict[str, list[Tensor | None]] = {}

    def enter(path: str, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        before[path] = _keys(args, kwargs)

    def leave(path: str, _module: nn.Module, args: tuple, kwargs: dict, _result: Any) -> None:
        after = _keys(args, kwargs)
        if len(after) != len(before[path]) or any(a is not b for a, b in zip(after, before[path], strict=True)):
            found.add(path)

    with ExitStack() as hooks:
        for path, module in ((path, model.get_submodule(path)) for path in paths):
            hooks.callback(module.register_forward_pre_hook(partial(enter, path), with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(partial(leave, path), with_kwargs=True).remove)
        yield


def _keys(args: tuple, kwargs: dict) -> list[Tensor | None]:
    """Keys in each layer of a cache among the arguments; a layer of states has none."""
    caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
    return [getattr(layer, "keys", None) for cache in caches for layer in getattr(cache, "layers", ())]


class Trial(NamedTuple):
    """A model without some of its parts.

    Attributes:
        model: a copy that shares the weights.
        moved: list elements that stand elsewhere in it, path before → path after.
        writers: paths of the parts that write keys to a cache; all of them where that cannot be seen.
    """

    model: nn.Module
    moved: dict[str, str]
    writers: set[str]


def try_without(model: nn.Module, before: Trace, parts: list[Part]) -> Trial:
    """Remove parts from a copy, and check the result.

    Args:
        model: stays as it is.
        before: its trace.
        parts: what goes.

    Raises:
        PrunekitError: they cannot go; led by the first block that cannot go even alone, if there is one.
    """
    paths = {part.path for part in parts}
    try:
        writers, cached = find_writers(model, paths), True
    except PrunekitError:
        writers, cached = paths, False
    try:
        return _proved(model, before, parts, writers, cached)
    except PrunekitError:
        for block in (part for part in parts if part.path != part.layer):
            try:
                _proved(model, before, [block], writers, cached)
            except PrunekitError as error:
                raise PrunekitError(f"{block.path} cannot go: {error}") from error
        raise


def _proved(model: nn.Module, before: Trace, parts: list[Part], writers: set[str], cached: bool) -> Trial:
    small = copied(model, {id(p): p for p in model.parameters()})
    moved = drop(small, parts, writers)
    nothing = np.zeros(before.graph.n_nodes, np.bool_)
    gone = before.parameters_in({part.path for part in parts})
    verify(before, small, Change(nothing, gone, moved), exact=False)
    if cached:  # then it must run with a cache without these parts too, such as all that have attention
        try:
            find_writers(small, set())
        except PrunekitError as error:
            raise _refusal(f"without the layers or blocks that go, {error}") from error
    return Trial(small, moved, writers)
