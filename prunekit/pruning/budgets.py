"""Takes pruning steps until a budget is met."""

import math
from collections.abc import Callable, Mapping
from itertools import groupby, pairwise
from typing import NoReturn

from torch import Tensor

from prunekit.discovery import CoupledGroup, Groups
from prunekit.errors import BudgetError
from prunekit.pruning.plan_options import Options
from prunekit.pruning.steps import WHOLE_KINDS, Counter, Step, all_steps, bundles_of, gone_first, lowest, stops_of

TOLERANCE = 0.005  # of the model's parameters
_LETS = "round_to or min_units lets"


def units_to_go(groups: Groups, scores: Mapping[str, Tensor], options: Options) -> dict[str, set[int]]:
    """The units that meet a budget, in the order of their scores: group name → units that go.

    Raises:
        PrunekitError: the budget cannot be met.
    """
    candidates, rounding, least = options.candidates, options.rounding, options.min_units
    ordered = lowest(scores, options.gone_before)
    if options.of == "units" and options.ranking == "local" and not {*options.fractions} & {*WHOLE_KINDS}:
        return _by_group(_take_shares(groups, options, ordered), candidates)
    steps = all_steps(groups, candidates, ordered, options.ranking, rounding, least)
    steps = gone_first(steps, options.gone_before)
    if options.of == "units":
        return _by_group(_take_units(steps, candidates, options.fractions, options.ranking), candidates)
    ratio = next(iter(options.fractions.values()), 0.0)
    return _by_group(_take_parameters(steps, ratio, Counter(groups), options.limits), candidates)


def held_by_rounding(groups: Groups, scores: Mapping[str, Tensor], options: Options) -> list[str]:
    """Kinds whose number of units `round_to` or `min_units` does not allow to change."""
    if not options.limits:
        return []
    candidates, rounding, min_units = options.candidates, options.rounding, options.min_units

    def kinds_that_go(round_to: Mapping[str, int], least: int) -> set[str]:
        bundles = {g: bundles_of(groups, g, scores[g.name]) for g in candidates if g.kind not in WHOLE_KINDS}
        return {g.kind for g, found in bundles.items() if stops_of(g, found, round_to[g.name], least)}

    return sorted(kinds_that_go(dict.fromkeys(rounding, 1), 1) - kinds_that_go(rounding, min_units))


def _by_group(taken: list[Step], candidates: list[CoupledGroup]) -> dict[str, set[int]]:
    """Units to remove from each candidate group."""
    gone: dict[str, set[int]] = {g.name: set() for g in candidates}
    for step in taken:
        gone[step.group.name].update(step.units)
    return gone


def _take_parameters(steps: list[Step], ratio: float, counter: Counter, limits: str) -> list[Step]:
    """Take steps up to the budget: first the same step in every layer, then single steps.

    `limits` is what a refusal says of them, such as `"round_to=16"`; empty where there are none.

    Raises:
        PrunekitError: the steps do not come near enough to the budget.
    """
    budget = ratio * counter.total
    even = [list(batch) for _, batch in groupby(steps, key=lambda s: (s.key, s.group.kind))]
    taken = _fill(even, budget, counter)
    done = set(map(id, taken))
    taken += _fill([[s] for s in steps if id(s) not in done], budget, counter)
    if budget - (counter.total - counter.left) > TOLERANCE * counter.total or (ratio > 0 and not taken):
        _refuse(steps, taken, ratio, counter, limits)
    return taken


def _fill(batches: list[list[Step]], budget: float, counter: Counter) -> list[Step]:
    """Go through the batches in order; one that exceeds the budget closes its groups, whose later units stay."""
    taken: list[Step] = []
    closed: set[str] = set()
    for batch in batches:
        cost = sum(counter.cost(step) for step in batch)
        names = {step.group.name for step in batch}
        if names & closed or counter.total - counter.left + cost > budget + 0.5:
            closed |= names
            continue
        for step in batch:
            counter.take(step)
        taken += batch
    return taken


def _refuse(steps: list[Step], taken: list[Step], ratio: float, counter: Counter, limits: str) -> NoReturn:
    held, less, steps_of = (f"{limits}, and ", ", lower these", f" for {limits}") if limits else ("", "", "")
    reached = _round_up(1 - counter.left / counter.total)
    done = set(map(id, taken))
    rest = [s for s in steps if id(s) not in done]
    if not rest:
        raise BudgetError(
            f"pruning_ratio={ratio} cannot be met: with {held}all protected units and all other kinds kept, "
            f"at most {reached:.4f} of the parameters can go; ask for that or less{less}, or allow more kinds"
        )
    above = _round_up(1 - (counter.left - min(counter.cost(s) for s in rest)) / counter.total)
    nearest = min((reached, above), key=lambda r: abs(r - ratio)) if taken else above
    raise BudgetError(
        f"pruning_ratio={ratio} cannot be met within {TOLERANCE:.1%}: units are too large{steps_of}; "
        f"the nearest feasible ratios are {reached:.4f} and {above:.4f}, so ask for {nearest:.4f}"
    )


