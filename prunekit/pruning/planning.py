"""From scores to a plan that meets a budget."""

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import NamedTuple

from torch import Tensor

from prunekit.discovery import KINDS, CoupledGroup, Groups
from prunekit.errors import PrunekitError
from prunekit.pruning.plans import PruningPlan

TOLERANCE = 0.005  # of the model's parameters
DEFAULT_KINDS = ("kv_head", "ffn_channel")
WHOLE_KINDS = ("block", "layer")  # groups of one unit, which may go whole

Ratio = float | Mapping[str, float]


class _Step(NamedTuple):
    """Units of one group that go together (one, or as many as a round width needs)."""

    group: CoupledGroup
    units: tuple[int, ...]
    key: float


class _Counter:
    """Parameters left while units go, counted exactly: the product of the kept sizes of each parameter."""

    def __init__(self, groups: Groups) -> None:
        self._sizes = {name: list(shape) for name, shape in groups.shapes.items()}
        self.total = self.left = groups.n_parameters

    def cost(self, step: _Step) -> int:
        """Parameters that go with a step."""
        return self.left - self._after(step, take=False)

    def take(self, step: _Step) -> None:
        """Let a step's units go."""
        self.left = self._after(step, take=True)

    def _after(self, step: _Step, take: bool) -> int:
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


def plan(
    groups: Groups,
    scores: Mapping[str, Tensor],
    pruning_ratio: Ratio,
    *,
    of: str = "parameters",
    ranking: str = "local",
    kinds: Iterable[str] | None = None,
    protect_layers: Iterable[int] = (),
    round_to: int | Mapping[str, int] = 1,
    min_units: int = 1,
) -> PruningPlan:
    """Which units stay, so that a fraction of the model goes.

    Units go in the order of their scores, lowest first. With `ranking="local"` every group loses the same
    share; with `"global"` units compete across groups by score per parameter removed, which makes a head
    and a channel comparable where the score is a sum over parameters.

    Args:
        groups: what `discover` found.
        scores: group name → (n_units,); higher means keep.
        pruning_ratio: fraction in [0, 1) of all the model's parameters, embeddings counted. With
            `of="units"` of the units, and it may then be a mapping kind → fraction.
        of: `"parameters"` or `"units"`.
        ranking: `"local"` or `"global"`.
        kinds: kinds of groups that may be cut; by default the exact ones of `"kv_head"` and `"ffn_channel"`.
        protect_layers: layers whose groups stay whole, counted from 0.
        round_to: what is kept of a cut group is a multiple of this; an int or kind → int.
        min_units: units every group keeps at least.

    Returns:
        A plan whose parameter count is within 0.5% of the model's parameters of what was asked.

    Raises:
        PrunekitError: bad arguments, or a budget that cannot be met, with the nearest one that can.

    Source: LLM-Pruner (Ma et al. 2023), local and global selection. Differs: its global mode compares head
    sums with single channels and so never removes a head; here scores are taken per parameter.
    """
    fractions = _check_ratio(pruning_ratio, of, DEFAULT_KINDS if kinds is None else tuple(kinds))
    _check_choice("ranking", ranking, ("local", "global"))
    candidates = _candidates(groups, scores, tuple(fractions), tuple(protect_layers), exact_only=kinds is None)
    rounding = {g.name: _rounding(round_to, g) for g in candidates}
    steps = _steps(groups, candidates, scores, ranking, rounding, min_units)
    counter = _Counter(groups)
    if of == "units":
        taken = _take_units(steps, candidates, fractions, ranking, counter)
    else:
        taken = _take_parameters(steps, next(iter(fractions.values()), 0.0), counter)
    gone = _by_group(taken, candidates)
    keep = {g.name: [u for u in range(g.n_units) if u not in gone[g.name]] for g in candidates}
    notes = {
        "pruning_ratio": dict(pruning_ratio) if isinstance(pruning_ratio, Mapping) else pruning_ratio,
        "of": of, "ranking": ranking, "importance": getattr(scores, "label", None),
    }  # fmt: skip
    return PruningPlan(keep, {g.name: g.n_units for g in candidates}, counter.total, counter.left, notes)


def _by_group(taken: list[_Step], candidates: list[CoupledGroup]) -> dict[str, set[int]]:
    gone: dict[str, set[int]] = {g.name: set() for g in candidates}
    for step in taken:
        gone[step.group.name].update(step.units)
    return gone


