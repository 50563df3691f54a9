"""Exercise of notebook 10: the Pareto front, the samples for which no other is both cheaper and better."""

import math
from collections.abc import Callable, Sequence

from exercises.answers import forgiving

Front = Callable[[Sequence[float], Sequence[float]], list[int]]

COSTS = (30.0, 10.0, 20.0, 40.0, 20.0, 50.0, 10.0)  # 10 and 20 are there twice
VALUES = (5.0, 9.0, 4.0, 4.5, 6.0, 3.0, 8.0)
FRONT = [6, 2, 5]  # 3 is better than its cheaper neighbour 0, and still worse than 2


def stub_front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """What the notebook starts from: four things are wrong with it."""
    order = sorted(range(len(costs)), key=lambda i: -costs[i])
    return [i for before, i in zip(order, order[1:]) if values[i] < values[before]]  # noqa: B905


def solution_front(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """The cheapest first, of equal ones the better first; one that is better than all before it stays."""
    best, found = math.inf, []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], values[i])):
        if values[i] < best:
            best = values[i]
            found.append(i)
    return found


@forgiving()
def check_front(front: Front) -> str:
    """`✓ …` where the answer is right, or else a hint at the first thing that is not."""
    found = front(COSTS, VALUES)
    if not isinstance(found, list) or not all(isinstance(i, int) and 0 <= i < len(COSTS) for i in found):
        return f"Return a list of indices, numbers from 0 to {len(COSTS) - 1}; you return {found!r}."
    costs = [COSTS[i] for i in found]
    if costs != sorted(costs):
        return (
            f"The costs on your front are {costs}: begin with the cheapest. "
            "A more expensive sample must be better than all before it."
        )
    return _hint(found) or _hint_at_one(front) or "✓ Right: along the front a higher cost always brings a better value."


def _hint(found: list[int]) -> str:
    if 6 not in found and 1 not in found:
        return "The cheapest one of all is missing: no other is as cheap, so it is on the front."
    if 3 in found or 0 in found:
        worse = 3 if 3 in found else 0
        return (
            f"Sample {worse} costs {COSTS[worse]:g} and measures {VALUES[worse]:g}; sample 2 is cheaper and better. "
            "Compare each with the best of all cheaper ones, not with its neighbour."
        )
    if 1 in found or 4 in found:
        worse, better = (1, 6) if 1 in found else (4, 2)
        return (
            f"Samples {worse} and {better} cost the same, and {better} is better: sort equal costs by what is measured."
        )
    return "" if found == FRONT else f"The front is {FRONT}; yours is {found}."


def _hint_at_one(front: Front) -> str:
    if front((1.0,), (2.0,)) != [0]:
        return "Of one architecture alone the front is that one: [0]."
    if front((1.0, 2.0), (3.0, 3.0)) != [0]:
        return "Two have the same value, and one costs more: that one is not on the front."
    return ""
