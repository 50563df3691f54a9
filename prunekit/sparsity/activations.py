"""Updates SparseLLM's auxiliary variables z, the inputs of an activation."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Activation = Callable[[Tensor], Tensor]
_STEPS = 4  # Gauss-Newton steps without a closed form


def _is(activation: Activation, other: Activation, device: torch.device) -> bool:
    """Whether two activations are the same function, by a test on the device."""
    grid = torch.linspace(-8, 8, 257, device=device)
    return bool(torch.allclose(activation(grid), other(grid), rtol=1e-6, atol=1e-6))


def derivative(activation: Activation, z: Tensor) -> tuple[Tensor, Tensor]:
    """An elementwise activation and its derivative, in the shape of z."""
    if _is(activation, functional.silu, z.device):  # as in most models; automatic differentiation takes twice as long
        gate = torch.sigmoid(z)
        value = z * gate
        return value, gate.addcmul(value, 1 - gate)
    with torch.enable_grad():
        variable = z.detach().requires_grad_()
        value = activation(variable)
        (slope,) = torch.autograd.grad(value.sum(), variable)
    return value.detach(), slope


def toward_activation(
    activation: Activation, p: Tensor, m: Tensor, z: Tensor, alpha: float, gamma: float, factor: Tensor | None = None
) -> Tensor:
    """The z that minimises γ(p − φ(z)·c)² + α(z − m)², elementwise; never worse than the given z.

    For ReLU without c it is exact: the better minimum of both sides. Otherwise four Gauss-Newton steps start from the
    better of m and z; a step counts only where it lowers the objective.

    Args:
        activation: φ.
        p: inputs of the down projection (n_tokens, d_ff).
        m: outputs of the up projection.
        z: the present z.
        alpha: weight of the second term.
        gamma: weight of the first.
        factor: c, the gate's factor; None is 1.

    Source: SparseLLM, Eq. 11 and 12 for ReLU; the rule for other activations and for gates is ours.
    """
    if factor is None and _is(activation, torch.relu, z.device):
        return _toward_relu(p, m, alpha, gamma)
    z = _better(activation, p, m, z, alpha, gamma, factor)
    value, slope, objective = _looked_at(activation, p, m, z, alpha, gamma, factor)
    for _ in range(_STEPS):
        trial = z + (gamma * slope * (p - value) + alpha * (m - z)) / (gamma * slope.square() + alpha)
        *new, lower = _looked_at(activation, p, m, trial, alpha, gamma, factor)
        won = lower < objective
        z, value, slope, objective = (
            torch.where(won, a, b) for a, b in zip((trial, *new, lower), (z, value, slope, objective), strict=True)
        )
    return z


def _toward_relu(p: Tensor, m: Tensor, alpha: float, gamma: float) -> Tensor:
    def objective(at: Tensor) -> Tensor:
        return gamma * (p - at.clamp_min(0)).square() + alpha * (at - m).square()

    right, left = ((gamma * p + alpha * m) / (alpha + gamma)).clamp_min(0), m.clamp_max(0)
    return torch.where(objective(right) <= objective(left), right, left)


def _better(
    activation: Activation, p: Tensor, m: Tensor, z: Tensor, alpha: float, gamma: float, factor: Tensor | None
) -> Tensor:
    """Elementwise the better of m and z."""
    of_m, of_z = (activation(at) if factor is None else activation(at) * factor for at in (m, z))
    return torch.where(gamma * (p - of_m).square() <= gamma * (p - of_z).square() + alpha * (z - m).square(), m, z)


def _looked_at(
    activation: Activation, p: Tensor, m: Tensor, z: Tensor, alpha: float, gamma: float, factor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """φ(z)·c, its derivative, and the objective."""
    value, slope = derivative(activation, z)
    if factor is not None:
        value, slope = value * factor, slope * factor
    return value, slope, gamma * (p - value).square() + alpha * (z - m).square()
