"""Removes whole layers and blocks from a copy, and checks that they can be removed."""

from typing import NamedTuple

import numpy as np
from torch import nn

from prunekit.discovery.labelling import Trace
from prunekit.discovery.parts import Part
from prunekit.errors import PrunekitError
from prunekit.pruning.caching import find_writers
from prunekit.pruning.dropping import drop
from prunekit.pruning.proving import Change, check_cache, parameters_in, verify
from prunekit.pruning.weights import copied


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
        for part in (part for part in parts if part.path != part.layer):
            _check_alone(model, before, part, writers, cached)
        raise


def _proved(model: nn.Module, before: Trace, parts: list[Part], writers: set[str], cached: bool) -> Trial:
    small = copied(model, {id(p): p for p in model.parameters()})
    moved = drop(small, parts, writers)
    nothing = np.zeros(before.graph.n_nodes, np.bool_)
    gone = parameters_in(before, {part.path for part in parts})
    verify(before, small, Change(nothing, gone, moved), exact=False)
    if cached:
        check_cache(small)
    return Trial(small, moved, writers)


def _check_alone(model: nn.Module, before: Trace, block: Part, writers: set[str], cached: bool) -> None:
    try:
        _proved(model, before, [block], writers, cached)
    except PrunekitError as error:
        raise PrunekitError(f"{block.path} cannot go: {error}") from error
