"""How many units of each group go, so that budgets are met: shares are scaled up together until all of them are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import brentq

from prunekit.pruning.budgets import TOLERANCE
from prunekit.search.costs import CostTable

ROUNDING = 1e-12  # of a cost, by which a sum of floats may be above its limit

Limits = Mapping[str, float]  # name of a cost → what of it may be left


@dataclass(frozen=True, eq=False)
class Slots:
    """Groups that may be cut, side by side.

    Attributes:
        names: of the groups.
        n_units: units of each, integers (n,).
        tables: of the costs that are limited.
    """

    names: Sequence[str]
    n_units: np.ndarray
    tables: Sequence[CostTable]

    def fit(self, weights: np.ndarray, limits: Limits, least: np.ndarray, most: np.ndarray) -> np.ndarray | None:
        """Units that go of each group, integers (n,), with all limits met, and one of them within the tolerance.

        Shares are `weights` times one factor, the smallest that will do. Units so large that one of them may miss the
        tolerance are rounded first, and the shares of the others make up for it.

        Args:
            weights: not negative, (n,); a group of weight 0 loses no more than `least`.
            limits: of each table's cost.
            least: units that go at least, integers (n,).
            most: units that may go, integers (n,).

        Returns:
            The numbers, or None where these weights cannot meet the limits, whatever the factor.
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
        """Whether all limits are."""
        return self._excess(units, limits) <= ROUNDING

    def _excess(self, units: np.ndarray, limits: Limits) -> float:
        """By what part of its total a cost is above its limit, of that of which it is most; below 0 where none is."""
        return max((self.cost(table, units) - limits[table.name]) / table.total for table in self.tables)

    def cost(self, table: CostTable, units: np.ndarray) -> float:
        """What is left of a cost; between two numbers of units it is interpolated."""
        stacked, floor = self._stacked[table.name], units.astype(int)
        rows = np.arange(len(floor))
        below, above = stacked[rows, floor], stacked[rows, np.minimum(floor + 1, self.n_units)]
        return float(table.total - (below + (units - floor) * (above - below)).sum())

    def _scaled(self, weights: np.ndarray, limits: Limits, least: np.ndarray, most: np.ndarray) -> np.ndarray | None:
        """Numbers of units before rounding, by the smallest factor that meets all limits."""

        def at(factor: float) -> np.ndarray:
            return np.clip(factor * weights * self.n_units, least, most)

        if not self.met(most, limits):
            return None
        if self.met(least, limits) or not (weights > 0).any():
            return least
        high = 1 / float(weights[weights > 0].min())  # at which all that may go does
        if self._excess(most, limits) >= 0:  # no more than rounding is to spare
            return most
        return at(brentq(lambda factor: self._excess(at(factor), limits), 0.0, high, rtol=1e-9, disp=False))

    def _whole(self, exact: np.ndarray, limits: Limits, most: np.ndarray) -> np.ndarray | None:
        """Rounded down, then up again one by one, the largest remainders first, until the limits are met."""
        units = np.floor(exact + 1e-9)
        for slot in np.argsort(units - exact, kind="stable"):
            if self.met(units, limits):
                break
            units[slot] = min(units[slot] + 1, most[slot])
        return units.astype(int) if self.met(units, limits) and self._near(units, limits) else None

    def _near(self, units: np.ndarray, limits: Limits) -> bool:
        """Whether little went in vain: a limit is used up to within the tolerance or a unit, or nothing had to go."""
        return -self._excess(units, limits) <= max(TOLERANCE, self._unit_costs.min()) or not units.any()

    @cached_property
    def _stacked(self) -> dict[str, np.ndarray]:
        """Name of a cost → what each group saves, (n, most units + 1)."""
        width = int(self.n_units.max()) + 1
        return {t.name: np.stack([np.resize(t.of_group(name), width) for name in self.names]) for t in self.tables}

    @cached_property
    def _large(self) -> np.ndarray:
        """Groups of which one unit may miss the tolerance, bool (n,); where all are such, none counts as one."""
        large = self._unit_costs > TOLERANCE
        return large & ~large.all()

    @cached_property
    def _unit_costs(self) -> np.ndarray:
        """What one unit of each group costs, as a part of all, of that cost of which it is most; (n,)."""
        shares = [
            [t.of_group(name).max() / n / t.total for t in self.tables]
            for name, n in zip(self.names, self.n_units, strict=True)
        ]
        return np.array(shares).reshape(len(self.names), -1).max(1, initial=0.0)
