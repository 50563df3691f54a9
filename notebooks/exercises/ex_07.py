"""Exercises of notebook 07: the groups that are never pruned, how many heads carry a loss, and coincidence."""

import math
from collections.abc import Callable, Sequence

import pandas as pd
from exercises.answers import forgiving, hint_for

RATIOS = (0.25, 0.5)
CHANGES = {  # group: change in sums at .25, .5 and 1, then the same in facts
    "even": (0.5, 0.5, 1.0, 0.5, 0.5, 1.0),  # mean .5
    "one domain": (0.0, 1.4, 1.4, 0.0, 0.0, 0.0),  # mean .35, and the largest single change
    "all or nothing": (0.0, 0.1, 9.0, 0.0, 0.1, 9.0),  # mean .05; at ratio 1 the worst by far
    "steady": (0.4, 0.4, 0.5, 0.4, 0.4, 0.5),  # mean .4
    "better without": (-0.1, -0.1, -0.1, -0.1, -0.1, -0.1),
}
PLACES = [(domain, ratio) for domain in ("sums", "facts") for ratio in (*RATIOS, 1.0)]
TABLE = pd.DataFrame(
    [
        {"group": group, "domain": domain, "ratio": ratio, "change": change}
        for group, changes in CHANGES.items()
        for (domain, ratio), change in zip(PLACES, changes, strict=True)
    ]
)
FALLS = [1.0, 20.0, -10.0, 5.0, 4.0]
FIRST, SECOND = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 0, 0, 0, 0]

HeadsNeeded = Callable[[Sequence[float], float], int]
Expected = Callable[[Sequence[int], Sequence[int]], float]
Answer = Callable[[pd.DataFrame, float], list[str]]


def stub_unprunable_groups(table: pd.DataFrame, gamma: float) -> list[str]:
    """What the notebook starts from: four things are wrong with it."""
    change = table.groupby("group")["change"].max()
    n = int(gamma * len(change))
    return change.sort_values().index[:n].tolist()


def solution_unprunable_groups(table: pd.DataFrame, gamma: float) -> list[str]:
    """Keep the ratios of P, take the mean a group, sort from the worst on, round up."""
    change = table[table["ratio"].isin(RATIOS)].groupby("group")["change"].mean()
    n = math.ceil(gamma * len(change))
    return change.sort_values(ascending=False).index[:n].tolist()


@forgiving()
def check_unprunable_groups(answer: Answer) -> str:
    """Text that begins with ✓ where the answer is right, else a hint at the mistake."""
    found, everything = answer(TABLE, 0.3), answer(TABLE, 1.0)
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        return f"Your function returns {found!r}: return a list of names of groups."
    return _hint(found, everything) or (
        "✓ Right: the mean over P and all domains, the largest damage first, and the number of groups is rounded up."
    )


def _hint(found: list[str], everything: list[str]) -> str:
    right = solution_unprunable_groups(TABLE, 1.0)
    if sorted(everything) != sorted(right):
        return f"With γ = 1 all {len(right)} groups are unprunable, each named once; you return {everything}."
    if everything[0] == "better without":
        return "You begin with the group whose removal does least damage: the largest damage comes first."
    if everything[0] == "all or nothing":
        return "You begin with a group that only matters when all of it goes: P is {.25, .5}, without ratio 1."
    if everything[0] == "one domain":
        return "You begin with a group that is bad for one domain at one ratio: take the mean over both, not one value."
    if everything != right:
        return f"The order of all groups is {right}; yours is {everything}."
    if len(found) != 2:
        return f"γ = 0.3 of five groups is 1.5; rounded up that is 2 groups, and you return {len(found)}."
    return "" if found == right[:2] else f"With γ = 0.3 it is {right[:2]}; yours is {found}."


def stub_heads_needed(falls: Sequence[float], share: float) -> int:
    """What the notebook starts from: all heads that cost something."""
    return sum(fall > 0 for fall in falls)


def solution_heads_needed(falls: Sequence[float], share: float) -> int:
    """The largest falls first, until their sum is the share of all falls."""
    costly = sorted((fall for fall in falls if fall > 0), reverse=True)
    target, total = share * sum(costly), 0.0
    for number, fall in enumerate(costly, start=1):
        total += fall
        if total >= target - 1e-9:
            return number
    return 0


@forgiving()
def check_heads_needed(answer: HeadsNeeded) -> str:
    """`✓ …` where the answer is right, or else a hint at the mistake."""
    got, half = answer(list(FALLS), 0.8), answer(list(FALLS), 0.5)
    if got == 2 and half == 1 and answer(list(FALLS), 1.0) == 4:
        return "✓ Right: the largest falls first, and a head whose ablation helps does not count."
    if half == 0:
        return "You stop one head too early: the head with which the sum reaches the share counts, too."
    if got == 4 and half == 4:
        return "These are all heads that cost something. Which few of them make up the share?"
    if got == 4:
        return "You begin with the smallest falls. Begin with the largest, so that few heads are needed."
    if got == 3:
        return "You take the heads in their order in the layer. Sort the falls first, the largest in front."
    if got == 1:
        return "The head with -10 made the total smaller: only falls count. 80% of 1 + 20 + 5 + 4 = 30 is 24."
    if got == 24 or half == 15:
        return "This is the sum that must be reached. How many heads are needed for it?"
    return f"For falls {FALLS} the shares .8, .5 and 1 need 2, 1 and 4 heads; yours are {got!r}, {half!r} and more."


def stub_expected_both(first: Sequence[int], second: Sequence[int]) -> float:
    """What the notebook starts from: those that are lost in both ways."""
    return float(sum(a and b for a, b in zip(first, second, strict=True)))


def solution_expected_both(first: Sequence[int], second: Sequence[int]) -> float:
    """The share of the first, times the share of the second, times the number of facts."""
    return sum(first) * sum(second) / len(first)


@forgiving()
def check_expected_both(answer: Expected) -> str:
    """`✓ …` where the answer is right, or else a hint at the mistake."""
    got = answer(list(FIRST), list(SECOND))  # 4 and 5 of 10, 3 in both
    told = hint_for(
        got,
        {
            2.0: "",
            3.0: "These are the facts that *are* lost in both ways. How many would it be if the two had nothing to "
            "do with each other?",
            0.2: "This is the share of all facts. Multiply by their number.",
            20.0: "You multiplied two numbers of facts. Multiply two shares, then by the number of facts.",
            4.0: "This is the most that it can be, when one list contains the other. Coincidence gives less.",
            4.5: "This is the mean of the two. Both must happen, so the shares are multiplied.",
            6.0: "These are the facts that are lost in one way or the other. Both are asked for.",
            0.9: "You added the shares. For both to happen by coincidence, they are multiplied.",
        },
        f"Of 10 facts 4 are lost in one way and 5 in the other; you have {got!r}. By coincidence .4 × .5 of all are.",
    )
    if told:
        return told
    if abs(answer([1, 0, 0, 0], [1, 1, 0, 0]) - 0.5) > 1e-6:
        return "Right for ten facts. With 4 facts, 1 and 2 of them lost, 0.5 is expected: use the length of the lists."
    return "✓ Right: what two independent losses have in common, on average."
