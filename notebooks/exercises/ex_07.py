"""Exercise of notebook 07: from a knowledge distribution to the groups that are never pruned."""

import math
from collections.abc import Callable

import pandas as pd
from exercises.answers import forgiving

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
