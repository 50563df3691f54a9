"""Exercises of notebook 00: the size of a channel, right answers, and the share of the lost accuracy won back."""

from collections.abc import Callable, Sequence

from exercises.answers import forgiving

ANSWERS = ["Oslo", "Rome", "Oslo", "Delhi", "Cairo", "red car", "no", "7"]
TRUTHS = ["Oslo", "Delhi", "Oslo", "Cairo", "Rome", "red", "yes", "8"]

Size = Callable[[int, int], int]
Count = Callable[[list[str], list[str]], int]
Share = Callable[[Sequence[float], Sequence[float], Sequence[float]], float | None]


def stub_channel_parameters(d_model: int, d_ff: int) -> int:
    """What the notebook starts from: the number of channels."""
    return d_ff


def solution_channel_parameters(d_model: int, d_ff: int) -> int:
    """A row of gate_proj, a row of up_proj and a column of down_proj, each of d_model numbers."""
    return 3 * d_model


@forgiving()
def check_channel_parameters(answer: Size) -> str:
    """`✓ …` where the answer is right, or else a hint at the mistake."""
    d_model, d_ff = 10, 40
    got = answer(d_model, d_ff)
    hints = {
        30: "✓ Right: a row of gate_proj, a row of up_proj and a column of down_proj, d_model numbers each.",
        40: "This is the number of channels, or the length of a row of down_proj. A channel is a *column* there.",
        10: "This is one row of one matrix. A channel has a part in each of the three matrices.",
        20: "These are two of the three matrices. The third one reads the channel.",
        60: "Two rows and one column have d_model numbers each; that is three parts of 10, not 60.",
        1200: "These are all channels together. How much of it belongs to one?",
        400: "This is a whole matrix. One channel is one row or one column of it.",
        120: "A row of gate_proj has d_model numbers, not d_ff. The same holds for the two other parts.",
    }
    return hints.get(got) or (
        f"For d_model={d_model} and d_ff={d_ff} you have {got!r}. Add up the lengths of one row of gate_proj, one row "
        "of up_proj and one column of down_proj."
    )


def stub_count_right(answers: list[str], truths: list[str]) -> int:
    """What the notebook starts from: texts that occur in both lists, wherever they stand."""
    return len(set(answers) & set(truths))


def solution_count_right(answers: list[str], truths: list[str]) -> int:
    """Question by question."""
    return sum(answer == truth for answer, truth in zip(answers, truths, strict=True))


@forgiving()
def check_count_right(answer: Count) -> str:
    """`✓ …` where the answer is right, or else a hint at the mistake."""
    got = answer(list(ANSWERS), list(TRUTHS))
    if isinstance(got, bool):
        return "This compares the two lists as a whole. Compare them question by question, and count."
    hints = {
        2: "✓ Right: question by question, so the same word at another place does not count.",
        3: "A part of a text is enough for you: 'red' is in 'red car'. The whole texts must be equal.",
        4: "These are the texts that occur in both lists. A set forgets the place, and counts equal texts once.",
        5: "You ask whether an answer occurs anywhere among the truths. Compare it with the truth of its own question.",
        6: "These are the wrong answers.",
        8: "This is the number of questions. Count only the right answers.",
        0.25: "This is the share. Return the number.",
    }
    return hints.get(got) or (
        f"For the answers {ANSWERS} and the truths {TRUTHS} you have {got!r}. Two answers are right. "
        "`zip(answers, truths)` gives you the answer and the truth of one question at a time."
    )


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
        0.22: "This is what came back, in points of accuracy. Divide by what was lost, 0.41.",
    }
    hints = [text for value, text in known.items() if abs(got - value) < 1e-6]
    if hints and hints[0].startswith("✓"):
        if abs(answer([1.0, 0.9], [0.8, 0.8], [0.7, 0.7]) + 2 / 3) > 1e-6:
            return "If recovery makes it worse, the share is below 0: here -0.67. Do not cut it off, and take no |…|."
        if abs(answer([0.9] * 3, [0.6, 0.8, 0.7], [0.9, 1.0, 1.0]) - 4 / 3) > 1e-6:
            return "If the small model ends up better than the dense one, the share is above 1. Add up all tasks."
    return (
        hints[0]
        if hints
        else (
            f"For dense {dense}, cut {cut} and recovered {recovered} your answer is {got:.4g}. "
            "The tasks lost 0.41 together, and 0.22 came back."
        )
    )