def _round_up(ratio: float) -> float:
    """A ratio rounded to four digits, so that the advised ratio can be met."""
    return math.ceil(ratio * 1e4) / 1e4


def _take_shares(groups: Groups, options: Options, scores: Mapping[str, Tensor]) -> list[Step]:
    """A share of the units of each group, all at once: as many as rounding and `min_units` let go.

    Raises:
        PrunekitError: they let too few go.
    """
    fractions, rounding, min_units, taken = options.fractions, options.rounding, options.min_units, []
    for g in options.candidates:
        bundles = bundles_of(groups, g, scores[g.name])
        size, wanted = len(bundles[0]), math.floor(fractions[g.kind] * g.n_units + 0.5 + 1e-9)
        stops = [0, *stops_of(g, bundles, rounding[g.name], min_units)]
        stop = max(stop for stop in stops if stop * size <= wanted)
        largest = max((b - a for a, b in pairwise(stops)), default=0)
        if g.min_units > 1 and g.n_units - wanted < g.min_units and wanted:
            _refuse_picked(g, fractions[g.kind], wanted)
        if wanted - stop * size > largest * size:
            _refuse_units(g.name, fractions[g.kind], g.n_units, stop * size)
        taken.append(Step(g, tuple(unit for bundle in bundles[:stop] for unit in bundle), 0.0))
    return taken


def _refuse_picked(g: CoupledGroup, fraction: float, wanted: int) -> NoReturn:
    raise BudgetError(
        f"{fraction:.4f} of the {g.n_units} units of {g.name!r} cannot go: {g.n_units - wanted} would be left, and "
        f"{g.min_units} are chosen for each token (num_experts_per_tok of most configurations); ask for at most "
        f"{1 - g.min_units / g.n_units:.4f}"
    )


def _refuse_units(name: str, fraction: float, n_units: int, feasible: float, picked: int = 1) -> NoReturn:
    what = f"round_to, min_units or the {picked} that are chosen for each token let" if picked > 1 else _LETS
    raise BudgetError(
        f"{fraction:.4f} of the {n_units} units of {name!r} cannot go: {what} "
        f"at most {feasible / n_units:.4f} go; ask for that, or round less"
    )


def _take_units(
    steps: list[Step], candidates: list[CoupledGroup], fractions: Mapping[str, float], ranking: str
) -> list[Step]:
    """A share of the units of each group, or of all groups of a kind together.

    Raises:
        PrunekitError: the steps fall short of a share by more than one a group.
    """

    def pool(g: CoupledGroup) -> str:
        return g.name if ranking == "local" and g.kind not in WHOLE_KINDS else g.kind

    quota: dict[str, float] = {}
    for g in candidates:
        quota[pool(g)] = quota.get(pool(g), 0.0) + fractions[g.kind] * g.n_units
    room = {name: math.floor(units + 0.5 + 1e-9) for name, units in quota.items()}
    taken: list[Step] = []
    closed: set[str] = set()
    for step in steps:
        name = pool(step.group)
        if len(step.units) > room[name]:
            closed.add(step.group.name)
        elif step.group.name not in closed:
            room[name] -= len(step.units)
            taken.append(step)
    _check_units_met(steps, candidates, pool, room, quota)
    return taken


def _check_units_met(
    steps: list[Step],
    candidates: list[CoupledGroup],
    pool: Callable[[CoupledGroup], str],
    room: dict[str, int],
    quota: dict[str, float],
) -> None:
    """A share of units may fall short by one step a group, not by more."""
    largest = dict.fromkeys(room, 0)
    for step in steps:
        largest[pool(step.group)] = max(largest[pool(step.group)], len(step.units))
    for name, left in room.items():
        members = [g for g in candidates if pool(g) == name]
        picked = max(g.min_units for g in members)
        if left > largest[name] * len(members) or (left and picked > 1 and not _room_left(steps, members, left)):
            units = sum(g.n_units for g in members)
            _refuse_units(name, quota[name] / units, units, max(quota[name] - left, 0), picked)


def _room_left(steps: list[Step], members: list[CoupledGroup], left: int) -> bool:
    """Whether units are left over only since the next step takes more than these."""
    return any(len(step.units) > left for step in steps if step.group in members)
