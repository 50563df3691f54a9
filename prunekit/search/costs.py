"""Cost tables and budgets: the cost of a pruned model as a sum over groups, known before the cut."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from prunekit.annotations import is_real
from prunekit.discovery import Groups
from prunekit.errors import PrunekitError
from prunekit.pruning.steps import Counter, Step, parameters_per_unit
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
        return f"CostTable({self.name}; {_shown(self.total)} in all; {len(self.saved)} groups)"


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
        between = f"{_shown(self.low)} to " if self.ranged else ""
        return f"{self.name} ≤ {between}{_shown(self.high)} of {_shown(self.table.total)}"


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
                f"{budget!r} cannot be met: pruning reaches {_shown(left)} at best; give that or more, or allow "
                "more kinds or whole layers"
            )
    if all(budget.low >= budget.table.total for budget in budgets):
        raise PrunekitError(f"{budgets[0]!r}: the dense model costs no more than that already; give less")


def _shown(cost: float) -> str:
    """A whole number in full, any other with four significant digits."""
    return f"{cost:,.0f}" if float(cost).is_integer() else f"{cost:,.4g}"
