"""Budgets solved: how many units each group loses, as a mixed-integer program over estimated or measured damages."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import csr_array
from torch import Tensor

from prunekit.checks import Count, Model, checked
from prunekit.discovery import CoupledGroup, Groups
from prunekit.errors import BudgetError, PrunekitError
from prunekit.pruning.budgets import WHOLE_KINDS
from prunekit.pruning.planning import plan_without
from prunekit.pruning.plans import PruningPlan
from prunekit.search.costs import Budget, budgets_of
from prunekit.search.damages import (
    SHARES,
    gone_before,
    lies_in,
    measure_damages,
    most_to_go,
    order_of,
    scored_candidates,
)

_SECONDS = 60.0  # for one program
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
    """Chooses how many units each group loses, and which layers go whole: the least damage that meets all budgets.

    Damages of groups are added up, which they do only roughly; `solve_in_steps` measures them anew around each step.
    In each group units go in the order of their scores, lowest first. Where whole layers or blocks are scored too,
    depth and width share the budget: of what goes whole, no unit is counted. One of each kind stays.

    Args:
        groups: what `discover` found.
        scores: group name → (n_units,), of exact groups of several units, and of whole layers or blocks, such as
            `{**units, **score(model, groups.of_kind("layer"), Ablation(), calib)}`. Without `damages` their sums are
            the damage: nats with `Curvature`, Taylor's and ablation's, or `score(..., normalize="loss")`.
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
    limits, chosen = _limits(groups, budgets), scored_candidates(groups, scores)
    gone = gone_before(chosen, after)
    numbers = [_levels(g, gone[g.name], min_units, levels) for g in chosen]
    rises = [_rise(g, scores, damages, gone[g.name])[n] for g, n in zip(chosen, numbers, strict=True)]
    costs = {b.name: [b.table.of_group(g.name)[n] for g, n in zip(chosen, numbers, strict=True)] for b in limits}
    wholes = [number for number, g in enumerate(chosen) if g.kind in WHOLE_KINDS]
    inside = [(number, j) for j in wholes for number, g in enumerate(chosen) if lies_in(g, chosen[j])]
    kinds = [[j for j in wholes if chosen[j].kind == kind] for kind in WHOLE_KINDS]
    stay = [alike for alike in kinds if alike and len(alike) == len(groups.of_kind(chosen[alike[0]].kind))]
    picked = _solved(rises, costs, limits, inside, stay)
    counts = {g.name: 0 if i is None else int(n[i]) for g, n, i in zip(chosen, numbers, picked, strict=True)}
    rise = float(sum(r[i] for r, i in zip(rises, picked, strict=True) if i is not None))
    notes = {
        "budgets": [repr(budget) for budget in limits], "expected_rise": rise,
        "importance": getattr(scores, "label", None),
        "costs": {budget.name: budget.table.of(counts) for budget in limits},
    }  # fmt: skip
    lowest = {g.name: order_of(g, scores, gone[g.name])[: counts[g.name]] for g in chosen}
    return replace(plan_without(groups, lowest, notes), tokens=getattr(scores, "tokens", None))


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


def _levels(group: CoupledGroup, gone: set[int], min_units: int, levels: int) -> np.ndarray:
    """Numbers of units that may go, those of an earlier plan at least."""
    most = max(len(gone), most_to_go(group, min_units))
    return np.unique(np.linspace(len(gone), most, levels + 1).round().astype(int))


def _rise(
    group: CoupledGroup, scores: Mapping[str, Tensor], damages: Mapping[str, Any] | None, gone: set[int]
) -> np.ndarray:
    """The rise of the loss for each number of units."""
    if damages is None:
        values = scores[group.name].detach().double().cpu()
        return np.concatenate([[0.0], values[order_of(group, scores, gone)].cumsum(0).numpy()])
    rise = np.asarray(damages.get(group.name, ()), dtype=float)
    if rise.shape != (group.n_units + 1,) or not np.isfinite(rise).all():
        raise PrunekitError(
            f"damages of {group.name!r} have shape {rise.shape}; give {group.n_units + 1} finite numbers, as "
            "measure_damages returns"
        )
    share = np.arange(group.n_units + 1) / group.n_units
    return np.maximum.accumulate(rise.clip(0)) + _EVEN * share**2


