"""The order of removals (`Step`), and the parameters that each removes."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from prunekit.discovery import CoupledGroup, Groups

WHOLE_KINDS = ("block", "layer")  # groups of one unit, which may go whole


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


def all_steps(
    groups: Groups,
    candidates: list[CoupledGroup],
    scores: Mapping[str, Tensor],
    ranking: str,
    rounding: Mapping[str, int],
    min_units: int,
) -> list[Step]:
    """All allowed steps, in their order."""
    steps = _whole_steps(groups, [g for g in candidates if g.kind in WHOLE_KINDS], scores, ranking)
    for g in candidates:
        if g.kind in WHOLE_KINDS:
            continue
        bundles, values = bundles_of(groups, g, scores[g.name]), scores[g.name].tolist()
        start, per_unit = 0, parameters_per_unit(groups, g)
        for stop in stops_of(g, bundles, rounding[g.name], min_units):
            units = tuple(unit for bundle in bundles[start:stop] for unit in bundle)
            if ranking == "local":
                key = (start + stop) / 2 / len(bundles)  # a large unit goes once half of it is due
            else:
                key = sum(values[unit] for unit in units) / (per_unit * len(units))
            steps.append(Step(g, units, key))
            start = stop
    return sorted(steps, key=lambda step: (step.key, step.group.kind))


def gone_first(steps: list[Step], gone: Mapping[str, set[int]]) -> list[Step]:
    """The steps, with those of already removed units first, kind by kind."""
    if not gone:
        return steps
    known = [s._replace(key=-math.inf) if set(s.units) <= gone.get(s.group.name, set()) else s for s in steps]
    return sorted(known, key=lambda step: (step.key, step.group.kind))


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
