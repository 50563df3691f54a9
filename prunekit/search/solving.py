"""Budgets solved: how many units each group loses, as a mixed-integer program over estimated or measured damages."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import csr_array
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from prunekit.calibration import check_tokens, in_batches
from prunekit.checks import Count, Model, checked
from prunekit.discovery import CoupledGroup, Groups
from prunekit.errors import BudgetError, PrunekitError
from prunekit.importance import ablated
from prunekit.layerwise import Layerwise
from prunekit.models import evaluating, logits_alone
from prunekit.pruning.plan_options import candidates_of
from prunekit.pruning.planning import plan_without
from prunekit.pruning.plans import PruningPlan
from prunekit.search.costs import Budget, budgets_of

SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)  # of the units that may still go, at which damage is measured
_SECONDS = 60.0  # for one program
_WORST = 1e3  # nats, for a loss that is not finite
_EVEN = 1e-5  # nats for a whole group: where nothing is lost, as little goes as is asked, and evenly
_SLACK = 1e-6  # of a cost, by which the program may miss a limit
_GAP = 1e-4  # relative, between the damage of the answer and the least possible one


@checked
def solve_budgets(
    groups: Groups,
    scores: Mapping[str, Tensor],
    budgets: Any,
    *,
    damages: Mapping[str, Any] | None = None,
    after: PruningPlan | None = None,
    min_units: Count = 1,
    levels: Count = 32,
) -> PruningPlan:
    """Chooses how many units each group loses: the least damage that meets all budgets.

    Damages of groups are added up, which they do only roughly; `solve_in_steps` measures them anew around each step.
    In each group units go in the order of their scores, lowest first.

    Args:
        groups: what `discover` found.
        scores: group name → (n_units,), of exact groups of several units. Without `damages` their sums are the damage:
            nats with `Curvature`, Taylor's and ablation's, or `score(..., normalize="loss")`.
        budgets: such as `[parameter_table(groups).at_most(2e6), latency_table(model, groups).at_most(12)]`; or a
            pruning ratio.
        damages: group name → float (n_units + 1,), the rise of the loss when 0, 1, … units are removed, as
            `measure_damages` returns. A loss that falls counts as none: on other tokens it would not fall.
        after: an earlier plan, whose units stay gone.
        min_units: units that every group keeps at least.
        levels: numbers of units that are considered in each group, evenly spread.

    Returns:
        A plan; `notes` has the budgets, the expected rise of the loss and the costs.

    Raises:
        PrunekitError: groups or scores that do not fit, or a budget that no plan meets; names the nearest one.

    Source: ZipLM (Kurtic et al. 2023) and OSSCAR choose widths by dynamic programs over such tables; the mixed-integer
        program here takes several budgets at once.
    """
    limits, chosen = _limits(groups, budgets), _candidates(groups, scores)
    gone = _gone_before(chosen, after)
    numbers = [_levels(g, gone[g.name], min_units, levels) for g in chosen]
    rises = [_rise(g, scores, damages, gone[g.name])[n] for g, n in zip(chosen, numbers, strict=True)]
    costs = {b.name: [b.table.of_group(g.name)[n] for g, n in zip(chosen, numbers, strict=True)] for b in limits}
    picked = _solved(rises, costs, limits)
    counts = {g.name: int(n[i]) for g, n, i in zip(chosen, numbers, picked, strict=True)}
    rise = float(sum(r[i] for r, i in zip(rises, picked, strict=True)))
    notes = {
        "budgets": [repr(budget) for budget in limits], "expected_rise": rise,
        "importance": getattr(scores, "label", None),
        "costs": {budget.name: budget.table.of(counts) for budget in limits},
    }  # fmt: skip
    lowest = {g.name: _order(g, scores, gone[g.name])[: counts[g.name]] for g in chosen}
    return replace(plan_without(groups, lowest, notes), tokens=getattr(scores, "tokens", None))


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
        scores: group name → (n_units,), of exact groups of several units.
        calib: integers (n_samples, seq_len); one pass for each group and share.
        around: a plan whose units are ablated throughout; the rise is that above the loss without them.
        shares: of each group's units that are left, but for one; 1 is always among them, and between them the rise is
            interpolated.

    Returns:
        Group name → float (n_units + 1,), nats per token.

    Raises:
        PrunekitError: groups, scores or tokens that do not fit.
    """
    chosen, tokens = _candidates(groups, scores), check_tokens(calib, model)
    if not shares or not all(0 < share <= 1 for share in shares):
        raise PrunekitError(f"shares={shares!r:.60} is not allowed; give fractions above 0, up to 1")
    gone, found = _gone_before(chosen, around), {}
    with ExitStack() as stack:
        for name in (name for name, units in gone.items() if units):
            stack.enter_context(ablated(model, groups[name], sorted(gone[name])))
        stack.enter_context(evaluating(model))
        losses = _Losses(model, in_batches(tokens))
        whole = losses.of(None)
        for g in tqdm(sorted(chosen, key=losses.place), desc="damages", unit="group", leave=False, delay=1):
            order, n = _order(g, scores, gone[g.name]), len(gone[g.name])
            most = g.n_units - n - 1
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


