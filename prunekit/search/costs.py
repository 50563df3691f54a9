"""Costs of a model and of its parts, budgets, and the numbers of units that meet them: known before the cut."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.optimize import brentq
from torch import nn

from prunekit.annotations import is_real, readable
from prunekit.discovery import Groups
from prunekit.errors import PrunekitError
from prunekit.pruning.budgets import TOLERANCE, Counter, Step, parameters_per_unit
from prunekit.search.hyperparameters import Range


@dataclass(frozen=True, eq=False)
class CostTable:
    """A cost of the dense model, and what removing units of each group saves.

    Savings add up over groups that share no parameter: exactly for parameters and multiply-accumulates, roughly for
    time. Check a table of latencies end to end with `check_table`.

    Attributes:
        name: such as `"parameters"`; it ends in the unit of measure if there is one (`"decode_ms"`).
        total: cost of the dense model.
        saved: group name → float (n_units + 1,), non-decreasing: the saving when 0, 1, … units are removed.
        measure: model → the measured cost; None for a counted cost.
    """

    name: str
    total: float
    saved: Mapping[str, np.ndarray]
    measure: Callable[[nn.Module], float] | None = None

    def of(self, gone: Mapping[str, int]) -> float:
        """Cost of a model that has lost so many units of each group.

        Raises:
            PrunekitError: the table does not contain a group.
        """
        return self.total - sum(float(self.of_group(name)[number]) for name, number in gone.items())

    def of_group(self, name: str) -> np.ndarray:
        """Saving for each number of removed units of a group.

        Raises:
            PrunekitError: the table does not contain it.
        """
        if name not in self.saved:
            raise PrunekitError(
                f"the table of {self.name} has no {name!r}; make it of all kinds that may go, kinds=(…)"
            )
        return self.saved[name]

    def at_most(self, limit: float | Range) -> "Budget":
        """A budget on this cost; a `Range` makes the limit a hyperparameter."""
        return Budget(self, limit)

    def __repr__(self) -> str:
        return f"CostTable({self.name}; {readable(self.total)} in all; {len(self.saved)} groups)"


@dataclass(frozen=True, eq=False)
class Budget:
    """An upper limit on a cost, or a range of limits.

    Attributes:
        table: the cost table.
        limit: a number, or a range in which each candidate sets its own limit.
    """

    table: CostTable
    limit: float | Range

    def __post_init__(self) -> None:
        if not is_real(self.low) or self.low <= 0:
            raise PrunekitError(f"a budget of {self.limit!r} {self.name} is not allowed; give one above 0, or a Range")

    @property
    def name(self) -> str:
        """Name of the cost."""
        return self.table.name

    @property
    def ranged(self) -> bool:
        """Whether each candidate sets its own limit."""
        return isinstance(self.limit, Range)

    @property
    def low(self) -> float:
        """The least limit."""
        return self.limit.low if isinstance(self.limit, Range) else self.limit

    @property
    def high(self) -> float:
        """The largest limit."""
        return self.limit.high if isinstance(self.limit, Range) else self.limit

    def __repr__(self) -> str:
        between = f"{readable(self.low)} to " if self.ranged else ""
        return f"{self.name} ≤ {between}{readable(self.high)} of {readable(self.table.total)}"


def parameter_table(groups: Groups) -> CostTable:
    """A table of exact parameter counts.

    Args:
        groups: what `discover` found.
    """
    saved = {}
    for group in groups:
        if group.n_units == 1:  # a layer or block, of which several dimensions of a parameter may go at once
            saved[group.name] = np.array([0.0, Counter(groups).cost(Step(group, (0,), 0.0))])
        else:
            saved[group.name] = parameters_per_unit(groups, group) * np.arange(group.n_units + 1.0)
    return CostTable("parameters", groups.n_parameters, saved)


def budgets_of(groups: Groups, given: object) -> tuple[Budget, ...]:
    """The budgets; a pruning ratio or a range of ratios becomes one on parameters.

    Raises:
        PrunekitError: neither budgets nor a pruning ratio.
    """
    given = [given] if isinstance(given, Budget) else given
    if isinstance(given, Sequence) and given and all(isinstance(budget, Budget) for budget in given):
        names = [budget.name for budget in given]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise PrunekitError(f"two budgets are on {twice!r}; give one, or dataclasses.replace(table, name=…)")
        return tuple(given)
    ratios: Any = (given.low, given.high) if isinstance(given, Range) else (given,)
    if not all(is_real(ratio) and 0 <= ratio < 1 for ratio in ratios):
        raise PrunekitError(
            f"budgets={given!r:.80}; give a pruning ratio in [0, 1), a Range of them, or "
            "[parameter_table(groups).at_most(…)]"
        )
    table = parameter_table(groups)
    left = [(1 - ratio) * table.total for ratio in reversed(ratios)]
    return (table.at_most(Range(*left) if len(left) > 1 else left[0]),)


def check_budgets(budgets: Sequence[Budget], least_left: Callable[[Budget], float]) -> None:
    """Raise an error for a budget that cannot be met or that the dense model already meets.

    Args:
        budgets: the budgets of one space.
        least_left: budget → the lowest cost that pruning can reach.

    Raises:
        PrunekitError: a budget below the lowest cost, also at the lower end of a range; or no budget is below the
            dense model's cost.
    """
    for budget in budgets:
        left = least_left(budget)
        if left > budget.low * (1 + 1e-12):
            raise PrunekitError(
                f"{budget!r} cannot be met: pruning reaches {readable(left)} at best; give that or more, or allow "
                "more kinds or whole layers"
            )
    if all(budget.low >= budget.table.total for budget in budgets):
        raise PrunekitError(f"{budgets[0]!r}: the dense model costs no more than that already; give less")


ROUNDING = 1e-12  # relative rounding error allowed above a limit

Limits = Mapping[str, float]  # cost name → its limit


@dataclass(frozen=True, eq=False)
class Slots:
    """The groups that may be cut, as arrays.

    Attributes:
        names: names of the groups.
        n_units: units of each group, integers (n,).
        tables: cost tables of the budgets.
    """

    names: Sequence[str]
    n_units: np.ndarray
    tables: Sequence[CostTable]

    def fit(self, weights: np.ndarray, limits: Limits, least: np.ndarray, most: np.ndarray) -> np.ndarray | None:
        """Number of units to remove from each group, integers (n,), so that all limits are met.

        At least one limit is used up to within the tolerance.

        Shares are `weights` times the smallest factor that meets the limits. Groups whose single unit exceeds the
        tolerance are rounded first; the other groups then correct the difference.

        Args:
            weights: not negative, (n,); a group of weight 0 loses no more than `least`.
            limits: cost name → its limit.
            least: least number of units to remove, integers (n,).
            most: largest number of units to remove, integers (n,).

        Returns:
            The numbers; None if no factor meets the limits.
        """
        most = np.where(weights > 0, most, least)
        exact = self._scaled(weights, limits, least, most)
        if exact is None:
            return None
        rounded = np.clip(np.rint(exact), least, most)
        least, most = (np.where(self._large, rounded, bound) for bound in (least, most))
        exact = self._scaled(weights, limits, least, most)
        return None if exact is None else self._whole(exact, limits, most)

    def met(self, units: np.ndarray, limits: Limits) -> bool:
        """Whether all limits are met."""
        return self._excess(units, limits) <= ROUNDING

    def _excess(self, units: np.ndarray, limits: Limits) -> float:
        """Largest excess of a cost over its limit, as a share of the total; negative if all limits are met."""
        return max((self.cost(table, units) - limits[table.name]) / table.total for table in self.tables)

    def cost(self, table: CostTable, units: np.ndarray) -> float:
        """Cost after removing units; fractions of a unit are interpolated."""
        savings, floor = self._savings[table.name], units.astype(int)
        below, above = savings[self._first + floor], savings[self._first + np.minimum(floor + 1, self.n_units)]
        return float(table.total - (below + (units - floor) * (above - below)).sum())

    def _scaled(self, weights: np.ndarray, limits: Limits, least: np.ndarray, most: np.ndarray) -> np.ndarray | None:
        """Numbers of units before rounding, for the smallest factor that meets all limits."""

        def at(factor: float) -> np.ndarray:
            return np.minimum(np.maximum(factor * weights * self.n_units, least), most)  # twice as fast as np.clip

        if not self.met(most, limits):
            return None
        if self.met(least, limits) or not (weights > 0).any():
            return least
        high = 1 / float(weights[weights > 0].min())  # removes everything that may be removed
        if self._excess(most, limits) >= 0:  # the limit is met only by rounding
            return most
        return at(brentq(lambda factor: self._excess(at(factor), limits), 0.0, high, rtol=1e-9, disp=False))

    def _whole(self, exact: np.ndarray, limits: Limits, most: np.ndarray) -> np.ndarray | None:
        """Round down, then up one by one, the largest remainders first, until the limits are met."""
        units = np.floor(exact + 1e-9)
        for slot in np.argsort(units - exact, kind="stable"):
            if self.met(units, limits):
                break
            units[slot] = min(units[slot] + 1, most[slot])
        return units.astype(int) if self.met(units, limits) and self._near(units, limits) else None

    def _near(self, units: np.ndarray, limits: Limits) -> bool:
        """Whether a limit is used up to within the tolerance or one unit, or no unit is removed."""
        return -self._excess(units, limits) <= max(TOLERANCE, self._unit_costs.min()) or not units.any()

    @cached_property
    def _savings(self) -> dict[str, np.ndarray]:
        """Cost name → savings by the number of units removed, all groups in one row; each begins at `_first`."""
        return {t.name: np.concatenate([t.of_group(name) for name in self.names]) for t in self.tables}

    @cached_property
    def _first(self) -> np.ndarray:
        """Where the savings of each group begin, (n,)."""
        return np.cumsum(self.n_units + 1) - (self.n_units + 1)

    @cached_property
    def _large(self) -> np.ndarray:
        """Groups whose single unit exceeds the tolerance, bool (n,); all False if all groups do."""
        large = self._unit_costs > TOLERANCE
        return large & ~large.all()

    @cached_property
    def _unit_costs(self) -> np.ndarray:
        """Largest relative cost of one unit of each group, (n,)."""
        shares = [
            [t.of_group(name).max() / n / t.total for t in self.tables]
            for name, n in zip(self.names, self.n_units, strict=True)
        ]
        return np.array(shares).reshape(len(self.names), -1).max(1, initial=0.0)
