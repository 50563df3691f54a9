"""Exercises of notebook 08b: the gap of a source, the shares of a mixture, and two ways to judge what training did."""

import math
from collections.abc import Callable, Sequence

from exercises.answers import forgiving

Gap = Callable[[Sequence[float], Sequence[float], Sequence[int]], float]
Shares = Callable[[Sequence[float], float, float], Sequence[float]]
Judge = Callable[[Sequence[float], Sequence[float]], Sequence[float]]


def stub_gap(cut_losses: Sequence[float], dense_losses: Sequence[float], n_tokens: Sequence[int]) -> float:
    """What the notebook starts from: the mean over documents, however long they are."""
    each = [(c - d) / n for c, d, n in zip(cut_losses, dense_losses, n_tokens, strict=True)]
    return sum(each) / len(each)


def solution_gap(cut_losses: Sequence[float], dense_losses: Sequence[float], n_tokens: Sequence[int]) -> float:
    """What was lost over all tokens, divided by their number."""
    return (sum(cut_losses) - sum(dense_losses)) / sum(n_tokens)


@forgiving()
def check_gap(gap: Gap) -> str:
    """`✓ …` where the answer is right, or else a hint at the first thing that is not."""
    cut, dense, tokens = [30.0, 12.0], [10.0, 6.0], [40, 4]
    found, right = float(gap(cut, dense, tokens)), solution_gap(cut, dense, tokens)
    wrong = {
        "a document of 4 tokens counts as much here as one of 40. Add up first, then divide by all tokens": 1.0,
        "this is what was lost on all tokens together: divide by their number": 26.0,
        "divide by the number of tokens, not of documents": 13.0,
        "the sign is turned round: the cut model's loss minus the dense model's": -right,
        "this is the loss of the cut model alone: subtract that of the dense model": 42 / 44,
    }
    hints = [hint for hint, value in wrong.items() if abs(found - value) < 1e-6]
    if abs(found - right) < 1e-6:
        return "✓ Right: the same token counts the same in a long document and in a short one."
    hint = hints[0] if hints else "(all losses of the cut model − all losses of the dense one) / all tokens"
    return f"The gap is {right:.2f} nats per token here; yours is {found:.2f}: {hint}."


def stub_shares(gaps: Sequence[float], temperature: float, uniform_share: float) -> list[float]:
    """What the notebook starts from: shares in proportion to the gaps."""
    return [gap / sum(gaps) for gap in gaps]


def solution_shares(gaps: Sequence[float], temperature: float, uniform_share: float) -> list[float]:
    """A softmax of the gaps over the temperature, mixed with equal shares."""
    powers = [math.exp(gap / temperature) for gap in gaps]
    return [(1 - uniform_share) * power / sum(powers) + uniform_share / len(gaps) for power in powers]


@forgiving()
def check_shares(shares: Shares) -> str:
    """`✓ …` where the answer is right, or else a hint at the first thing that is not."""
    gaps, wrong = [0.1, 0.4, 0.0], _wrong_shares()
    found, right = shares(gaps, 0.2, 0.3), solution_shares(gaps, 0.2, 0.3)
    if not isinstance(found, list) or len(found) != len(gaps):
        return f"Your function returns {found}: return a list with one share for each source."
    if abs(sum(found) - 1) > 1e-6:
        return f"Your shares sum up to {sum(found):.3f}, not to 1: softmax has the sum 1, and so has 1/S for S sources."
    if not _alike(found, right):
        hints = [hint for hint, values in wrong.items() if _alike(found, values)]
        hint = hints[0] if hints else "(1 − β)·softmax(Δ/τ) + β/S"
        return f"For the gaps 0.1, 0.4 and 0.0 the shares are {_show(right)}; yours are {_show(found)}: {hint}."
    below = shares([-0.2, 0.1], 0.1, 0.0)
    if not _alike(below, solution_shares([-0.2, 0.1], 0.1, 0.0)):
        return f"A gap may be below zero: for −0.2 and 0.1 your shares are {_show(below)}; use the exponential of each."
    return "✓ Right: the largest gap gets most, and β/S is what every source gets at least."


def _wrong_shares() -> dict[str, list[float]]:
    gaps = [0.1, 0.4, 0.0]
    return {
        "these are in proportion to the gaps; the rule has a softmax": [0.2, 0.8, 0.0],
        "τ is missing: divide the gaps by it": solution_shares(gaps, 1.0, 0.3),
        "divide the gaps by τ, do not multiply": solution_shares(gaps, 5.0, 0.3),
        "β is missing: a share of β is drawn uniformly": solution_shares(gaps, 0.2, 0.0),
        "β and 1 − β are the wrong way round: β = 1 is uniform": solution_shares(gaps, 0.2, 0.7),
        "the sign is turned round: the source with the largest gap gets most": solution_shares(gaps, -0.2, 0.3),
    }


def stub_judge(before: Sequence[float], after: Sequence[float]) -> list[float]:
    """What the notebook starts from: the gaps after training alone, whatever they were before."""
    return [sum(after) / len(after), max(after)]


def solution_judge(before: Sequence[float], after: Sequence[float]) -> list[float]:
    """The fall of the mean gap, and the fall of the largest gap, whichever source has it."""
    return [(sum(before) - sum(after)) / len(before), max(before) - max(after)]


@forgiving()
def check_judge(judge: Judge) -> str:
    """`✓ …` where the answer is right, or else a hint at the first thing that is not."""
    before, after = [0.9, 0.5, 0.4], [0.3, 0.5, 0.1]
    found, right = judge(before, after), solution_judge(before, after)
    if not isinstance(found, list) or len(found) != 2:
        return f"Your function returns {found}: return two numbers, the falls of the mean and of the largest gap."
    if _alike(found, right):
        return "✓ Right: the two can disagree, and which one counts is your decision."
    if _alike(found, [0.3, 0.5]):
        return "These are the gaps after training. How far did they fall? Subtract them from the gaps before."
    if _alike(found, [-value for value in right]):
        return "The sign is turned round: a fall is before minus after."
    if _alike(found, right[::-1]):
        return "The two are the wrong way round: the fall of the mean comes first."
    if abs(found[0] - right[0]) > 1e-6:
        return f"The mean gap falls by {right[0]:.2f} here; yours is {found[0]:.2f}: mean before minus mean after."
    if abs(found[1] - 0.6) < 1e-6:
        return "0.6 is the fall of the source that was worst before. Another one is worst now, at 0.5: from 0.9 to 0.5."
    return f"The largest gap falls from 0.9 to 0.5, by {right[1]:.2f}; yours is {found[1]:.2f}."


def _alike(found: Sequence[float], wanted: Sequence[float]) -> bool:
    return len(found) == len(wanted) and all(abs(a - b) < 1e-6 for a, b in zip(found, wanted, strict=True))


def _show(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)
