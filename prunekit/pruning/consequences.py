"""Finds all that changes with the units that go: parameters, stored integers, constants, buffers, modules."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prunekit.discovery import Groups
from prunekit.discovery.constants import Selection, Where, select
from prunekit.discovery.integer_positions import SHAPE, Equation
from prunekit.discovery.labelling import Trace
from prunekit.discovery.labels import spread_death
from prunekit.discovery.parts import list_elements
from prunekit.discovery.stored_integers import Attribute, Key, set_attribute
from prunekit.discovery.tracing import trace
from prunekit.errors import PrunekitError
from prunekit.pruning.configurations import renumber_tokens
from prunekit.pruning.plans import PruningPlan
from prunekit.pruning.removal import Keep, cut_buffers, remove_elements

Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Consequences:
    """All that a cut changes.

    Attributes:
        keep: indices that stay, for every parameter dimension that is cut.
        values: new values of stored integers.
        selections: entries that modules select from constants passed to them.
        buffers: dimension and indices that stay, for every buffer that is cut.
        dead: bool (n_nodes,), nodes of the trace that go.
        gone: elements of lists of modules that lose all their parameters, such as the norm of one head.
        tokens: token ids that stay, and how many there were; None where the vocabulary is left alone.
    """

    keep: Keep
    values: dict[Key, int]
    selections: list[Selection]
    buffers: dict[str, tuple[int, Tensor]]
    dead: np.ndarray
    gone: set[str]
    tokens: tuple[list[int], int] | None


def consequences_of(model: nn.Module, before: Trace, groups: Groups, plan: PruningPlan) -> Consequences:
    """All that changes with the units that a plan removes.

    Raises:
        PrunekitError: something that may not be cut would go, or all of a parameter.
    """
    doomed = np.zeros(before.graph.n_nodes, np.bool_)
    for name, units in plan.gone.items():
        for m in groups[name].members:
            start, _ = before.offsets[m.parameter, m.dim]
            doomed[start + m.index[units].numpy()] = True
    dead = spread_death(before.graph, doomed)
    for labels, reason in before.graph.locks:
        if dead[labels.numpy()].any():
            raise PrunekitError(f"the plan removes what may not be cut: {reason}; keep at least one unit there")
    widths = solve(before, torch.from_numpy(dead))
    gone = emptied_elements(model, before, dead)
    keep = _surviving_indices(before, dead, before.parameters_in(gone))
    kept = [(units, plan.n_units[name]) for name, units in plan.keep.items() if groups[name].kind == "vocabulary"]
    selections, buffers = find_selections(before, dead, model), find_buffers(before, dead)
    return Consequences(keep, widths, selections, buffers, dead, gone, kept[0] if kept else None)


def emptied_elements(model: nn.Module, before: Trace, dead: np.ndarray) -> set[str]:
    """Elements of lists of modules of whose parameters nothing is left, the outermost where lists lie in lists."""
    whole = {name: True for name in before.shapes}
    for (name, _), (start, size) in before.offsets.items():
        whole[name] = whole[name] and bool(dead[start : start + size].all())
    gone = set()
    for path in list_elements(model) if any(whole.values()) else ():
        inside = [whole[name] for name in whole if name.startswith(f"{path}.")]
        if inside and all(inside):
            gone.add(path)
    return {path for path in gone if not any(path.startswith(f"{other}.") for other in gone)}


def _surviving_indices(before: Trace, dead: np.ndarray, gone: frozenset[str]) -> Keep:
    keep = {}
    for site, (start, size) in before.offsets.items():
        alive = ~dead[start : start + size]
        if site[0] in gone:
            continue
        if not alive.any():
            raise PrunekitError(f"the plan leaves nothing of {site[0]} (dimension {site[1]}); keep at least one unit")
        if not alive.all():
            keep[site] = torch.from_numpy(np.flatnonzero(alive))
    return keep


def apply_to(model: nn.Module, cut: Consequences) -> dict[str, str]:
    """Write the new widths into the modules that remember them; returns which list elements have moved where."""
    modules = dict(model.named_modules())
    for key, value in cut.values.items():
        set_attribute(modules[key[0]], key, value)
    for selection in cut.selections:
        select(modules[selection.argument.path], selection)
    for module in modules.values():
        _sync_layer(module)
    if cut.tokens:
        renumber_tokens(model, *cut.tokens)
    cut_buffers(model, cut.buffers)
    return remove_elements(model, cut.gone)


def _sync_layer(module: nn.Module) -> None:
    """Update the widths that torch's own layers store."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)


