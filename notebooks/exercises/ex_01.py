"""Exercises of notebook 01: channels of one head, a norm's factor after a cut, query heads of a key-value head."""

import math
from collections.abc import Callable

from exercises.answers import forgiving, hint_for


def stub_pairs_within_heads(n_channels: int, d_head: int) -> list[tuple[int, int]]:
    """Pairs (i, j) of channel numbers, so that all channels of one head are joined, and no others."""
    return []


def solution_pairs_within_heads(n_channels: int, d_head: int) -> list[tuple[int, int]]:
    """Each channel with the first one of its head."""
    return [(i, i - i % d_head) for i in range(n_channels) if i % d_head]


@forgiving()
def check_pairs_within_heads(answer: Callable[[int, int], list[tuple[int, int]]]) -> str:
    """Text that begins with ✓ where the answer is right, else a hint at the mistake."""
    n_channels, d_head = 12, 3
    head = list(range(n_channels))  # the least channel that each is joined with
    for i, j in answer(n_channels, d_head):
        if not (0 <= i < n_channels and 0 <= j < n_channels):
            return f"The pair ({i}, {j}) names a channel that is not there: they are numbered 0 to {n_channels - 1}."
        head = [min(head[i], head[j]) if h in (head[i], head[j]) else h for h in head]
    if head == [i - i % d_head for i in range(n_channels)]:
        return "✓ Right: a chain or a star within each head joins its channels, and no pair leads to another head."
    if head == list(range(n_channels)):
        return "No two different channels are joined yet, so each channel would be a unit of its own."
    if head == [i % (n_channels // d_head) for i in range(n_channels)]:
        return "You joined channels of the same place in all heads. The channels of one head stand side by side."
    if len(set(head)) == 1:
        return "All channels are joined into one unit: a pair leads from one head to the next. Stop at the head's end."
    told = f"With 12 channels in heads of 3 your pairs make {len(set(head))} units"
    if head == [i % d_head for i in range(n_channels)]:
        return f"{told}: you joined channels that have the same place in different heads. Join those of one head."
    return f"{told}; channels 0, 1, 2 are the first head, 3, 4, 5 the second."


def stub_norm_factor(n_before: int, n_after: int) -> float:
    """Factor for the gains of each RMSNorm after cutting n_before hidden channels to n_after."""
    return 1.0


def solution_norm_factor(n_before: int, n_after: int) -> float:
    """The norm divides by sqrt(sum / n): the smaller n after the cut makes it divide by more, and this undoes it."""
    return math.sqrt(n_before / n_after)


@forgiving()
def check_norm_factor(answer: Callable[[int, int], float]) -> str:
    """Text that begins with ✓ where the answer is right, else a hint at the mistake."""
    got = answer(400, 100)
    hints = {
        2.0: "✓ Right: the mean is over fewer channels, so the norm divides by more; the gains make up for it.",
        0.5: "Upside down: the cut model divides by sqrt(sum / n_after), which is larger. Its gains must grow.",
        4.0: "Almost: the norm takes a square root of the mean, so the factor is a square root too.",
        0.25: "Upside down, and the square root of the mean is missing: the cut model's gains must grow.",
        1.0: "A factor of 1 changes nothing. Compare sqrt(sum / n_before) with sqrt(sum / n_after) for the same sum.",
    }
    otherwise = (
        f"From 400 channels to 100 your factor is {got!r}. In the zeroed model x is divided by sqrt(sum / 400), "
        "in the cut one by sqrt(sum / 100): what makes them equal?"
    )
    if abs(got - 2.0) < 1e-6 and abs(answer(192, 144) - math.sqrt(192 / 144)) > 1e-6:
        return "Right from 400 to 100, wrong from 192 to 144, where the factor is 1.1547: round nothing."
    return hint_for(got, hints, otherwise)


def stub_query_rows(u: int, n_heads: int, n_kv: int, d_head: int) -> list[int]:
    """Rows of q_proj that belong to key-value head u, ascending."""
    return list(range(u * d_head, (u + 1) * d_head))


def solution_query_rows(u: int, n_heads: int, n_kv: int, d_head: int) -> list[int]:
    """Query heads stand in order, n_heads / n_kv of them behind each key-value head."""
    rows = n_heads // n_kv * d_head
    return list(range(u * rows, (u + 1) * rows))


@forgiving()
def check_query_rows(answer: Callable[[int, int, int, int], list[int]]) -> str:
    """Text that begins with ✓ where the answer is right, else a hint at the mistake."""
    got = answer(1, 6, 2, 2) or []
    hints = {
        (
            6,
            7,
            8,
            9,
            10,
            11,
        ): "✓ Right: three query heads of width 2 stand behind key-value head 1.",
        (2, 3): "These are the rows of query head 1 alone. How many query heads share one key-value head?",
        (2, 3, 6, 7, 10, 11): "These are query heads 1, 3 and 5, a stride apart: LLM-Pruner's folding. transformers "
        "repeats each key-value head for query heads that stand next to each other.",
        (3, 4, 5): "These are numbers of heads. Each head has d_head rows.",
        (): "Your function returns nothing yet: key-value head u serves n_heads / n_kv query heads in a row.",
    }
    return hints.get(tuple(got)) or (
        f"For u=1, n_heads=6, n_kv=2, d_head=2 your rows are {got}. Key-value head 0 serves query heads 0, 1 and 2, "
        "with two rows each; head 1 serves the next three."
    )
