"""What a model costs, as a sum over groups: by which a budget is known to be met before anything is cut."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from prunekit.checks import is_real
from prunekit.discovery import Groups
from prunekit.errors import PrunekitError
from prunekit.pruning.steps import Counter, Step, parameters_per_unit
from prunekit.search.knobs import Range


@dataclass(frozen=True, eq=False)
class CostTable:
    """A cost of the whole model, and what is saved as units of its groups go.

    Costs add up over groups that own no parameter together: exactly for parameters and multiply-accumulates, about for
    time, which is why a table of latencies is checked end to end.

    Attributes:
        name: such as `"parameters"`; the unit of measure stands in it where there is one (`"decode_ms"`).
        total: cost of the dense model.
        saved: group name → float (n_units + 1,), not falling: what is saved when 0, 1, … of its units are gone.
        measure: model → the cost, where it is measured; None where it is counted.
    """

    name: str
    total: float
    saved: Mapping[str, np.ndarray]
    measure: Callable[[nn.Module], float] | None = None

    def of(self, gone: Mapping[str, int]) -> float:
        """Cost of a model that has lost so many units of each group.

        Raises:
            PrunekitError: a group that the table does not know.
        """
        return self.total - sum(float(self.of_group(name)[number]) for name, number in gone.items())

    def of_group(self, name: str) -> np.ndarray:
        """What a group saves.

        Raises:
            PrunekitError: the table does not know it.
        """
        if name not in self.saved:
            raise PrunekitError(
                f"the table of {self.name} has no {name!r}; make it of all kinds that may go, kinds=(…)"
            )
        return self.saved[name]

    def at_most(self, limit: float | Range) -> "Budget":
        """A budget on this cost; a range makes a knob of it."""
        return Budget(self, limit)

    def __repr__(self) -> str:
        return f"CostTable({self.name}; {_shown(self.total)} in all; {len(self.saved)} groups)"


@dataclass(frozen=True, eq=False)
class Budget:
    """At most so much of a cost, or any limit in a range.

    Attributes:
        table: of the cost.
        limit: one number, or a range, from which every point takes its own.
    """

    table: CostTable
    limit: float | Range

    def __post_init__(self) -> None:
        if not is_real(self.low) or self.low <= 0:
            raise PrunekitError(f"a budget of {self.limit!r} {self.name} is not allowed; give one above 0, or a Range")

    @property
    def name(self) -> str:
        """Of the cost."""
        return self.table.name

    @property
    def ranged(self) -> bool:
        """Whether every point takes its own limit."""
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
    """Parameters, exactly.

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
    """Budgets as they are, or the one that a pruning ratio, or a range of them, stands for.

    Raises:
        PrunekitError: what is neither.
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
    """Refuse what cannot be met, and what asks for nothing.

    Args:
        budgets: of one space.
        least_left: what of a budget's cost is left where all goes that may.

    Raises:
        PrunekitError: a budget below what must stay, at the lower end of its range too; or none that is below what the
            dense model costs.
    """
    for budget in budgets:
        left = least_left(budget)
        if left > budget.low * (1 + 1e-12):
            raise PrunekitError(
                f"{budget!r} cannot be met: {_shown(left)} must stay with what may be cut; give that or more, or allow "
                "more kinds or whole layers"
            )
    if all(budget.low >= budget.table.total for budget in budgets):
        raise PrunekitError(f"{budgets[0]!r}: the dense model costs no more than that already; give less")


def _shown(cost: float) -> str:
    """A whole number as it is, another with four digits that count."""
    return f"{cost:,.0f}" if float(cost).is_integer() else f"{cost:,.4g}"
