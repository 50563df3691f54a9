"""Exercises of notebook 06: the attention rule, weights for equal totals, and the mean excess."""

import math
from collections.abc import Callable, Sequence

import torch
from exercises.answers import forgiving
from torch import Tensor

Excess = Callable[[Sequence[float], Sequence[float], Sequence[float]], float]
COARSE, FINE = torch.tensor([1.0, 5.0, 0.0, 2.0]), torch.tensor([8.0, 12.0, 6.0, 6.0])  # means 2 and 8


def stub_equal_totals(coarse: Tensor, fine: Tensor) -> tuple[float, float]:
    """What the notebook starts from: the same weight for both."""
    return 0.5, 0.5


def solution_equal_totals(coarse: Tensor, fine: Tensor) -> tuple[float, float]:
    """Each estimate is weighted by the mean of the other, and the weights are scaled to the sum 1."""
    c, f = float(coarse.mean()), float(fine.mean())
    return f / (c + f), c / (c + f)


@forgiving()
def check_equal_totals(answer: Callable[[Tensor, Tensor], tuple[float, float]]) -> str:
    """`✓ …` where the answer is right, or else a hint at the first thing that is not."""
    found = answer(COARSE, FINE)
    if not isinstance(found, list) or len(found) != 2:
        return f"Your function returns {found}: return two numbers, the weight of coarse and that of fine."
    a, b = map(float, found)
    totals = a * float(COARSE.sum()), b * float(FINE.sum())
    if abs(a - 0.2) < 1e-4 and abs(b - 0.8) < 1e-4:
        return "The two are the wrong way round: the smaller scores need the larger weight, here 0.8 for coarse."
    if abs(totals[0] - totals[1]) > 1e-3:
        return f"Coarse adds up to {totals[0]:.2f} and fine to {totals[1]:.2f}, each times its weight: make them equal."
    if abs(a + b - 1) > 1e-4:
        return f"The totals are equal, but {a:.3f} and {b:.3f} do not sum up to 1: divide both by their sum."
    return "✓ Right: each estimate is weighted by the mean of the other. This is the uncertainty rule."


def stub_attention_rule(coarse: Tensor, fine: Tensor) -> tuple[float, float]:
    """What the notebook starts from; two steps are missing, and one goes the wrong way."""
    both = torch.stack([coarse, fine]).double()  # (2, n_units)
    attention = torch.softmax(both @ both.T, -1)  # (2, 2), each row sums up to 1
    a, b = attention.mean(1).tolist()
    return a, b


def solution_attention_rule(coarse: Tensor, fine: Tensor) -> tuple[float, float]:
    """Divide each by its mean, compare all with all, softmax along rows, mean of the columns."""
    both = torch.stack([coarse, fine]).double()
    both = both / both.mean(1, keepdim=True)
    attention = torch.softmax(both @ both.T / both.shape[1], -1)
    a, b = attention.mean(0).tolist()
    return a, b


@forgiving()
def check_attention_rule(answer: Callable[[Tensor, Tensor], tuple[float, float]]) -> str:
    """Text that begins with ✓ where the answer is right, else a hint at the mistake."""
    found = answer(COARSE, FINE)
    if not isinstance(found, tuple | list | Tensor) or len(found) != 2:
        return f"Your function returns {found}: return two numbers, the weight of coarse and that of fine."
    a, b = map(float, found)
    if abs(a + b - 1) > 1e-4:
        return f"Your weights {a:.3f} and {b:.3f} do not sum up to 1; each row of the softmax does: is it along rows?"
    if abs(a - 0.5) < 1e-4:
        return "Half each, as for all scores: a softmax sums up to 1 where it runs. Run it along rows, average columns."
    return _compare(a, answer)


def _compare(a: float, answer: Callable[[Tensor, Tensor], tuple[float, float]]) -> str:
    right, _ = solution_attention_rule(COARSE, FINE)
    moved = abs(answer(100 * COARSE, FINE)[0] - a) > 1e-4
    if moved:
        return (
            f"The weight {a:.3f} changes where all coarse scores are a hundred times larger: divide each by its mean."
        )
    if abs(a - (1 - right)) < 1e-4:
        return "The two weights are the wrong way round: that of the coarse scores comes first."
    if abs(answer(COARSE.repeat(2), FINE.repeat(2))[0] - a) > 1e-4:
        return f"The weight {a:.3f} changes where every unit is there twice: divide T·Tᵀ by the number of units."
    if abs(a - right) > 1e-4:
        return f"For the four units of the check the weight of coarse is {right:.3f}; yours is {a:.3f}."
    return (
        "✓ Right: the scale drops out, the number of units drops out, and what is left is how unequal the scores are."
    )


def stub_mean_excess(fused: Sequence[float], coarse: Sequence[float], fine: Sequence[float]) -> float:
    """What the notebook starts from: it compares with the coarse estimate alone, and has no logarithm."""
    return sum(f - c for f, c in zip(fused, coarse, strict=True)) / len(fused)


def solution_mean_excess(fused: Sequence[float], coarse: Sequence[float], fine: Sequence[float]) -> float:
    """The mean over draws of log-perplexity minus that of the better estimate in the same draw."""
    each = [math.log(f / min(c, e)) for f, c, e in zip(fused, coarse, fine, strict=True)]
    return sum(each) / len(each)


@forgiving()
def check_mean_excess(answer: Excess) -> str:
    """`✓ …` where the answer is right, or else a hint at the first thing that is not."""
    fused, coarse, fine = [4.0, 6.0, 5.0], [5.0, 4.0, 8.0], [3.0, 8.0, 6.0]
    found, right = float(answer(fused, coarse, fine)), solution_mean_excess(fused, coarse, fine)
    if abs(found - right) < 1e-6:
        return "✓ Right: the better estimate of each draw, on the scale of the loss, and only then the mean."
    log = [[math.log(value) for value in values] for values in (fused, coarse, fine)]
    means = [sum(values) / 3 for values in log]
    pairs = list(zip(fused, coarse, fine, strict=True))
    wrong = {
        "take the logarithm of each perplexity first": sum(f - min(c, e) for f, c, e in pairs) / 3,
        "take the logarithm first, and compare with the better estimate, not with coarse": sum(
            f - c for f, c, _ in pairs
        )
        / 3,
        "this compares with the worse estimate: the better one has the lower perplexity": means[0]
        - sum(max(c, e) for _, c, e in zip(*log, strict=True)) / 3,
        "this compares with coarse alone: take the better one of the two in each draw": means[0] - means[1],
        "this compares with fine alone, the better one in the mean: ask it anew in each draw": means[0] - means[2],
        "the sign is turned round: fused minus the better one, so that below 0 is a gain": -right,
        "this is the sum over draws: take the mean": 3 * right,
    }
    hints = [text for text, value in wrong.items() if abs(found - value) < 1e-6]
    hint = hints[0] if hints else "in each draw, take fused minus the better one, both as logarithms"
    return f"For three draws the mean excess is {right:+.3f}; yours is {found:+.3f}: {hint}."
