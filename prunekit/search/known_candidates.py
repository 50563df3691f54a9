"""Candidates that need no search: local and global selection by each importance."""

from prunekit.errors import PrunekitError
from prunekit.pruning import PruningPlan, plan
from prunekit.search.architectures import PlanSpace
from prunekit.search.space import Point

HALVINGS = 10  # of the interval in which the pruning ratio lies


def known_points(space: PlanSpace) -> list[Point]:
    """The candidates of local and global selection by each importance, fitted to the budgets.

    Global selection compares scores across groups as they are, which is poor for magnitudes.
    """
    found = []
    for label in space.importances:
        for ranking in ("local", "global"):
            chosen = _within(space, label, ranking)
            found.append(None if chosen is None else space.point_of(chosen, label))
    return [point for point in found if point is not None]


def _within(space: PlanSpace, label: str, ranking: str) -> PruningPlan | None:
    """The plan with the lowest pruning ratio that meets the budgets; None if none is found."""
    low, high, best = 0.0, 1.0, None
    for _ in range(HALVINGS):
        ratio = (low + high) / 2
        chosen = _plan(space, label, ranking, ratio)
        if chosen is None:  # more than can go
            high = ratio
        elif _meets(space, chosen):
            best, high = chosen, ratio
        else:
            low = ratio
    return best


def _plan(space: PlanSpace, label: str, ranking: str, ratio: float) -> PruningPlan | None:
    try:
        return plan(
            space.groups, space.importances[label], ratio,
            kinds=space.kinds, ranking=ranking, min_units=space.min_units,
        )  # fmt: skip
    except PrunekitError:
        return None


def _meets(space: PlanSpace, chosen: PruningPlan) -> bool:
    return all(budget.table.of(chosen.n_removed) <= budget.high for budget in space.limited)