def solve(before: Trace, dead: Tensor) -> dict[Key, int]:
    """Values that make every use of a stored integer equal to the remaining size there.

    Args:
        before: trace of the uncut model.
        dead: bool (n_nodes,), what goes.

    Returns:
        New values of the attributes that change.

    Raises:
        PrunekitError: one attribute would need two values, or the equations leave it open.
    """
    read = {a.key for e in before.equations for a in e.expression.attributes() if a.key[1] == SHAPE}
    known = {key: before.sizes[key].survivors(dead) for key in read}
    measured = [(equation, equation.span.survivors(dead)) for equation in before.equations]
    waiting = [(equation, target) for equation, target in measured if target]  # where nothing is left, nothing is sized
    while waiting:
        ready = [(e, target) for e, target in waiting if len(_open(e, known)) <= 1]
        if not ready:
            break
        for equation, target in ready:
            _settle(equation, target, known)
        done = {id(e) for e, _ in ready}
        waiting = [(e, target) for e, target in waiting if id(e) not in done]
    for equation, target in waiting:
        _settle_together(equation, target, known)
    old = {a.key: a.value for equation in before.equations for a in equation.expression.attributes()}
    return {key: value for key, value in known.items() if key[1] != SHAPE and value != old[key]}


def _open(equation: Equation, known: dict[Key, int]) -> list[Attribute]:
    return [a for a in equation.expression.attributes() if a.key not in known]


def _settle(equation: Equation, target: int, known: dict[Key, int]) -> None:
    unsettled = _open(equation, known)
    if equation.expression.evaluate(known) == target:
        known.update({a.key: a.value for a in unsettled})
        return
    if not unsettled:
        raise _conflict(equation, target, known)
    attribute = unsettled[0]
    evaluate = equation.expression.evaluate
    fits = [v for v in range(attribute.value, 0, -1) if evaluate({**known, attribute.key: v}) == target]
    if not fits:
        raise _conflict(equation, target, known)
    value, rest = divmod(attribute.value * target, max(evaluate({}), 1))  # in proportion to the width
    known[attribute.key] = value if not rest and value in fits else fits[0]


def _settle_together(equation: Equation, target: int, known: dict[Key, int]) -> None:
    """Several unknown attributes: keep their values if these fit, else raise an error."""
    if equation.expression.evaluate(known) == target:
        known.update({a.key: a.value for a in _open(equation, known)})
        return
    names = ", ".join(".".join(filter(None, a.key)) for a in _open(equation, known))
    raise PrunekitError(
        f"{equation.where or 'the model'} computes a width from {names}; it is unknown which must change to give "
        f"{target}, so nothing was cut; keep all units there"
    )


def _conflict(equation: Equation, target: int, known: dict[Key, int]) -> PrunekitError:
    names = ", ".join(".".join(filter(None, a.key)) for a in equation.expression.attributes() if a.key[1] != SHAPE)
    return PrunekitError(
        f"{equation.where or 'the model'} would need {names} to give a width of {target}, but it is also used where "
        f"it must give {equation.expression.evaluate(known)}; cut the same number of units in both places, or neither"
    )


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
            flags = (every[span].reshape(argument.shape) for every in (dead, met))
            found.append(Selection(argument, *_slab(f"the constant that {argument.path} receives", *flags)))
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