@checked
def solve_in_steps(
    model: Model,
    groups: Groups,
    scores: Mapping[str, Tensor],
    budgets: Any,
    calib: Tensor,
    *,
    n_steps: Count = 3,
    shares: Sequence[float] = SHARES,
    min_units: Count = 1,
) -> PruningPlan:
    """Solves budgets in equal steps: damages are measured anew around what went before.

    Args:
        model: the dense model; unchanged afterwards.
        groups: as for `solve_budgets`.
        scores: as for `solve_budgets`; they order the units of each group.
        budgets: as for `solve_budgets`; each step goes an equal part of the way there.
        calib: as for `measure_damages`.
        n_steps: 1 or more.
        shares: as for `measure_damages`.
        min_units: as for `solve_budgets`.

    Returns:
        The plan of the last step.

    Raises:
        PrunekitError: what `solve_budgets` and `measure_damages` raise.
    """
    limits, plan = _limits(groups, budgets), None
    for step in range(1, n_steps + 1):
        damages = measure_damages(model, groups, scores, calib, around=plan, shares=shares)
        there = [b.table.at_most(b.table.total - step / n_steps * max(0.0, b.table.total - b.high)) for b in limits]
        plan = solve_budgets(groups, scores, there, damages=damages, after=plan, min_units=min_units)
    assert plan is not None
    return plan


def _limits(groups: Groups, budgets: Any) -> tuple[Budget, ...]:
    limits = budgets_of(groups, budgets)
    if any(budget.ranged for budget in limits):
        raise PrunekitError("a budget with a Range is for a search; give one number, such as table.at_most(12)")
    return limits


def _candidates(groups: Groups, scores: Mapping[str, Tensor]) -> list[CoupledGroup]:
    """The groups that are scored."""
    unknown = next((name for name in scores if name not in groups), None)
    if unknown is not None:
        raise PrunekitError(
            f"scores have {unknown!r}, which is no group of this model; score groups of discover(model)"
        )
    found = candidates_of(groups, scores, [groups[name] for name in scores], ())
    for odd in (g for g in found if not g.exact or g.n_units < 2):
        raise PrunekitError(f"{odd.name!r} is inexact, or a single unit")
    if not found:
        raise PrunekitError("scores are of no group")
    return found


def _order(group: CoupledGroup, scores: Mapping[str, Tensor], gone: set[int]) -> list[int]:
    """The units, those that are gone first, then by their scores, lowest first."""
    order = scores[group.name].argsort(stable=True).tolist()
    return [*sorted(gone), *(unit for unit in order if unit not in gone)]


