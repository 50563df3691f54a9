"""Auxiliary variables of activations: what stands before an activation, so that it and what follows both fit."""

from collections.abc import Callable

import torch
from torch import Tensor

Activation = Callable[[Tensor], Tensor]
_STEPS = 4  # of Gauss and Newton, where there is no closed form


def is_relu(activation: Activation) -> bool:
    """Whether an activation is max(0, z), which is tried."""
    return _same(activation, torch.relu)


def _same(activation: Activation, other: Activation) -> bool:
    grid = torch.linspace(-8, 8, 257)
    return bool(torch.allclose(activation(grid), other(grid), rtol=1e-6, atol=1e-6))


def derivative(activation: Activation, z: Tensor) -> tuple[Tensor, Tensor]:
    """An elementwise activation and its derivative, in the shape of z."""
    with torch.enable_grad():
        variable = z.detach().requires_grad_()
        value = activation(variable)
        (slope,) = torch.autograd.grad(value.sum(), variable)
    return value.detach(), slope


def toward_activation(
    activation: Activation, p: Tensor, m: Tensor, z: Tensor, alpha: float, gamma: float, factor: Tensor | None = None
) -> Tensor:
    """The z that minimises γ(p − φ(z)·c)² + α(z − m)², elementwise; it is never worse than the z that was.

    For ReLU without c it is exact: the better of both sides' minima. Else, from m or the present z, whichever is
    better, four steps of Gauss and Newton, each made only where it lowers the objective.

    Args:
        activation: φ.
        p: what stands behind it (n_tokens, d_ff).
        m: what the weights put out.
        z: what stands before it now.
        alpha: weight of the second term.
        gamma: weight of the first.
        factor: c, which a gated FFN multiplies with; None is 1.

    Source: SparseLLM, Eq. 11 and 12 for ReLU; the rule for other activations and for gates is ours.
    """
    c = torch.ones_like(p) if factor is None else factor

    def objective(at: Tensor) -> Tensor:
        return gamma * (p - activation(at) * c).square() + alpha * (at - m).square()

    if factor is None and is_relu(activation):
        right, left = ((gamma * p + alpha * m) / (alpha + gamma)).clamp_min(0), m.clamp_max(0)
        return torch.where(objective(right) <= objective(left), right, left)
    z = torch.where(objective(m) <= objective(z), m, z)
    for _ in range(_STEPS):
        value, slope = derivative(activation, z)
        slope = slope * c
        step = (gamma * slope * (p - value * c) + alpha * (m - z)) / (gamma * slope.square() + alpha)
        z = torch.where(objective(z + step) < objective(z), z + step, z)
    return z