def _check_ratio(ratio: Ratio, of: str, kinds: tuple[str, ...]) -> dict[str, float]:
    """Fraction for each kind that may be cut."""
    _check_choice("of", of, ("parameters", "units"))
    if not kinds:
        raise PrunekitError(f"kinds is empty; give at least one of {', '.join(KINDS)}")
    for kind in (*kinds, *(ratio if isinstance(ratio, Mapping) else ())):
        _check_choice("kind", kind, KINDS)
    if isinstance(ratio, Mapping):
        if of != "units":
            raise PrunekitError(f"pruning_ratio={dict(ratio)} by kind is only allowed with of='units'; give one number")
        fractions = dict(ratio)
    else:
        fractions = dict.fromkeys(kinds, ratio)
    for value in [*fractions.values(), *(() if isinstance(ratio, Mapping) else (ratio,))]:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            raise PrunekitError(f"pruning_ratio={value!r} is not allowed; give a fraction in [0, 1), such as 0.25")
    return fractions


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise PrunekitError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, allowed))}")


def _candidates(
    groups: Groups,
    scores: Mapping[str, Tensor],
    kinds: tuple[str, ...],
    protected: tuple[int, ...],
    *,
    exact_only: bool,
) -> list[CoupledGroup]:
    layers = {g.layer for g in groups}
    for layer in protected:
        if layer not in layers:
            known = sorted(number for number in layers if number is not None)
            span = f"layers {known[0]} to {known[-1]}" if known else "no numbered layers"
            raise PrunekitError(f"protect_layers names {layer!r}; this model has {span}")
    found = [g for g in groups.of_kind(*kinds) if g.layer is None or g.layer not in protected]
    if exact_only:
        found = [g for g in found if g.exact]
    owner: dict[tuple[str, int], str] = {}
    for g in found:
        _check_scores(g, scores)
        for m in g.members:
            other = owner.setdefault((m.parameter, m.dim), g.name)
            if other != g.name and other.rsplit(":")[-1] != g.kind:
                raise PrunekitError(
                    f"{g.name!r} and {other!r} cut the same rows of {m.parameter}; give kinds that do not overlap"
                )
    return found


def _check_scores(g: CoupledGroup, scores: Mapping[str, Tensor]) -> None:
    if g.name not in scores:
        raise PrunekitError(f"scores have no entry for {g.name!r}; score the groups of this model first")
    found = scores[g.name]
    if tuple(found.shape) != (g.n_units,) or not bool(found.isfinite().all()):
        raise PrunekitError(
            f"scores of {g.name!r} must be {g.n_units} finite numbers; got shape {tuple(found.shape)}, "
            f"{int((~found.isfinite()).sum())} of them not finite"
        )


def _rounding(round_to: int | Mapping[str, int], g: CoupledGroup) -> int:
    value = round_to.get(g.kind, 1) if isinstance(round_to, Mapping) else round_to
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PrunekitError(f"round_to={value!r} is not allowed; give an integer of 1 or more")
    return value


def _steps(
    groups: Groups,
    candidates: list[CoupledGroup],
    scores: Mapping[str, Tensor],
    ranking: str,
    rounding: Mapping[str, int],
    min_units: int,
) -> list[_Step]:
    """All removals that are allowed, in the order in which they are to be made."""
    steps = _whole_steps(groups, [g for g in candidates if g.kind in WHOLE_KINDS], scores, ranking)
    for g in candidates:
        if g.kind in WHOLE_KINDS:
            continue
        bundles, values = _bundles(groups, g, scores[g.name]), scores[g.name].tolist()
        size, per_unit = len(bundles[0]), _parameters_per_unit(groups, g)
        start = 0
        for stop in _stops(len(bundles), size, rounding[g.name], min_units):
            units = tuple(unit for bundle in bundles[start:stop] for unit in bundle)
            if ranking == "local":
                key = (start + stop) / 2 / len(bundles)  # a large unit goes once half of it is due
            else:
                key = sum(values[unit] for unit in units) / (per_unit * len(units))
            steps.append(_Step(g, units, key))
            start = stop
    return sorted(steps, key=lambda step: (step.key, step.group.kind))


def _whole_steps(
    groups: Groups, candidates: list[CoupledGroup], scores: Mapping[str, Tensor], ranking: str
) -> list[_Step]:
    """Whole layers and blocks compete with their own kind, whatever the ranking; the best of a kind stays."""
    steps = []
    for kind in WHOLE_KINDS:
        worth = {g.name: float(scores[g.name]) / _parameters_per_unit(groups, g) for g in candidates if g.kind == kind}
        order = sorted(worth, key=lambda name: worth[name])
        for rank, name in enumerate(order[:-1]):
            steps.append(_Step(groups[name], (0,), (rank + 0.5) / len(order) if ranking == "local" else worth[name]))
    return steps


