"""Exercise of notebook 02: the first-order Taylor score of one row, at both granularities."""

from collections.abc import Callable

import torch
from exercises.answers import forgiving
from torch import Tensor


def stub_slice_score(w: Tensor, g: Tensor, granularity: str) -> Tensor:
    """First-order Taylor score of one row: granularity is "vector" or "element"."""
    return (w * g).sum()


def solution_slice_score(w: Tensor, g: Tensor, granularity: str) -> Tensor:
    """Vector: sum, then absolute value. Element: absolute value, then sum."""
    change = w * g
    return change.sum().abs() if granularity == "vector" else change.abs().sum()


@forgiving()
def check_slice_score(answer: Callable[[Tensor, Tensor, str], Tensor]) -> str:
    """Text that begins with ✓ where the answer is right, else a hint at the mistake."""
    w, g = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([1.0, 1.0, -1.0])  # w·g = 1, -2, -3
    got = {granularity: answer(w, g, granularity) for granularity in ("vector", "element")}
    if any(value is None for value in got.values()):
        return "Your function returns nothing yet: start from the product w * g, one number a weight."
    vector, element = float(got["vector"]), float(got["element"])
    if vector < 0 or element < 0:
        return "A score is negative: importance has no sign; a weight that lowers the loss matters too."
    if (vector, element) == (4.0, 6.0):
        return "✓ Right: the order of sum and absolute value decides whether contributions may cancel."
    if (vector, element) == (6.0, 4.0):
        return "Both formulas are there, the wrong way round: in which of them may contributions cancel?"
    if vector == element:
        return f"Both granularities give {vector:g}. One takes the absolute value before the sum, the other after it."
    wrong, told = ("vector", vector) if vector != 4.0 else ("element", element)
    return f"For w·g = 1, -2, -3 your {wrong} score is {told:g}; sum and absolute value, in which order?"
