"""The space of pruning plans (`PlanSpace`): the share of heads and channels removed in each layer."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from hashlib import sha256
from typing import Any

import numpy as np
from torch import Tensor

from prunekit.annotations import is_real
from prunekit.checks import Count, Whole, check_fields
from prunekit.digests import bytes_of
from prunekit.discovery import CoupledGroup, Groups
from prunekit.errors import PrunekitError
from prunekit.pruning import PruningPlan
from prunekit.pruning.plan_options import DEFAULT_KINDS, candidates_of
from prunekit.pruning.planning import plan_without
from prunekit.search.costs import Budget, CostTable, Slots, budgets_of, check_budgets, parameter_table
from prunekit.search.hyperparameters import Choice, Hyperparameter, Range
from prunekit.search.space import CarryOut, Point, Space, check_limit
from prunekit.search.worker import cut

IMPORTANCE, FIRST, LAST, COMPENSATE = "importance", "first_layer", "last_layer", "compensate"


@dataclass(frozen=True, eq=False)
class PlanSpace(Space):
    """Pruning plans that meet a budget, each given by the share of units removed from every group.

    A candidate sets the share of each layer's heads and channels that is removed (`"kv_head.3"`, `"ffn_channel.3"`),
    the importance that ranks them, and the first and last layer that is cut. It may also remove whole layers
    (`"layer.3"`), re-fit the consumer layers of the pruned units (`"compensate"`), and set a cost within a range.

    Attributes:
        groups: what `discover` found.
        importances: label → scores of the groups that are cut.
        budgets: the limits that every candidate meets, such as `[parameter_table(groups).at_most(2e6)]`; or a pruning
            ratio, which is a budget on parameters. One of them is used up to within 0.5% of the dense model's cost or
            one unit, unless a whole layer costs more than what must be removed.
        kinds: kinds of the groups that are cut; only exact groups that share no parameter.
        layer_range: whether the first and the last layer that is cut are hyperparameters, each within a quarter of the
            layers from its end.
        whole_layers: how many whole layers may be removed, at most.
        min_units: units that each group keeps at least.
        compensate: a calibration set, integers (n_samples, seq_len), to re-fit on or not; None never re-fits.
        limits: hyperparameter → the smaller range or choice allowed; see `narrowed`.

    Raises:
        PrunekitError: invalid scores or groups, or a budget that no plan can meet (the message gives the lowest one).

    Source: Ji et al. (arXiv 2309.09507): pruning ratio of each layer, layer type, layer range and importance kind.
        Reconstructed: how samples are drawn. Shares are scaled together until the budget is met, so that every
        candidate does; whole layers, compensation and budgets on anything but parameters are ours.
    """

    groups: Groups
    importances: Mapping[str, Mapping[str, Tensor]]
    budgets: Sequence[Budget] | float | Range
    kinds: Sequence[str] = DEFAULT_KINDS
    layer_range: bool = True
    whole_layers: Whole = 0
    min_units: Count = 1
    compensate: Tensor | None = None
    limits: Mapping[str, Hyperparameter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.importances:
            raise PrunekitError("importances={} is not allowed; give label → scores, such as {'taylor': score(…)}")
        if not self.units:
            kinds = sorted({group.kind for group in self.groups if group.exact and group.layer is not None})
            raise PrunekitError(
                f"kinds={self.kinds!r}: no exact group with more than min_units={self.min_units} units lies in a "
                f"layer; this model has {', '.join(kinds)}"
            )
        check_budgets(self.limited, self._least_left)

    @cached_property
    def units(self) -> Mapping[str, CoupledGroup]:
        """Hyperparameter → the group whose removed share it sets."""
        exact = [group for group in self.groups.of_kind(*self.kinds) if group.exact]
        found: list[CoupledGroup] = []
        for scores in self.importances.values():  # each must have a score for every unit
            found = candidates_of(self.groups, scores, exact, ())
        found = [group for group in found if group.layer is not None and group.n_units > self.min_units]
        short = [f"{group.kind}.{group.layer}" for group in found]
        return {s if short.count(s) == 1 else g.name: g for s, g in zip(short, found, strict=True)}

    @cached_property
    def whole(self) -> Mapping[str, CoupledGroup]:
        """Hyperparameter → the whole layer that it may remove."""
        layers = self.groups.of_kind("layer") if self.whole_layers else ()
        return {f"layer.{group.layer}": group for group in layers if group.layer in self.layers}

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers in which groups are cut."""
        return tuple(sorted({group.layer for group in self.units.values() if group.layer is not None}))

    @cached_property
    def knobs(self) -> Mapping[str, Hyperparameter]:  # type: ignore[override]
        """Name → the values that it may take."""
        most = {name: (group.n_units - self.min_units) / group.n_units for name, group in self.units.items()}
        found: dict[str, Hyperparameter] = {name: Range(0.0, share) for name, share in most.items()}
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
        """Names of the costs: parameters, and those that the budgets limit."""
        return list(dict.fromkeys(["parameters", *(budget.name for budget in self.limited)]))

    @property
    def goals(self) -> Sequence[str]:
        """Names of the budgets that are ranges."""
        return [budget.name for budget in self.limited if budget.ranged]

    def narrowed(self, knobs: Mapping[str, Hyperparameter]) -> "PlanSpace":
        """The same space with smaller ranges or choices for some hyperparameters."""
        return replace(self, limits={**self.limits, **knobs})

    def propose(self, rng: np.random.Generator) -> Point:
        """A random candidate: shares differ between kinds and layers, some are 0, and sometimes a whole layer goes."""
        point, by_kind = super().propose(rng), {kind: rng.random() for kind in self.kinds}
        shares = {n: max(0.0, point[n] - rng.random() / 4) * by_kind[g.kind] for n, g in self.units.items()}
        may_go = [name for name in self.whole if self.knobs[name].holds(True)]
        goes = set(rng.permutation(may_go)[: self.whole_layers]) if rng.random() < 0.5 else set()
        return point | shares | {name: name in goes or not self.knobs[name].holds(False) for name in self.whole}

    def holds(self, name: str, value: Any) -> bool:
        """Whether a hyperparameter may take a value; 0 is allowed for a group outside the layer range."""
        knob, group = self.knobs[name], self.units.get(name)
        if group is None or not isinstance(knob, Range) or not is_real(value):
            return knob.holds(value)
        least, most = _units_in(knob, group.n_units)
        return round(value * group.n_units) in (0, *range(least, most + 1))

    def fitted(self, point: Point) -> Point | None:
        """The candidate with its shares scaled until the budgets are met, and 0 outside the layer range."""
        gone = [group for name, group in self.whole.items() if point[name]]
        if len(gone) > self.whole_layers:
            return None
        limits = {
            b.name: float(point.get(b.name, b.limit)) + sum(b.table.of_group(g.name)[1] for g in gone)
            for b in self.limited
        }
        first, last = point.get(FIRST, self.layers[0]), point.get(LAST, self.layers[-1])
        lost, layers = {group.layer for group in gone}, [group.layer or 0 for group in self.units.values()]
        free = np.array([first <= layer <= last and layer not in lost for layer in layers])
        weights = np.array([point[name] for name in self.units])
        least, most = (np.where(free, bound, 0) for bound in self._bounds)
        units = self._slots.fit(weights, limits, least, most)
        if units is None:
            return None
        return {**point, **dict(zip(self.units, (units / self._slots.n_units).tolist(), strict=True))}

    def check(self, point: Any) -> Point:
        """The candidate in plain form, once it is valid.

        Raises:
            PrunekitError: it does not belong to this space, or exceeds a budget.
        """
        found = super().check(point)
        gone = self._gone(found)
        for budget in self.limited:
            limit, cost = found.get(budget.name, budget.limit), budget.table.of(gone)
            if cost > limit * (1 + 1e-9):
                raise PrunekitError(
                    f"this candidate costs {cost:,.6g} {budget.name}, more than its budget of {limit:,.6g}; "
                    "fit it first: space.fitted(candidate)"
                )
        return found

    def _gone(self, point: Point) -> dict[str, int]:
        """Group → number of units removed; groups inside a removed layer are left out."""
        gone = {group.name: int(point[name]) for name, group in self.whole.items()}
        lost = {group.layer for group in self.whole.values() if gone[group.name]}
        kept = {name: group for name, group in self.units.items() if group.layer not in lost}
        return gone | {group.name: round(point[name] * group.n_units) for name, group in kept.items()}

    def plan(self, point: Point) -> PruningPlan:
        """The pruning plan of a candidate: each group loses its share of units, lowest scores first.

        Raises:
            PrunekitError: the candidate does not belong to this space.
        """
        point = self.check(point)
        label = point.get(IMPORTANCE, next(iter(self.importances)))
        order = self._order[label]
        gone = {name: order.get(name, [0])[:number] for name, number in self._gone(point).items()}
        return plan_without(self.groups, gone, {"point": point, "importance": label})

    def point_of(self, plan: PruningPlan, importance: str | None = None) -> Point | None:
        """The candidate closest to a plan: the same shares, fitted to the budgets; None if there is no such candidate.

        A search can start from it. The units are ranked by `importance`, so they may differ from the plan's.
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
        """The function that cuts the model, and the plan as plain data."""
        plan = self.plan(point)
        calib = self.compensate if point.get(COMPENSATE) else None
        data = {name: getattr(plan, name) for name in ("keep", "n_units", "n_parameters", "n_parameters_kept")}
        return partial(cut, calib=calib), data

    def costs(self, point: Point) -> dict[str, float]:
        """Costs by name: parameters, and those that the budgets limit."""
        gone = self._gone(self.check(point))
        return {"parameters": int(self._parameters.of(gone))} | {b.name: b.table.of(gone) for b in self.limited}

    def described(self) -> dict[str, Any]:
        """Identity of the space: hyperparameters, budgets, and a digest of the score order and calibration tokens."""
        digest = sha256(json.dumps(self._order).encode())
        if self.compensate is not None:
            digest.update(bytes_of(self.compensate))
        limits = [[budget.name, repr(budget.limit)] for budget in self.limited]
        budgets = {"budgets": limits, "digest": digest.hexdigest()}
        return {**super().described(), **budgets, "min_units": self.min_units, "whole_layers": self.whole_layers}

    def __repr__(self) -> str:
        budgets = ", ".join(map(repr, self.limited))
        return (
            f"PlanSpace({len(self.knobs)} hyperparameters: {len(self.units)} groups in {len(self.layers)} layers by "
            f"{' or '.join(self.importances)}; {budgets})"
        )

    @cached_property
    def limited(self) -> tuple[Budget, ...]:
        """The budgets; a pruning ratio becomes one on parameters."""
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
    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Least and largest number of units removed from each group."""
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
        """Cost that is left when everything that may be removed is removed."""
        table, most = budget.table, dict(zip(self.units, self._bounds[1].tolist(), strict=True))
        saved = {name: float(table.of_group(group.name)[most[name]]) for name, group in self.units.items()}
        wins = [
            float(table.of_group(whole.name)[1])
            - sum(saved[n] for n, g in self.units.items() if g.layer == whole.layer)
            for whole in self.whole.values()
        ]
        return table.total - sum(saved.values()) - sum(sorted(wins)[::-1][: self.whole_layers])


def _units_in(share: Any, n_units: int) -> tuple[int, int]:
    """Least and largest number of units in a range of shares."""
    least = math.ceil(share.low * n_units - 1e-6)
    return least, max(math.floor(share.high * n_units + 1e-6), least)