def _bundles(groups: Groups, g: CoupledGroup, scores: Tensor) -> list[tuple[int, ...]]:
    """Units that go together, lowest first: one a bundle, but of query heads one of each KV group."""
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


def _parameters_per_unit(groups: Groups, g: CoupledGroup) -> int:
    shapes = groups.shapes
    return sum(m.width * math.prod(shapes[m.parameter]) // shapes[m.parameter][m.dim] for m in g.members)


def _stops(n: int, size: int, rounding: int, min_units: int) -> list[int]:
    """Numbers of removed bundles of units that leave a round, large enough number of units."""
    least = max(min_units, 1)
    return [n - kept for kept in range(n - 1, 0, -1) if kept * size >= least and kept * size % rounding == 0]


def _take_parameters(steps: list[_Step], ratio: float, counter: _Counter) -> list[_Step]:
    """Take what the budget holds: first the same step in every layer or in none, then single steps."""
    budget = ratio * counter.total
    even = [list(batch) for _, batch in groupby(steps, key=lambda s: (s.key, s.group.kind))]
    taken = _fill(even, budget, counter)
    done = set(map(id, taken))
    taken += _fill([[s] for s in steps if id(s) not in done], budget, counter)
    if budget - (counter.total - counter.left) > TOLERANCE * counter.total:
        _refuse(steps, taken, ratio, counter)
    return taken


def _fill(batches: list[list[_Step]], budget: float, counter: _Counter) -> list[_Step]:
    """Go through the batches in order; one that is too dear closes its groups, whose later units must wait."""
    taken: list[_Step] = []
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


def _refuse(steps: list[_Step], taken: list[_Step], ratio: float, counter: _Counter) -> None:
    reached = _round_up(1 - counter.left / counter.total)
    done = set(map(id, taken))
    rest = [s for s in steps if id(s) not in done]
    if not rest:
        raise PrunekitError(
            f"pruning_ratio={ratio} cannot be met: with what is protected or not of the chosen kinds, "
            f"at most {reached:.4f} of the parameters can go; ask for that or less, or allow more kinds"
        )
    above = _round_up(1 - (counter.left - min(counter.cost(s) for s in rest)) / counter.total)
    nearest = min((reached, above), key=lambda r: abs(r - ratio))
    raise PrunekitError(
        f"pruning_ratio={ratio} cannot be met within {TOLERANCE:.1%}: units are too large; "
        f"the nearest feasible ratios are {reached:.4f} and {above:.4f}, so ask for {nearest:.4f}"
    )


def _round_up(ratio: float) -> float:
    """To four digits, so that the last unit still fits when the advice is followed."""
    return math.ceil(ratio * 1e4) / 1e4


def _take_units(
    steps: list[_Step], candidates: list[CoupledGroup], fractions: dict[str, float], ranking: str, counter: _Counter
) -> list[_Step]:
    """A share of the units of each group, or of all groups of a kind together."""

    def pool(g: CoupledGroup) -> str:
        return g.name if ranking == "local" and g.kind not in WHOLE_KINDS else g.kind

    quota: dict[str, float] = {}
    for g in candidates:
        quota[pool(g)] = quota.get(pool(g), 0.0) + fractions[g.kind] * g.n_units
    room = {name: math.floor(units + 0.5 + 1e-9) for name, units in quota.items()}
    taken: list[_Step] = []
    closed: set[str] = set()
    for step in steps:
        name = pool(step.group)
        if len(step.units) > room[name]:
            closed.add(step.group.name)
        elif step.group.name not in closed:
            room[name] -= len(step.units)
            taken.append(step)
    gone = _by_group(taken, candidates)
    for g in candidates:
        counter.take(_Step(g, tuple(gone[g.name]), 0.0))
    _check_units_met(steps, candidates, pool, room, quota)
    return taken


def _check_units_met(
    steps: list[_Step],
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
        if left > largest[name] * len(members):
            units = sum(g.n_units for g in members)
            raise PrunekitError(
                f"{quota[name] / units:.4f} of the {units} units of {name!r} cannot go: round_to or min_units lets "
                f"at most {max(quota[name] - left, 0) / units:.4f} go; ask for that, or round less"
            )
