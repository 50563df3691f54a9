"""Which entries of the constants that modules are handed stay after a cut, such as the slopes of ALiBi."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunekit.discovery.constants import Argument, Selection
from prunekit.discovery.tracing import Trace, trace
from prunekit.errors import PrunekitError

Bools = NDArray[np.bool_]


def find_selections(before: Trace, dead: Bools, model: nn.Module) -> list[Selection]:
    """What each module has to pick from its arguments.

    Args:
        before: trace of the uncut model.
        dead: bool (n_nodes,), what goes.
        model: the uncut model; it is traced with two sequences where there is something to pick.

    Raises:
        PrunekitError: a constant cannot be made smaller along one dimension, or its layout is not understood.
    """
    met = _met_by_channels(before)
    found = []
    for argument, (start, values) in before.arguments.items():
        span = slice(start, start + values.numel())
        if dead[span].any():
            found.append(_selection(argument, *(flags[span].reshape(argument.shape) for flags in (dead, met))))
    if found:
        _check_layout(before, found, trace(model, batch=2))
    return found


def _met_by_channels(before: Trace) -> Bools:
    met = np.zeros(before.graph.n_nodes, np.bool_)
    for relation in (before.graph.same, *before.graph.owns.values()):
        for one, other in relation:
            met[one.numpy().ravel()] = met[other.numpy().ravel()] = True
    return met


def _selection(argument: Argument, dead: Bools, met: Bools) -> Selection:
    """A slab goes where something in it dies and nothing in it is still needed."""
    for dim in range(dead.ndim):
        others = tuple(d for d in range(dead.ndim) if d != dim)
        gone = dead.any(axis=others)
        if not gone.all() and not (met & ~dead).any(axis=others)[gone].any():
            return Selection(argument, dim, tuple(np.flatnonzero(~gone).tolist()))
    raise PrunekitError(
        f"{argument.path} is handed a constant of shape {argument.shape} that cannot be cut along one dimension; "
        "keep all units there"
    )


def _check_layout(before: Trace, found: list[Selection], two: Trace) -> None:
    """A constant that grows with the batch must hold its sequences one after the other."""
    alike = {(argument.path, argument.where): values for argument, (_, values) in two.arguments.items()}
    for selection in found:
        argument, dim = selection.argument, selection.dim
        one, pair = before.arguments[argument][1], alike.get((argument.path, argument.where))
        if pair is None or not _repeats(one, pair, dim):
            raise PrunekitError(
                f"{argument.path} is handed a constant of shape {argument.shape} for one sequence and not its "
                "repetition for two, so it is not clear which entries belong to which unit; keep all units there"
            )


def _repeats(one: Tensor, pair: Tensor, dim: int) -> bool:
    size = one.shape[dim]
    if pair.dim() != one.dim() or pair.shape[dim] % size:
        return False
    folded = pair.unflatten(dim, (-1, size))
    return math.prod(folded.shape) % one.numel() == 0 and bool(
        torch.equal(folded, one.unsqueeze(dim).expand_as(folded))
    )
