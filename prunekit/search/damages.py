"""Measures the damage of removing units: the rise of the loss for several numbers of units of each group."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from prunekit.calibration import check_tokens, in_batches
from prunekit.checks import Model, checked
from prunekit.discovery import CoupledGroup, Groups
from prunekit.errors import PrunekitError
from prunekit.importance import ablated
from prunekit.layerwise import Layerwise
from prunekit.models import evaluating, logits_alone
from prunekit.pruning.budgets import WHOLE_KINDS
from prunekit.pruning.plan_options import candidates_of
from prunekit.pruning.plans import PruningPlan

SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)  # of the units that may still go, at which damage is measured
_WORST = 1e3  # nats, for a loss that is not finite


@checked
def measure_damages(
    model: Model,
    groups: Groups,
    scores: Mapping[str, Tensor],
    calib: Tensor,
    *,
    around: PruningPlan | None = None,
    shares: Sequence[float] = SHARES,
) -> dict[str, np.ndarray]:
    """Measures the rise of the loss when units of one group at a time are ablated, lowest scores first.

    Args:
        model: in which the groups were discovered; unchanged afterwards.
        groups: what `discover` found.
        scores: group name → (n_units,), of exact groups of several units, and of whole layers or blocks.
        calib: integers (n_samples, seq_len); one pass for each group and share.
        around: a plan whose units are ablated throughout; the rise is that above the loss without them.
        shares: of each group's units that are left, but for one; 1 is always among them, and between them the rise is
            interpolated. A whole layer or block goes or stays.

    Returns:
        Group name → float (n_units + 1,), nats per token.

    Raises:
        PrunekitError: groups, scores or tokens that do not fit.
    """
    chosen, tokens = scored_candidates(groups, scores), check_tokens(calib, model)
    if not shares or not all(0 < share <= 1 for share in shares):
        raise PrunekitError(f"shares={shares!r:.60} is not allowed; give fractions above 0, up to 1")
    gone, found = gone_before(chosen, around), {}
    removed = [g for g in chosen if g.kind in WHOLE_KINDS and gone[g.name]]
    with ExitStack() as stack:
        for name in (name for name, units in gone.items() if units):
            stack.enter_context(ablated(model, groups[name], sorted(gone[name])))
        stack.enter_context(evaluating(model))
        losses = _Losses(model, in_batches(tokens))
        whole = losses.of(None)
        for g in tqdm(sorted(chosen, key=losses.place), desc="damages", unit="group", leave=False, delay=1):
            order, n = order_of(g, scores, gone[g.name]), len(gone[g.name])
            most = 0 if any(lies_in(g, part) for part in removed) else most_to_go(g) - n
            rises = {0: 0.0, n: 0.0}
            for number in sorted({max(1, round(share * most)) for share in (*shares, 1.0)}) if most > 0 else ():
                with ablated(model, g, order[n : n + number]):
                    rises[n + number] = losses.of(g) - whole
            found[g.name] = np.interp(np.arange(g.n_units + 1), [*rises], [*rises.values()])
    return found


class _Losses:
    """The loss on batches of tokens; of a model whose layers are a chain, layers in front of a change run once."""

    def __init__(self, model: nn.Module, batches: Sequence[Tensor]) -> None:
        self._model, self._batches = model, batches
        with torch.no_grad():
            self._chain = Layerwise.of(model, batches)

    def place(self, group: CoupledGroup) -> int:
        """Number of the layer that a group lies in; -1 outside of a chain's layers."""
        layers = self._chain.layers if self._chain is not None else []
        return next((i for i, path in enumerate(layers) if group.name.startswith((f"{path}.", f"{path}:"))), -1)

    @torch.no_grad()
    def of(self, group: CoupledGroup | None) -> float:
        """The mean loss, nats per token, where this group alone has changed; groups come in the order of layers."""
        place = -1 if group is None else self.place(group)
        total = 0.0
        for number, batch in enumerate(self._batches):
            if self._chain is None or place < 0:
                logits = self._model(input_ids=batch, **logits_alone(self._model)).logits
            else:
                logits = self._chain.logits(place + 1, number, self._chain.run(place, number))
            logits = logits[:, :-1].float()
            total += float(cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())) * len(batch)
        loss = total / sum(map(len, self._batches))
        return loss if math.isfinite(loss) else _WORST


def scored_candidates(groups: Groups, scores: Mapping[str, Tensor]) -> list[CoupledGroup]:
    """The groups that are scored; whole layers and blocks may stand beside what lies in them."""
    unknown = next((name for name in scores if name not in groups), None)
    if unknown is not None:
        raise PrunekitError(
            f"scores have {unknown!r}, which is no group of this model; score groups of discover(model)"
        )
    scored = [groups[name] for name in scores]
    parts = [[g for g in scored if g.kind == kind] for kind in WHOLE_KINDS]
    parts.append([g for g in scored if g.kind not in WHOLE_KINDS])
    found = [g for part in parts for g in candidates_of(groups, scores, part, ())]
    for odd in (g for g in found if not g.exact or (g.n_units < 2 and g.kind not in WHOLE_KINDS)):
        raise PrunekitError(f"{odd.name!r} is inexact, or a single unit")
    if not found:
        raise PrunekitError("scores are of no group")
    return found


def lies_in(group: CoupledGroup, whole: CoupledGroup) -> bool:
    """Whether a group goes with a whole layer or block."""
    path = whole.name.rpartition(":")[0]
    inside = all(member.parameter.startswith(f"{path}.") for member in group.members)
    return inside and whole.kind in WHOLE_KINDS and group.name != whole.name


def most_to_go(group: CoupledGroup, min_units: int = 1) -> int:
    """Units of a group that may go: all but some, or a whole layer or block."""
    return group.n_units - (0 if group.kind in WHOLE_KINDS else max(min_units, group.min_units))


def order_of(group: CoupledGroup, scores: Mapping[str, Tensor], gone: set[int]) -> list[int]:
    """The units, those that are gone first, then by their scores, lowest first."""
    order = scores[group.name].argsort(stable=True).tolist()
    return [*sorted(gone), *(unit for unit in order if unit not in gone)]


def gone_before(chosen: list[CoupledGroup], after: PruningPlan | None) -> dict[str, set[int]]:
    """Group → its units that an earlier plan removed."""
    before = {} if after is None else {name: set(after.removed(name)) for name in after.keep}
    stray = next((name for name, units in before.items() if units and name not in {g.name for g in chosen}), None)
    if stray is not None:
        raise PrunekitError(f"the earlier plan cuts {stray!r}, which has no scores; give a plan of the groups scored")
    return {g.name: before.get(g.name, set()) for g in chosen}
