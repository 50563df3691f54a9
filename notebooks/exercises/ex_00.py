"""Exercise of notebook 00: which share of the lost accuracy did recovery win back?"""

from collections.abc import Callable, Sequence

from exercises.answers import forgiving

Share = Callable[[Sequence[float], Sequence[float], Sequence[float]], float | None]


def stub_share_won_back(dense: Sequence[float], cut: Sequence[float], recovered: Sequence[float]) -> float | None:
    """Share of the accuracy lost by the cut that recovery won back, over all tasks together."""
    return None


def solution_share_won_back(dense: Sequence[float], cut: Sequence[float], recovered: Sequence[float]) -> float:
    """What all tasks won back together, over what they lost together."""
    lost = sum(dense) - sum(cut)
    return (sum(recovered) - sum(cut)) / lost


@forgiving()
def check_share_won_back(answer: Share) -> str:
    """Text that begins with ✓ where the answer is right, else a hint at the mistake."""
    dense, cut, recovered = [1.0, 0.8], [0.6, 0.79], [0.8, 0.81]
    got = answer(dense, cut, recovered)
    if got is None:
        return "Your function returns nothing yet: how much was lost, how much came back, and what is their ratio?"
    known = {
        0.22 / 0.41: "✓ Right: a ratio of sums, so a task that lost almost nothing does not dominate the result.",
        (0.5 + 2.0) / 2: "This is the mean of each task's ratio; a task that lost one point counts as much as one "
        "that lost forty. Sum (or average) over the tasks first, and divide last.",
        1.61 / 1.8: "This compares recovered with dense. A recovery that did nothing should score 0.",
        0.19 / 0.41: "This is the share that is still missing. What came back is recovered less cut.",
        0.22 / 1.39: "Divide by what was lost (dense less cut), not by what was left.",
        0.22 / 2: "This is what came back, in points of accuracy. Divide by what was lost.",
    }
    hints = [text for value, text in known.items() if abs(got - value) < 1e-6]
    return (
        hints[0]
        if hints
        else (
            f"For dense {dense}, cut {cut} and recovered {recovered} your answer is {got:.4g}. "
            "The tasks lost 0.41 together, and 0.22 came back."
        )
    )