def _solved(
    rises: list[np.ndarray],
    costs: Mapping[str, list[np.ndarray]],
    limits: Sequence[Budget],
    inside: Sequence[tuple[int, int]] = (),
    stay: Sequence[Sequence[int]] = (),
) -> list[int | None]:
    """The level of each group with the least damage within all limits; None for a group that goes with a whole one.

    Args:
        rises: damage at each level, of each group.
        costs: cost name → what each level of each group saves.
        limits: the budgets.
        inside: pairs of a group and a whole layer or block that it lies in, by number.
        stay: whole layers or blocks of which one stays at least.

    Raises:
        BudgetError: there is none; with the least cost that can be reached.
    """
    sizes = [len(rise) for rise in rises]
    n, starts = sum(sizes), np.cumsum([0, *sizes])
    last = starts[1:] - 1  # where a layer or block goes
    entries = list(zip(np.repeat(np.arange(len(sizes)), sizes).tolist(), range(n), strict=True))
    entries += [(g, int(last[w])) for g, w in inside]
    rules = [LinearConstraint(_ones(entries, (len(sizes), n)), 1, 1)]
    for wholes in stay:
        rules.append(LinearConstraint(_ones([(0, int(last[w])) for w in wholes], (1, n)), -np.inf, len(wholes) - 1))
    saved = np.stack([np.concatenate(costs[b.name]) / b.table.total for b in limits])
    wanted = np.array([1 - b.high / b.table.total for b in limits])
    for slack in (0.0, _SLACK):  # the program may miss a limit by a little
        met = LinearConstraint(saved, wanted - 1e-12 + slack, np.inf)
        values = _least(np.concatenate(rises), [*rules, met])
        if values is None:
            _refuse(saved, limits, rules)
        spans = [slice(a, b) for a, b in zip(starts, starts[1:], strict=False)]
        picked = [int(values[s].argmax()) if values[s].max() > 0.5 else None for s in spans]
        taken = [a + i for a, i in zip(starts, picked, strict=False) if i is not None]
        if (saved[:, taken].sum(1) >= wanted - 1e-9).all():
            break
    return picked


def _ones(entries: Sequence[tuple[int, int]], shape: tuple[int, int]) -> csr_array:
    """A matrix with ones at these places."""
    rows, columns = np.array(entries, dtype=np.int32).T  # scipy before 1.14 solves no program with wider indices
    return csr_array((np.ones(len(rows)), (rows, columns)), shape=shape)


def _least(values: np.ndarray, rules: Sequence[LinearConstraint]) -> Any:
    """The choice, of zeros and ones, with the least sum of values under the rules; None if there is none."""
    options = {"time_limit": _SECONDS, "mip_rel_gap": _GAP}
    found = milp(values, constraints=rules, integrality=np.ones(len(values)), bounds=(0, 1), options=options)
    if found.x is None and found.status == 1:
        raise PrunekitError(f"no answer was found in {_SECONDS:g} seconds; give fewer levels, or fewer budgets")
    return found.x


def _refuse(saved: np.ndarray, limits: Sequence[Budget], rules: Sequence[LinearConstraint]) -> NoReturn:
    most = [row @ _least(-row, rules) for row in saved]
    least = {b.name: b.table.total * (1 - part) for b, part in zip(limits, most, strict=True)}
    told = ", ".join(f"{name} {cost:,.6g}" for name, cost in least.items())
    raise BudgetError(
        f"no plan meets {', '.join(map(repr, limits))}: at best each alone can reach {told}; give that or more, allow "
        "more kinds, or fewer min_units"
    )
