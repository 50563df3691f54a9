"""Exercises of notebook 03b: the re-fit of one layer, and a bias that replaces what was pruned."""

from collections.abc import Callable

import torch
from exercises.answers import forgiving, tensors
from torch import Tensor

Refit = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
Bias = Callable[[Tensor, Tensor], Tensor]


def stub_refit_layer(x: Tensor, w: Tensor, x_gone: Tensor, w_gone: Tensor, strength: float) -> Tensor:
    """What the notebook starts from: the weights as they were."""
    return w


def solution_refit_layer(x: Tensor, w: Tensor, x_gone: Tensor, w_gone: Tensor, strength: float) -> Tensor:
    """W plus the regularised least-squares fit of what is missing."""
    gram = x.T @ x
    ridge = strength * torch.diag(gram.diagonal())
    return w + torch.linalg.solve(gram + ridge, x.T @ (x_gone @ w_gone))


@forgiving(tensors)
def check_refit_layer(refit_layer: Refit) -> str:
    """`✓ …` where the answer is right, or else a hint at the first thing that is not."""
    x, w, x_gone, w_gone = _layer()
    gram, missing = x.T @ x, x_gone @ w_gone
    right = solution_refit_layer(x, w, x_gone, w_gone, 0.1)
    given = w.clone()
    found = refit_layer(x, given, x_gone, w_gone, 0.1)
    if not torch.equal(given, w):
        return "The w that you were given has changed: return a new tensor, w + Δ in place of w += Δ."
    if found.shape != w.shape:
        return f"The result is {tuple(found.shape)}, and W is {tuple(w.shape)}: return new weights of this shape."
    if torch.allclose(found, right):
        return "✓ Right: the formula of the text, and `torch.linalg.solve` needs no inverse."
    wrong = {
        "the weights are as they were: add the fit of what is missing": w,
        "this is the fit alone: add the old weights W": right - w,
        "λ is missing: without it the fit follows the noise of the calibration set": _fit(x, w, missing, 0.0),
        "the fit must be added, not subtracted": 2 * w - right,
        "the ridge is one number in all places: `torch.diag` of a matrix takes out its diagonal as a vector, so apply "
        "it a second time to make a matrix": w + torch.linalg.solve(gram + 0.1 * gram.diagonal(), x.T @ missing),
        "this fits all of Y, so that the ridge shrinks W too: fit only what is missing, and add W": _fit(
            x, torch.zeros_like(w), x @ w + missing, 0.1
        ),
        "D is the diagonal of XᵀX, not the identity": w
        + torch.linalg.solve(gram + 0.1 * torch.eye(x.shape[1], dtype=x.dtype), x.T @ missing),
    }
    hints = [hint for hint, value in wrong.items() if torch.allclose(found, value)]
    return f"The shape is right, and {hints[0]}." if hints else "Solve (XᵀX + λD) Δ = Xᵀ (X_p W_p), then return W + Δ."


def stub_bias(x_gone: Tensor, w_gone: Tensor) -> Tensor:
    """What the notebook starts from: the mean over outputs."""
    return (x_gone @ w_gone).mean(1)


def solution_bias(x_gone: Tensor, w_gone: Tensor) -> Tensor:
    """The mean over tokens."""
    return (x_gone @ w_gone).mean(0)


@forgiving(tensors)
def check_bias(bias: Bias) -> str:
    """`✓ …` where the answer is right, or else a hint at the first thing that is not."""
    _, w, x_gone, w_gone = _layer()
    found, right = bias(x_gone, w_gone), solution_bias(x_gone, w_gone)
    if found.shape == right.shape and torch.allclose(found, right):
        return "✓ Right: one number for each output, the mean over tokens of what is missing."
    if found.shape == (len(x_gone),):
        return "There is one number for each token here. A bias has one for each output: take the mean over tokens."
    if found.shape == right.shape and torch.allclose(found, len(x_gone) * right):
        return "The shape is right, but this is the sum over tokens: divide by their number."
    if found.shape == right.shape and torch.allclose(found, -right):
        return "The sign is turned round: the bias is added in place of what went."
    if found.shape == right.shape:
        return f"The shape is right. The first output misses {right[0]:.3f} a token; you have {found[0]:.3f}."
    return f"The result is {tuple(found.shape)} and should be ({w.shape[1]},): the mean of x_gone @ w_gone."


def _layer() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((40, 5), (5, 3), (40, 2), (2, 3))
    x, w, x_gone, w_gone = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x, w, x_gone + x[:, :2], w_gone


def _fit(x: Tensor, w: Tensor, missing: Tensor, strength: float) -> Tensor:
    gram = x.T @ x
    return w + torch.linalg.solve(gram + strength * torch.diag(gram.diagonal()), x.T @ missing)
