"""What goes with the units of a plan, module by module, and how a model is changed by that."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prunekit.discovery import Groups
from prunekit.discovery.constants import Selection, select
from prunekit.discovery.labelling import Trace
from prunekit.discovery.labels import spread_death
from prunekit.discovery.parts import list_elements
from prunekit.discovery.stored_integers import Key, set_attribute
from prunekit.errors import PrunekitError
from prunekit.pruning.arguments import find_buffers, find_selections
from prunekit.pruning.dropping import remove_elements
from prunekit.pruning.plans import PruningPlan
from prunekit.pruning.proving import parameters_in
from prunekit.pruning.vocabulary import renumber_tokens
from prunekit.pruning.weights import Keep, cut_buffers
from prunekit.pruning.widths import solve


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
    for name in plan.keep:
        removed = torch.tensor(plan.removed(name), dtype=torch.long)
        for m in groups[name].members:
            start, _ = before.offsets[m.parameter, m.dim]
            doomed[start + m.index[removed].numpy()] = True
    dead = spread_death(before.graph, doomed)
    _check_locks(before, dead)
    widths = solve(before, torch.from_numpy(dead))
    gone = emptied_elements(model, before, dead)
    keep = _surviving_indices(before, dead, parameters_in(before, gone))
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


def _check_locks(before: Trace, dead: np.ndarray) -> None:
    for labels, reason in before.graph.locks:
        if dead[labels.numpy()].any():
            raise PrunekitError(f"the plan removes what may not be cut: {reason}; keep at least one unit there")


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
    cut_buffers(model, cut.buffers)
    for module in modules.values():
        _sync_layer(module)
    if cut.tokens:
        renumber_tokens(model, *cut.tokens)
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
