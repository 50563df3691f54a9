"""Exercise of notebook 04: merge a low-rank update into a weight."""

from collections.abc import Callable

import torch
from exercises.answers import forgiving, tensors
from torch import Tensor

Merge = Callable[[Tensor, Tensor, Tensor, float], Tensor]

R, D_IN, D_OUT, ALPHA = 2, 5, 3, 8.0


def stub_merge(weight: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """What the notebook starts from: right shapes, wrong size."""
    return weight + b @ a


def solution_merge(weight: Tensor, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """W + (alpha / r)·B·A, a new tensor."""
    r = a.shape[0]
    return weight + (alpha / r) * (b @ a)


@forgiving(tensors)
def check_merge(merge: Merge) -> str:
    """`✓ …` where the answer is right, or else a hint at the first thing that is not."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((D_OUT, D_IN), (R, D_IN), (D_OUT, R))
    weight, a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    before = weight.clone()
    found = merge(weight, a, b, ALPHA)
    if found.shape != weight.shape:
        return f"The result is {tuple(found.shape)}, the weight {tuple(weight.shape)}: the product is B·A."
    if not torch.equal(weight, before):
        return "The weight you were given has changed: return a new tensor, the caller may still need the old one."
    return _check_scale(found - weight, b @ a)


def _check_scale(update: Tensor, product: Tensor) -> str:
    wrong = {
        1.0: "the factor alpha / r is missing, so the merged model differs from the one you trained",
        ALPHA: "it is multiplied by alpha, but not divided by the rank r (the number of rows of A)",
        1 / R: "it is divided by r, but not multiplied by alpha",
        ALPHA / D_IN: "it is divided by the number of inputs; r is the number of rows of A",
    }
    for factor, hint in wrong.items():
        if torch.allclose(update, factor * product):
            return f"The direction is right and the size is not: {hint}."
    if not torch.allclose(update, ALPHA / R * product):
        return "What was added is no multiple of B·A: form the product B @ A first, then scale, then add."
    return "✓ Right: one addition, once, and the adapter costs nothing at inference."