def _gone_before(chosen: list[CoupledGroup], after: PruningPlan | None) -> dict[str, set[int]]:
    before = {} if after is None else {name: set(after.removed(name)) for name in after.keep}
    stray = next((name for name, units in before.items() if units and name not in {g.name for g in chosen}), None)
    if stray is not None:
        raise PrunekitError(f"the earlier plan cuts {stray!r}, which has no scores; give a plan of the groups scored")
    return {g.name: before.get(g.name, set()) for g in chosen}


def _levels(group: CoupledGroup, gone: set[int], min_units: int, levels: int) -> np.ndarray:
    """Numbers of units that may go, those of an earlier plan at least."""
    most = max(len(gone), group.n_units - max(min_units, group.min_units))
    return np.unique(np.linspace(len(gone), most, levels + 1).round().astype(int))


def _rise(
    group: CoupledGroup, scores: Mapping[str, Tensor], damages: Mapping[str, Any] | None, gone: set[int]
) -> np.ndarray:
    """The rise of the loss for each number of units."""
    if damages is None:
        values = scores[group.name].detach().double().cpu()
        return np.concatenate([[0.0], values[_order(group, scores, gone)].cumsum(0).numpy()])
    rise = np.asarray(damages.get(group.name, ()), dtype=float)
    if rise.shape != (group.n_units + 1,) or not np.isfinite(rise).all():
        raise PrunekitError(
            f"damages of {group.name!r} have shape {rise.shape}; give {group.n_units + 1} finite numbers, as "
            "measure_damages returns"
        )
    share = np.arange(group.n_units + 1) / group.n_units
    return np.maximum.accumulate(rise.clip(0)) + _EVEN * share**2


def _solved(rises: list[np.ndarray], costs: Mapping[str, list[np.ndarray]], limits: Sequence[Budget]) -> list[int]:
    """The level of each group with the least damage within all limits.

    Raises:
        BudgetError: there is none; with the least cost that can be reached.
    """
    sizes = [len(rise) for rise in rises]
    n, starts = sum(sizes), np.cumsum([0, *sizes])
    groups = np.repeat(np.arange(len(sizes)), sizes)
    one = csr_array((np.ones(n), (groups, np.arange(n))), shape=(len(sizes), n))
    saved = np.stack([np.concatenate(costs[b.name]) / b.table.total for b in limits])
    wanted = np.array([1 - b.high / b.table.total for b in limits])
    for slack in (0.0, _SLACK):  # the program may miss a limit by a little
        rules = [LinearConstraint(one, 1, 1), LinearConstraint(saved, wanted - 1e-12 + slack, np.inf)]
        options = {"time_limit": _SECONDS, "mip_rel_gap": _GAP}
        found = milp(np.concatenate(rises), constraints=rules, integrality=np.ones(n), bounds=(0, 1), options=options)
        if found.x is None and found.status == 1:
            raise PrunekitError(f"no answer was found in {_SECONDS:g} seconds; give fewer levels, or fewer budgets")
        if found.x is None:
            _refuse(saved, limits, starts)
        picked = [int(found.x[a:b].argmax()) for a, b in zip(starts, starts[1:], strict=False)]
        if (saved[:, starts[:-1] + picked].sum(1) >= wanted - 1e-9).all():
            break
    return picked


def _refuse(saved: np.ndarray, limits: Sequence[Budget], starts: np.ndarray) -> None:
    most = [sum(row[a:b].max() for a, b in zip(starts, starts[1:], strict=False)) for row in saved]
    least = {b.name: b.table.total * (1 - part) for b, part in zip(limits, most, strict=True)}
    told = ", ".join(f"{name} {cost:,.6g}" for name, cost in least.items())
    raise BudgetError(
        f"no plan meets {', '.join(map(repr, limits))}: at best each alone can reach {told}; give that or more, allow "
        "more kinds, or fewer min_units"
    )
