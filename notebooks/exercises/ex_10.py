"""Exercises of notebook 10: meet a budget, judge a predictor by its best, and the Pareto front."""

import math
from collections.abc import Callable, Sequence

from exercises.answers import forgiving, hint_for

Scaled = Callable[[Sequence[float], Sequence[int], float], list[float]]
Best = Callable[[Sequence[float], Sequence[float], int], float]
Front = Callable[[Sequence[float], Sequence[float]], list[int]]

COSTS = (30.0, 10.0, 20.0, 40.0, 20.0, 50.0, 10.0)  # 10 and 20 are there twice
VALUES = (5.0, 9.0, 4.0, 4.5, 6.0, 3.0, 8.0)
FRONT = [6, 2, 5]  # 3 is better than its cheaper neighbour 0, and still worse than 2


def stub_scaled(shares: Sequence[float], sizes: Sequence[int], to_remove: float) -> list[float]:
    """What the notebook starts from: the shares as they were drawn."""
    return list(shares)


def solution_scaled(shares: Sequence[float], sizes: Sequence[int], to_remove: float) -> list[float]:
    """One factor for all: what should go over what would go."""
    factor = to_remove / sum(share * size for share, size in zip(shares, sizes, strict=True))
    return [factor * share for share in shares]


@forgiving()
def check_scaled(answer: Scaled) -> str:
    """`✓ …` where the answer is right, or else a hint at the mistake."""
    shares, sizes = [0.2, 0.4, 0.6], [100, 50, 200]  # 20 + 20 + 120 = 160 would go
    got = answer(list(shares), list(sizes), 80.0)
    if not isinstance(got, list) or len(got) != 3:
        return f"Return one share for each of the 3 groups; you return {got!r}."
    hints = {
        (0.1, 0.2, 0.3): "✓ Right: one common factor, so the proportions stay and the budget is met.",
        (
            0.2,
            0.4,
            0.6,
        ): "These are the drawn shares. They would remove 20 + 20 + 120 = 160 parameters, and 80 should go.",
        (80 / 350,)
        * 3: "All groups get the same share now. Keep the proportions of the drawn shares: one factor for all.",
        (0.4, 0.8, 1.2): "The factor is upside down: it should be what should go over what would go.",
        (
            0.2 / 1.2 * 80 / 350,
            0.4 / 1.2 * 80 / 350,
            0.6 / 1.2 * 80 / 350,
        ): "Groups have different sizes: weigh each share by the size of its group.",
        (
            0.2 * 80 / 350,
            0.4 * 80 / 350,
            0.6 * 80 / 350,
        ): "You divide by the size of the model. Divide by what the drawn shares would remove: 160.",
        (10.0, 10.0, 60.0): "These are numbers of parameters. Return shares.",
    }
    for value, hint in hints.items():
        if all(abs(a - b) < 1e-5 * max(1, abs(b)) for a, b in zip(got, value, strict=True)):
            return hint
    removed = sum(share * size for share, size in zip(got, sizes, strict=True))
    return f"Your shares {got} remove {removed:.4g} parameters, and 80 should go, in the proportions 1 : 2 : 3."


def stub_best_found(predicted: Sequence[float], measured: Sequence[float], k: int) -> float:
    """What the notebook starts from: those with the highest predictions."""
    order = [sorted(range(len(values)), key=lambda i: -values[i])[:k] for values in (predicted, measured)]
    return len(set(order[0]) & set(order[1])) / k


def solution_best_found(predicted: Sequence[float], measured: Sequence[float], k: int) -> float:
    """The k lowest of each; how many are the same?"""
    first, second = (set(sorted(range(len(v)), key=v.__getitem__)[:k]) for v in (predicted, measured))
    return len(first & second) / k


@forgiving()
def check_best_found(answer: Best) -> str:
    """`✓ …` where the answer is right, or else a hint at the mistake."""
    predicted = [0.10, 0.70, 0.30, 0.90, 0.20, 0.50, 0.40, 0.80]  # lowest: 0 4 2 6; highest: 3 7 1 5
    measured = [0.20, 0.90, 0.10, 0.60, 0.50, 0.30, 0.40, 0.70]  # lowest: 2 0 5 6; highest: 1 7 3 4
    got = answer(predicted, measured, 4)
    told = hint_for(
        got,
        {
            0.75: "",
            3.0: "This is the number. Return the share of the k best.",
            3 / 8: "Divide by k, not by the number of all samples.",
            0.0: "You compare places in the two orders. A sample counts wherever it stands among the k best.",
            0.25: "You compare place by place. A sample counts wherever it stands among the k best of both.",
            1.0: "You compare values or all samples. Take the numbers of the k best of each, then what they share.",
        },
        f"Of the 4 lowest predictions (0, 4, 2, 6) and the 4 lowest measured values (2, 0, 5, 6) three are the same; "
        f"you have {got!r}.",
    )
    if told:
        return told
    if abs(answer([1.0, 2.0, 3.0], [1.0, 3.0, 2.0], 1) - 1.0) > 1e-6:
        return "You take the highest values. Perplexity and its prediction are better if they are lower."
    return "✓ Right: this is what a search needs, and it can be low where the rank correlation is high."


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
