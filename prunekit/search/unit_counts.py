"""Number of units to remove from each group: scales shares together until all budgets are met."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import brentq

from prunekit.pruning.budgets import TOLERANCE
from prunekit.search.costs import CostTable

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
        stacked, floor = self._stacked[table.name], units.astype(int)
        rows = np.arange(len(floor))
        below, above = stacked[rows, floor], stacked[rows, np.minimum(floor + 1, self.n_units)]
        return float(table.total - (below + (units - floor) * (above - below)).sum())

    def _scaled(self, weights: np.ndarray, limits: Limits, least: np.ndarray, most: np.ndarray) -> np.ndarray | None:
        """Numbers of units before rounding, for the smallest factor that meets all limits."""

        def at(factor: float) -> np.ndarray:
            return np.clip(factor * weights * self.n_units, least, most)

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
    def _stacked(self) -> dict[str, np.ndarray]:
        """Cost name → savings of each group, (n, largest n_units + 1)."""
        width = int(self.n_units.max()) + 1
        return {t.name: np.stack([np.resize(t.of_group(name), width) for name in self.names]) for t in self.tables}

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
