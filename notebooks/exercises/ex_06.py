"""Exercise of notebook 06: the attention rule, from one group's coarse and fine scores to their two weights."""

from collections.abc import Callable

import torch
from exercises.answers import forgiving
from torch import Tensor

COARSE, FINE = torch.tensor([1.0, 5.0, 0.0, 2.0]), torch.tensor([8.0, 12.0, 6.0, 6.0])  # means 2 and 8


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
        return "Half each, and it would be so for all scores: rows of a softmax always sum up to 1. Take its columns."
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
