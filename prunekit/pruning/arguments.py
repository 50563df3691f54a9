"""Selects the entries of constants that stay after a cut: passed to modules (ALiBi's slopes), or held as buffers."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunekit.discovery.constants import Argument, Selection, Where
from prunekit.discovery.labelling import Trace
from prunekit.discovery.tracing import trace
from prunekit.errors import PrunekitError

Bools = NDArray[np.bool_]


def find_selections(before: Trace, dead: Bools, model: nn.Module) -> list[Selection]:
    """The selections that modules make from their arguments.

    Args:
        before: trace of the uncut model.
        dead: bool (n_nodes,), what goes.
        model: the uncut model; it runs on one and two sequences where there is something to pick.

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
        _check_layout(found, *(_handed(trace(model, (batch, 3))) for batch in (1, 2)))
    return found


def find_buffers(before: Trace, dead: Bools) -> dict[str, tuple[int, Tensor]]:
    """Name → dimension and ascending indices that stay, for every buffer that loses entries with the channels it meets.

    Args:
        before: trace of the uncut model.
        dead: bool (n_nodes,), what goes.

    Raises:
        PrunekitError: a buffer cannot be made smaller along one dimension.
    """
    met = _met_by_channels(before)
    found = {}
    for name, (start, shape) in before.buffers.items():
        span = slice(start, start + shape.numel())
        if dead[span].any():
            dim, keep = _slab(f"the buffer {name}", *(flags[span].reshape(shape) for flags in (dead, met)))
            found[name] = (dim, torch.tensor(keep))
    return found


def _met_by_channels(before: Trace) -> Bools:
    met = np.zeros(before.graph.n_nodes, np.bool_)
    for relation in (before.graph.same, *before.graph.owns.values()):
        for one, other in relation:
            met[one] = met[other] = True
    return met


def _selection(argument: Argument, dead: Bools, met: Bools) -> Selection:
    return Selection(argument, *_slab(f"the constant that {argument.path} receives", dead, met))


def _slab(what: str, dead: Bools, met: Bools) -> tuple[int, tuple[int, ...]]:
    """A dimension, and what stays along it: a slab goes if some of its channels go and none is still needed."""
    for dim in range(dead.ndim):
        others = tuple(d for d in range(dead.ndim) if d != dim)
        gone, needed = (np.asarray(flags.any(axis=others)) for flags in (dead, met & ~dead))
        if not gone.all() and not needed[gone].any():
            return dim, tuple(np.flatnonzero(~gone).tolist())
    raise PrunekitError(
        f"{what}, of shape {dead.shape}, cannot be cut along one dimension with its units; keep all units there"
    )


def _handed(run: Trace) -> dict[tuple[str, Where], Tensor]:
    return {(argument.path, argument.where): values for argument, (_, values) in run.arguments.items()}


def _check_layout(found: list[Selection], one: dict[Any, Tensor], two: dict[Any, Tensor]) -> None:
    """A constant that grows with the batch must hold its sequences one after the other."""
    for selection in found:
        argument = selection.argument
        single, pair = (handed.get((argument.path, argument.where)) for handed in (one, two))
        if single is None or pair is None or not _repeats(single, pair, selection.dim, argument.shape[selection.dim]):
            raise PrunekitError(
                f"{argument.path} receives a constant of shape {argument.shape} for one sequence and not its "
                "repetition for two, so it is not clear which entries belong to which unit; keep all units there"
            )


def _repeats(single: Tensor, pair: Tensor, dim: int, size: int) -> bool:
    if pair.dim() != single.dim() or single.shape[dim] != size or pair.shape[dim] % size:
        return False
    return all(bool((part == single).all()) for part in pair.split(size, dim))
