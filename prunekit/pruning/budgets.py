"""Orders the removals of units in steps, and takes steps until a budget is met."""

import math
from collections.abc import Mapping
from itertools import groupby, pairwise
from typing import NamedTuple, NoReturn

from torch import Tensor

from prunekit.discovery import CoupledGroup, Groups
from prunekit.errors import BudgetError
from prunekit.pruning.plan_options import Options

WHOLE_KINDS = ("block", "layer")  # groups of one unit, which may go whole
TOLERANCE = 0.005  # of the model's parameters
_LETS = "round_to or min_units lets"


class Step(NamedTuple):
    """Units of one group that are removed together (one, or as many as rounding needs)."""

    group: CoupledGroup
    units: tuple[int, ...]
    key: float


class Counter:
    """Counts the remaining parameters exactly: the product of the kept sizes of each parameter."""

    def __init__(self, groups: Groups) -> None:
        self._sizes = {name: list(shape) for name, shape in groups.shapes.items()}
        self.total = self.left = groups.n_parameters

    def cost(self, step: Step) -> int:
        """Number of parameters that a step removes."""
        return self.left - self._after(step, take=False)

    def take(self, step: Step) -> None:
        """Remove the units of a step."""
        self.left = self._after(step, take=True)

    def _after(self, step: Step, take: bool) -> int:
        left = self.left
        changed: dict[str, list[int]] = {}
        for m in step.group.members:
            sizes = changed.setdefault(m.parameter, list(self._sizes[m.parameter]))
            left -= math.prod(sizes)
            sizes[m.dim] -= len(step.units) * m.width
            left += math.prod(sizes)
        if take:
            self._sizes.update(changed)
        return left


def all_steps(groups: Groups, scores: Mapping[str, Tensor], options: Options) -> list[Step]:
    """All allowed steps, in their order; those of units that an earlier plan removed come first, kind by kind."""
    steps = _whole_steps(groups, [g for g in options.candidates if g.kind in WHOLE_KINDS], scores, options.ranking)
    for g in options.candidates:
        if g.kind in WHOLE_KINDS:
            continue
        bundles, values = bundles_of(groups, g, scores[g.name]), scores[g.name].tolist()
        start, per_unit = 0, parameters_per_unit(groups, g)
        for stop in stops_of(g, bundles, options.rounding[g.name], options.min_units):
            units = tuple(unit for bundle in bundles[start:stop] for unit in bundle)
            if options.ranking == "local":
                key = (start + stop) / 2 / len(bundles)  # a large unit goes once half of it is due
            else:
                key = sum(values[unit] for unit in units) / (per_unit * len(units))
            steps.append(Step(g, units, key))
            start = stop
    steps, gone = sorted(steps, key=_place), options.gone_before
    known = (s._replace(key=-math.inf) if set(s.units) <= gone.get(s.group.name, set()) else s for s in steps)
    return sorted(known, key=_place)


def _place(step: Step) -> tuple[float, str]:
    return step.key, step.group.kind


def lowest(scores: Mapping[str, Tensor], gone: Mapping[str, set[int]]) -> dict[str, Tensor]:
    """The scores, with those of already removed units lowest."""
    found = {name: values.clone() for name, values in scores.items()}
    for name in found.keys() & gone.keys():
        found[name][sorted(gone[name])] = -math.inf
    return found


def _whole_steps(
    groups: Groups, candidates: list[CoupledGroup], scores: Mapping[str, Tensor], ranking: str
) -> list[Step]:
    """Whole layers and blocks compete with their own kind, whatever the ranking; the best of a kind stays."""
    steps = []
    for kind in WHOLE_KINDS:
        worth = {g.name: float(scores[g.name]) / parameters_per_unit(groups, g) for g in candidates if g.kind == kind}
        order = sorted(worth, key=lambda name: worth[name])
        for rank, name in enumerate(order[:-1]):
            steps.append(Step(groups[name], (0,), (rank + 0.5) / len(order) if ranking == "local" else worth[name]))
    return steps


