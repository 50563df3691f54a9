"""Exercises of notebook 15: a figure beside its own control, a share of claims, a difference beyond the spread."""

from collections.abc import Callable, Sequence

from exercises.answers import forgiving, hint_for

Divide = Callable[[float, float, float], float]
Share = Callable[[Sequence[str]], float]
Clear = Callable[[Sequence[float], Sequence[float]], bool]


def stub_times_control(recovered: float, dense: float, control: float) -> float:
    """What the notebook starts from: the trained cut model beside the untrained dense one."""
    return recovered / dense


def solution_times_control(recovered: float, dense: float, control: float) -> float:
    """Both models were trained."""
    return recovered / control


@forgiving()
def check_times_control(times_control: Divide) -> str:
    """`✓ …` where the answer is right, or else a hint at the first thing that is not."""
    found = times_control(66.0, 50.0, 40.0)
    hints = {
        1.65: "✓ Right: both models read the same text, so what the text brings to any model cancels.",
        1.32: "This divides by the dense model before training. Which model was trained as the cut one was?",
        40 / 66: "Upside down: 1 should mean that the cut model is level with its control, and 2 twice its perplexity.",
        26.0: "A difference of perplexities depends on the text. Divide, so that texts and models can be compared.",
    }
    otherwise = "For a recovered model at 66, a dense one at 50 and a control at 40, the ratio should be 1.65."
    return hint_for(found, hints, otherwise)


def stub_share_that_holds(directions: Sequence[str]) -> float:
    """What the notebook starts from: all claims in the denominator."""
    return sum(direction == "holds" for direction in directions) / len(directions)


def solution_share_that_holds(directions: Sequence[str]) -> float:
    """Of the claims that were measured."""
    measured = [direction for direction in directions if direction != "not measured"]
    return sum(direction == "holds" for direction in measured) / len(measured)


@forgiving()
def check_share_that_holds(share_that_holds: Share) -> str:
    """`✓ …` where the answer is right, or else a hint at the first thing that is not."""
    directions = ["holds"] * 5 + ["does not hold"] * 3 + ["not measured"] * 12
    found = share_that_holds(directions)
    hints = {
        5 / 8: "✓ Right: what was not measured counts neither for nor against.",
        5 / 20: "All claims are in the denominator, so a claim that was not measured counts as one that fails.",
        17 / 20: "Here a claim that was not measured counts as one that holds. Leave it out.",
        5.0: "This is the number of claims that hold. Return their share of those that were measured.",
        3 / 8: "This is the share that does not hold.",
        8 / 20: "This is the share that was measured: 'does not hold' contains 'hold'. Compare the whole text.",
        1.0: "'does not hold' contains 'hold', so that all measured claims count. Compare the whole text.",
    }
    otherwise = "Five hold, three do not, twelve were not measured: the share should be 5 / 8. Count 'holds' exactly."
    return hint_for(found, hints, otherwise)


def stub_is_clear(claimed: Sequence[float], beside: Sequence[float]) -> bool:
    """What the notebook starts from: means."""
    return sum(claimed) / len(claimed) < sum(beside) / len(beside)


def solution_is_clear(claimed: Sequence[float], beside: Sequence[float]) -> bool:
    """The ranges do not overlap."""
    return max(claimed) < min(beside)


CLEAR_CASES = (  # claimed, beside, the answer, and a hint where the reader's is another
    ([3.6, 3.5, 3.7], [4.8, 4.7, 4.9], True, "here every value of the first list is below all of the second."),
    ([4.5, 4.4, 5.0], [4.8, 4.7, 4.9], False, "the means say yes, and 5.0 is above 4.7: the ranges overlap."),
    ([3.6, 3.5, 4.75], [4.8, 4.7, 4.9], False, "seed by seed it is lower, but 4.75 is above 4.7: the ranges overlap."),
    ([3.6, 3.5, 4.7], [4.8, 4.7, 4.9], False, "4.7 stands on both sides: the ranges touch, so nothing lies between."),
    ([5.1, 4.6, 5.2], [4.8, 4.7, 4.9], False, "only the best value of the first list is lower. Take its worst one."),
    ([4.8, 4.7, 4.9], [3.6, 3.5, 3.7], False, "the ranges lie apart, but the wrong way round: lower is better."),
)


@forgiving()
def check_is_clear(is_clear: Clear) -> str:
    """`✓ …` where the answer is right, or else a hint at the first thing that is not."""
    for claimed, beside, right, hint in CLEAR_CASES:
        found = is_clear(claimed, beside)
        if found not in (True, False):
            return f"You return {found!r}: return True or False, whether the claim holds clearly."
        if bool(found) != right:
            return f"For {claimed} beside {beside} you say {bool(found)}: {hint}"
    return "✓ Right: the worst of one is better than the best of the other. With three seeds this is still a weak test."
