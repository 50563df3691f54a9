"""The space of architectures: what share of each layer's heads and channels goes, and by which importance."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from hashlib import sha256
from typing import Any

import numpy as np
from torch import Tensor

from prunekit.checks import check_integers, is_real
from prunekit.discovery import CoupledGroup, Groups
from prunekit.errors import PrunekitError
from prunekit.fingerprint import bytes_of
from prunekit.pruning import PruningPlan
from prunekit.pruning.planning import DEFAULT_KINDS, candidates_of, plan_without
from prunekit.search.building import cut
from prunekit.search.costs import Budget, CostTable, budgets_of, check_budgets, parameter_table
from prunekit.search.fitting import Slots
from prunekit.search.knobs import Choice, Knob, Range
from prunekit.search.space import CarryOut, Point, Space, check_limit

IMPORTANCE, FIRST, LAST, COMPENSATE = "importance", "first_layer", "last_layer", "compensate"


@dataclass(frozen=True, eq=False)
class PlanSpace(Space):
    """Plans that meet a budget, each told by shares of units.

    A point says which share of each layer's heads and channels goes (`"kv_head.3"`, `"ffn_channel.3"`); by which
    importance they are chosen; the first and the last layer that is cut; whole layers that go (`"layer.3"`); whether
    what reads the pruned units is re-fitted (`"compensate"`); and what it may cost, where that is a range.

    Attributes:
        groups: what `discover` found.
        importances: label → scores of the groups that are cut, one or several.
        budgets: what every point meets, such as `[parameter_table(groups).at_most(2e6)]`; or a pruning ratio, a budget
            on parameters. One of them is used up to within 0.5% of the dense model's, or a unit where that is more,
            unless a whole layer weighs more than what is to go.
        kinds: of the groups that are cut: exact ones that share no parameter.
        layer_range: whether the first and the last layer that is cut are knobs, within a quarter of the layers from
            either end.
        whole_layers: layers that may go whole, at most.
        min_units: units that each group keeps at least.
        compensate: a calibration set, integers (n_samples, seq_len), to re-fit on or not; None never re-fits.
        limits: knob → what it is held to; see `narrowed`.

    Raises:
        PrunekitError: scores or groups that cannot be, or a budget below what must stay, with the least that can.

    Source: Ji et al. (arXiv 2309.09507): pruning ratio of each layer, layer type, layer range and importance kind.
        Reconstructed: how samples are drawn. Shares are scaled together until the budget is met, so that every point
        does; whole layers, compensation and budgets on anything but parameters are ours.
    """

    groups: Groups
    importances: Mapping[str, Mapping[str, Tensor]]
    budgets: Sequence[Budget] | float | Range
    kinds: Sequence[str] = DEFAULT_KINDS
    layer_range: bool = True
    whole_layers: int = 0
    min_units: int = 1
    compensate: Tensor | None = None
    limits: Mapping[str, Knob] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_integers(whole_layers=(self.whole_layers, 0), min_units=(self.min_units, 1))
        self._check_types()
        if not self.units:
            kinds = sorted({group.kind for group in self.groups if group.exact and group.layer is not None})
            raise PrunekitError(
                f"kinds={self.kinds!r}: no exact group with more than min_units={self.min_units} units lies in a "
                f"layer; this model has {', '.join(kinds)}"
            )
        check_budgets(self.limited, self._least_left)

    def _check_types(self) -> None:
        """Refuse what only looks like an argument."""
        if not isinstance(self.groups, Groups):
            raise PrunekitError(f"groups are a {type(self.groups).__name__}; give what discover(model) returns")
        if isinstance(self.kinds, str) or not isinstance(self.kinds, Iterable):
            raise PrunekitError(f"kinds={self.kinds!r} is no list; give one, such as kinds=['ffn_channel']")
        found = self.importances.values() if isinstance(self.importances, Mapping) else ()
        if not found or not all(isinstance(scores, Mapping) for scores in found):
            raise PrunekitError(
                f"importances={self.importances!r:.60}; give label → scores, such as {{'taylor': score(…)}}"
            )
        if self.compensate is not None and not isinstance(self.compensate, Tensor):
            raise PrunekitError(f"compensate={self.compensate!r:.40} is no calibration set; give integers (n, seq_len)")
        if not isinstance(self.layer_range, bool):
            raise PrunekitError(f"layer_range={self.layer_range!r:.40} is not allowed; give True or False")

    @cached_property
    def units(self) -> Mapping[str, CoupledGroup]:
        """Knob → the group of which it says the share that goes."""
        exact = [group for group in self.groups.of_kind(*self.kinds) if group.exact]
        found: list[CoupledGroup] = []
        for scores in self.importances.values():  # each must have a score for every unit
            found = candidates_of(self.groups, scores, exact, ())
        found = [group for group in found if group.layer is not None and group.n_units > self.min_units]
        short = [f"{group.kind}.{group.layer}" for group in found]
        return {s if short.count(s) == 1 else g.name: g for s, g in zip(short, found, strict=True)}

    @cached_property
    def whole(self) -> Mapping[str, CoupledGroup]:
        """Knob → the layer of which it says whether it goes."""
        layers = self.groups.of_kind("layer") if self.whole_layers else ()
        return {f"layer.{group.layer}": group for group in layers if group.layer in self.layers}

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers in which groups are cut."""
        return tuple(sorted({group.layer for group in self.units.values() if group.layer is not None}))

    @cached_property
    def knobs(self) -> Mapping[str, Knob]:  # type: ignore[override]
        """Name → what it may be set to."""
        most = {name: (group.n_units - self.min_units) / group.n_units for name, group in self.units.items()}
        found: dict[str, Knob] = {name: Range(0.0, share) for name, share in most.items()}
        if len(self.importances) > 1:
            found[IMPORTANCE] = Choice(tuple(self.importances))
        if self.layer_range and len(self.layers) > 1:
            ends = len(self.layers) // 4 + 1
            found |= {FIRST: Choice(self.layers[:ends]), LAST: Choice(self.layers[-ends:])}
        found |= {name: Choice((False, True)) for name in self.whole}
        if self.compensate is not None:
            found[COMPENSATE] = Choice((False, True))
        found |= {budget.name: budget.limit for budget in self.limited if isinstance(budget.limit, Range)}
        for name, knob in self.limits.items():
            check_limit(name, knob, found)
        return found | dict(self.limits)

    @property
    def cost_names(self) -> Sequence[str]:
        """Parameters, and what the budgets limit."""
        return list(dict.fromkeys(["parameters", *(budget.name for budget in self.limited)]))

    @property
    def goals(self) -> Sequence[str]:
        """The budgets that are ranges."""
        return [budget.name for budget in self.limited if budget.ranged]

    def narrowed(self, knobs: Mapping[str, Knob]) -> "PlanSpace":
        """The same space with some knobs held to less."""
        return replace(self, limits={**self.limits, **knobs})

    def propose(self, rng: np.random.Generator) -> Point:
        """Shares that differ between kinds, layers and draws, some of them 0; a whole layer goes now and then."""
        point, by_kind = super().propose(rng), {kind: rng.random() for kind in self.kinds}
        shares = {n: max(0.0, point[n] - rng.random() / 4) * by_kind[g.kind] for n, g in self.units.items()}
        may_go = [name for name in self.whole if self.knobs[name].holds(True)]
        goes = set(rng.permutation(may_go)[: self.whole_layers]) if rng.random() < 0.5 else set()
        return point | shares | {name: name in goes or not self.knobs[name].holds(False) for name in self.whole}

    def holds(self, name: str, value: Any) -> bool:
        """Whether a knob may be set to a value; a group that the layer range leaves whole loses nothing, whatever."""
        knob, group = self.knobs[name], self.units.get(name)
        if group is None or not isinstance(knob, Range) or not is_real(value):
            return knob.holds(value)
        least, most = _units_in(knob, group.n_units)
        return round(value * group.n_units) in (0, *range(least, most + 1))

    def fitted(self, point: Point) -> Point | None:
        """Shares scaled together until the budgets are met; where the layer range leaves a group whole, it is."""
        gone = [group for name, group in self.whole.items() if point[name]]
        if len(gone) > self.whole_layers:
            return None
        limits = {
            b.name: float(point.get(b.name, b.limit)) + sum(b.table.of_group(g.name)[1] for g in gone)
            for b in self.limited
        }
        first, last = point.get(FIRST, self.layers[0]), point.get(LAST, self.layers[-1])
        free = np.array([first <= layer <= last and layer not in {g.layer for g in gone} for layer in self._layer_of])
        weights = np.array([point[name] for name in self.units])
        least, most = (np.where(free, bound, 0) for bound in self._bounds)
        units = self._slots.fit(weights, limits, least, most)
        if units is None:
            return None
        return {**point, **dict(zip(self.units, (units / self._slots.n_units).tolist(), strict=True))}

    def check(self, point: Any) -> Point:
        """The point itself.

        Raises:
            PrunekitError: it is none of this space, or misses a budget.
        """
        found = super().check(point)
        gone = self._gone(found)
        for budget in self.limited:
            limit, cost = found.get(budget.name, budget.limit), budget.table.of(gone)
            if cost > limit * (1 + 1e-9):
                raise PrunekitError(
                    f"a point that costs {cost:,.6g} {budget.name} misses its budget of {limit:,.6g}; fit "
                    "it first: space.fitted(point)"
                )
        return found

    def _gone(self, point: Point) -> dict[str, int]:
        """Group → how many of its units go; those of a layer that goes whole are not named."""
        gone = {group.name: int(point[name]) for name, group in self.whole.items()}
        lost = {group.layer for group in self.whole.values() if gone[group.name]}
        kept = {name: group for name, group in self.units.items() if group.layer not in lost}
        return gone | {group.name: round(point[name] * group.n_units) for name, group in kept.items()}

    def plan(self, point: Point) -> PruningPlan:
        """The plan that a point stands for: of each group so many units go as its share says, lowest scores first.

        Raises:
            PrunekitError: no point of this space.
        """
        point = self.check(point)
        label = point.get(IMPORTANCE, next(iter(self.importances)))
        order = self._order[label]
        gone = {name: order.get(name, [0])[:number] for name, number in self._gone(point).items()}
        return plan_without(self.groups, gone, {"point": point, "importance": label})

    def point_of(self, plan: PruningPlan, importance: str | None = None) -> Point | None:
        """The point that cuts the same shares as a plan does, fitted to the budgets; None where none is near.

        So a search can start from what is known. Units of the plan that are not chosen by `importance` come out others.
        """
        gone = {g.name: plan.n_removed[g.name] for g in self.units.values() if g.name in plan.keep}
        shares = {name: gone.get(group.name, 0) / group.n_units for name, group in self.units.items()}
        point: Point = {n: k.options[0] if isinstance(k, Choice) else k.high for n, k in self.knobs.items()} | shares
        for name, value in ((LAST, self.layers[-1]), (IMPORTANCE, importance)):
            if name in self.knobs and value is not None:
                point[name] = value
        for budget in self.limited:
            if budget.ranged:
                point[budget.name] = self.knobs[budget.name].nearest(budget.table.of(gone))
        return self.fitted(point)

    def job(self, point: Point) -> tuple[CarryOut, Any]:
        """The cut, and the plan as plain data."""
        plan = self.plan(point)
        calib = self.compensate if point.get(COMPENSATE) else None
        data = {name: getattr(plan, name) for name in ("keep", "n_units", "n_parameters", "n_parameters_kept")}
        return partial(cut, calib=calib), data

    def costs(self, point: Point) -> dict[str, float]:
        """Parameters, and what the budgets limit."""
        gone = self._gone(self.check(point))
        return {"parameters": int(self._parameters.of(gone))} | {b.name: b.table.of(gone) for b in self.limited}

    def described(self) -> dict[str, Any]:
        """Knobs, budgets, and what changes when the order of the scores or a calibration token does."""
        digest = sha256(json.dumps(self._order).encode())
        if self.compensate is not None:
            digest.update(bytes_of(self.compensate))
        limits = [[budget.name, repr(budget.limit)] for budget in self.limited]
        budgets = {"budgets": limits, "digest": digest.hexdigest()}
        return {**super().described(), **budgets, "min_units": self.min_units, "whole_layers": self.whole_layers}

    def __repr__(self) -> str:
        budgets = ", ".join(map(repr, self.limited))
        return (
            f"PlanSpace({len(self.knobs)} knobs: {len(self.units)} groups in {len(self.layers)} layers by "
            f"{' or '.join(self.importances)}; {budgets})"
        )

    @cached_property
    def limited(self) -> tuple[Budget, ...]:
        """The budgets, one on parameters where a pruning ratio was given."""
        return budgets_of(self.groups, self.budgets)

    @cached_property
    def _parameters(self) -> CostTable:
        return parameter_table(self.groups)

    @cached_property
    def _slots(self) -> Slots:
        groups = self.units.values()
        n_units = np.array([group.n_units for group in groups])
        return Slots([group.name for group in groups], n_units, [budget.table for budget in self.limited])

    @cached_property
    def _layer_of(self) -> list[int]:
        return [group.layer or 0 for group in self.units.values()]

    @cached_property
    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Units of each group that go at least and at most."""
        bounds = np.array([_units_in(self.knobs[name], group.n_units) for name, group in self.units.items()])
        return bounds[:, 0], bounds[:, 1]

    @cached_property
    def _order(self) -> dict[str, dict[str, list[int]]]:
        """Label → group → its units, lowest scores first."""
        return {
            label: {g.name: scores[g.name].argsort(stable=True).tolist() for g in self.units.values()}
            for label, scores in self.importances.items()
        }

    def _least_left(self, budget: Budget) -> float:
        """What of a cost is left where all goes that may."""
        table, most = budget.table, dict(zip(self.units, self._bounds[1].tolist(), strict=True))
        saved = {name: float(table.of_group(group.name)[most[name]]) for name, group in self.units.items()}
        wins = [
            float(table.of_group(whole.name)[1])
            - sum(saved[n] for n, g in self.units.items() if g.layer == whole.layer)
            for whole in self.whole.values()
        ]
        return table.total - sum(saved.values()) - sum(sorted(wins)[::-1][: self.whole_layers])


def _units_in(share: Any, n_units: int) -> tuple[int, int]:
    """How many of so many units go at least and at most by a range of shares."""
    least = math.ceil(share.low * n_units - 1e-6)
    return least, max(math.floor(share.high * n_units + 1e-6), least)