def bundles_of(groups: Groups, g: CoupledGroup, scores: Tensor) -> list[tuple[int, ...]]:
    """Bundles of units, lowest scores first: single units, or one query head of each KV group."""
    order = scores.argsort(stable=True).tolist()
    kv_group = _kv_group_of(groups, g) if g.kind == "query_head" else [0] * g.n_units
    ranked: dict[int, list[int]] = {}
    for unit in order:
        ranked.setdefault(kv_group[unit], []).append(unit)
    return list(zip(*(ranked[number] for number in sorted(ranked)), strict=True))


def _kv_group_of(groups: Groups, g: CoupledGroup) -> list[int]:
    """KV group of each query head, read off the rows that they share; all in one where there is no such group."""
    for other in groups.of_kind("kv_head"):
        for m in g.members:
            shared = [o for o in other.members if (o.parameter, o.dim) == (m.parameter, m.dim)]
            if shared and bool((m.index[:, :1] == shared[0].index.flatten()).any(1).all()):
                holds = (m.index[:, :1, None] == shared[0].index).any(-1)  # (n query heads, n KV groups)
                return holds.long().argmax(1).tolist()
    return [0] * g.n_units


def parameters_per_unit(groups: Groups, g: CoupledGroup) -> int:
    """Parameters that one unit of a group owns, in the model as it is."""
    shapes = groups.shapes
    return sum(m.width * math.prod(shapes[m.parameter]) // shapes[m.parameter][m.dim] for m in g.members)


def stops_of(g: CoupledGroup, bundles: list[tuple[int, ...]], rounding: int, min_units: int) -> list[int]:
    """Allowed numbers of removed bundles of a group: the rest is rounded and at least the minimum."""
    n, size, least = len(bundles), len(bundles[0]), max(min_units, g.min_units)
    return [n - kept for kept in range(n - 1, 0, -1) if kept * size >= least and kept * size % rounding == 0]


def units_to_go(groups: Groups, scores: Mapping[str, Tensor], options: Options) -> dict[str, set[int]]:
    """The units that meet a budget, in the order of their scores: group name → units that go.

    Raises:
        PrunekitError: the budget cannot be met.
    """
    ordered = lowest(scores, options.gone_before)
    if options.of == "parameters":
        taken = _take_parameters(all_steps(groups, ordered, options), groups, options)
    elif options.ranking == "local" and not {*options.fractions} & {*WHOLE_KINDS}:
        taken = _take_shares(groups, options, ordered)
    else:
        taken = _take_units(all_steps(groups, ordered, options), options)
    gone: dict[str, set[int]] = {g.name: set() for g in options.candidates}
    for step in taken:
        gone[step.group.name].update(step.units)
    return gone


def held_by_rounding(groups: Groups, scores: Mapping[str, Tensor], options: Options) -> list[str]:
    """Kinds whose number of units `round_to` or `min_units` does not allow to change."""
    several = (g for g in options.candidates if options.limits and g.kind not in WHOLE_KINDS)
    bundles = {g: bundles_of(groups, g, scores[g.name]) for g in several}
    free = {g.kind for g, found in bundles.items() if stops_of(g, found, 1, 1)}
    limited = ((g, stops_of(g, found, options.rounding[g.name], options.min_units)) for g, found in bundles.items())
    return sorted(free - {g.kind for g, stops in limited if stops})


def _take_parameters(steps: list[Step], groups: Groups, options: Options) -> list[Step]:
    """Take steps up to the budget: first the same step in every layer, then single steps.

    Raises:
        PrunekitError: the steps do not come near enough to the budget.
    """
    counter, ratio = Counter(groups), next(iter(options.fractions.values()), 0.0)
    budget = ratio * counter.total
    taken = _fill([list(batch) for _, batch in groupby(steps, key=_place)], budget, counter)
    taken += _fill([[step] for step in _others(steps, taken)], budget, counter)
    if budget - (counter.total - counter.left) > TOLERANCE * counter.total or (ratio > 0 and not taken):
        _refuse(_others(steps, taken), bool(taken), ratio, counter, options.limits)
    return taken


def _others(steps: list[Step], taken: list[Step]) -> list[Step]:
    done = set(map(id, taken))
    return [step for step in steps if id(step) not in done]


def _fill(batches: list[list[Step]], budget: float, counter: Counter) -> list[Step]:
    """Go through the batches in order; one that exceeds the budget closes its groups, whose later units stay."""
    taken: list[Step] = []
    closed: set[str] = set()
    for batch in batches:
        names = {step.group.name for step in batch}
        if names & closed or counter.total - counter.left + sum(map(counter.cost, batch)) > budget + 0.5:
            closed |= names
            continue
        for step in batch:
            counter.take(step)
        taken += batch
    return taken


def _refuse(rest: list[Step], some: bool, ratio: float, counter: Counter, limits: str) -> NoReturn:
    """Raise an error that names the nearest ratios, from the steps that are left and whether some were taken."""
    held, less, steps_of = (f"{limits}, and ", ", lower these", f" for {limits}") if limits else ("", "", "")
    reached = _round_up(1 - counter.left / counter.total)
    if not rest:
        raise BudgetError(
            f"pruning_ratio={ratio} cannot be met: with {held}all protected units and all other kinds kept, "
            f"at most {reached:.4f} of the parameters can go; ask for that or less{less}, or allow more kinds"
        )
    above = _round_up(1 - (counter.left - min(counter.cost(s) for s in rest)) / counter.total)
    nearest = min((reached, above), key=lambda r: abs(r - ratio)) if some else above
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
            raise BudgetError(
                f"{fractions[g.kind]:.4f} of the {g.n_units} units of {g.name!r} cannot go: {g.n_units - wanted} would "
                f"be left, and {g.min_units} are chosen for each token (num_experts_per_tok of most configurations); "
                f"ask for at most {1 - g.min_units / g.n_units:.4f}"
            )
        if wanted - stop * size > largest * size:
            _refuse_units(g.name, fractions[g.kind], g.n_units, stop * size)
        taken.append(Step(g, tuple(unit for bundle in bundles[:stop] for unit in bundle), 0.0))
    return taken


def _refuse_units(name: str, fraction: float, n_units: int, feasible: float, picked: int = 1) -> NoReturn:
    what = f"round_to, min_units or the {picked} that are chosen for each token let" if picked > 1 else _LETS
    raise BudgetError(
        f"{fraction:.4f} of the {n_units} units of {name!r} cannot go: {what} "
        f"at most {feasible / n_units:.4f} go; ask for that, or round less"
    )


def _take_units(steps: list[Step], options: Options) -> list[Step]:
    """A share of the units of each group, or of all groups of a kind together.

    Raises:
        PrunekitError: the steps fall short of a share by more than one a group.
    """
    local = options.ranking == "local"
    pools = {g.name: g.name if local and g.kind not in WHOLE_KINDS else g.kind for g in options.candidates}
    quota = dict.fromkeys(pools.values(), 0.0)
    for g in options.candidates:
        quota[pools[g.name]] += options.fractions[g.kind] * g.n_units
    room = {name: math.floor(units + 0.5 + 1e-9) for name, units in quota.items()}
    taken: list[Step] = []
    closed: set[str] = set()
    for step in steps:
        name = pools[step.group.name]
        if len(step.units) > room[name]:
            closed.add(step.group.name)
        elif step.group.name not in closed:
            room[name] -= len(step.units)
            taken.append(step)
    for name, left in room.items():
        members = [g for g in options.candidates if pools[g.name] == name]
        largest = max((len(step.units) for step in steps if pools[step.group.name] == name), default=0)
        picked, units = max(g.min_units for g in members), sum(g.n_units for g in members)
        if left > largest * len(members) or (left >= largest and left and picked > 1):
            _refuse_units(name, quota[name] / units, units, max(quota[name] - left, 0), picked)
    return taken
