"""SparseLLM's auxiliary variables of one FFN, and their updates.

Shapes here have tokens first. With X (tokens, d_model) the inputs of an FFN and Y its outputs, z and s stand for the
outputs of the up and gate projections (s is missing in two-matrix FFNs), p for the input of the down projection:
p = φ(z), or φ(s)⊙z. SparseLLM minimises

    β‖p·W_downᵀ + b − Y‖² + γ‖p − φ(z)‖² + α‖z − X·W_upᵀ − b‖²

over sparse weights and free p, z, s, in alternation.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from prunekit.sparsity.matrix_inputs import add_to_gram, complete_gram
from prunekit.sparsity.solvers import SparseLLM

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

    def looked_at(at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """φ(z)·c, its derivative, and the objective."""
        value, slope = derivative(activation, at)
        if factor is not None:
            value, slope = value * factor, slope * factor
        return value, slope, gamma * (p - value).square() + alpha * (at - m).square()

    of_m, of_z = (activation(at) if factor is None else activation(at) * factor for at in (m, z))
    z = torch.where(gamma * (p - of_m).square() <= gamma * (p - of_z).square() + alpha * (z - m).square(), m, z)
    value, slope, objective = looked_at(z)
    for _ in range(_STEPS):
        trial = z + (gamma * slope * (p - value) + alpha * (m - z)) / (gamma * slope.square() + alpha)
        *new, lower = looked_at(trial)
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


TOKENS_AT_ONCE = 512  # tokens updated at once, which bounds temporary memory
_GRADIENT_STEPS, _GRADIENT_RATE = 2, 0.01  # of s


Weights = Mapping[str, Tensor]  # "up" and "gate" (d_ff, d_model), "down" (d_model, d_ff); "gate" may be missing


@dataclass
class FFN:
    """The weights and activations of one FFN.

    Attributes:
        weights: the matrices, in the order up, gate, down.
        biases: name of a matrix → its bias (out,), where it has one.
        activation: φ, elementwise.
        x: inputs (n_tokens, d_model).
        y: outputs (n_tokens, d_model), with the bias.
        z: outputs of up (n_tokens, d_ff), with the bias; changed by `prune_ffn`, as are s and p.
        s: outputs of gate (n_tokens, d_ff); None without a gate.
        p: inputs of down (n_tokens, d_ff).
    """

    weights: Weights
    biases: Mapping[str, Tensor]
    activation: Activation
    x: Tensor
    y: Tensor
    z: Tensor
    s: Tensor | None
    p: Tensor


class Sums(NamedTuple):
    """The result of one sweep over the tokens: the error before it, and sums for the next fit."""

    error: float
    cross: dict[str, Tensor]  # of each matrix (wanted outputs − b − inputs·Wᵀ)ᵀ·inputs, (out, in)
    gram: Tensor  # pᵀp


def sweep(ffn: FFN, weights: Weights, method: SparseLLM, last: bool) -> Sums:
    """Update p, z and s, some tokens at a time; after the last iteration compute only the error."""
    kernel, down_bias = _kernel(weights["down"], method), ffn.biases.get("down")
    cross = {name: ffn.x.new_zeros(weight.shape) for name, weight in weights.items()}
    gram = ffn.x.new_zeros(ffn.p.shape[1], ffn.p.shape[1])
    error = size = 0.0
    for at in _portions(len(ffn.x)):
        x, y = ffn.x[at], ffn.y[at]
        m = functional.linear(x, weights["up"], ffn.biases.get("up"))
        g = functional.linear(x, weights["gate"], ffn.biases.get("gate")) if "gate" in weights else None
        hidden = ffn.activation(m) if g is None else ffn.activation(g) * m
        error += float((functional.linear(hidden, weights["down"], down_bias) - y).square().sum())
        size += float(y.square().sum())
        if last:
            continue
        rest = _update(ffn, at, m, g, y if down_bias is None else y - down_bias, weights["down"], kernel, method)
        cross["up"].addmm_((ffn.z[at] - m).T, x)
        if g is not None and ffn.s is not None:
            cross["gate"].addmm_((ffn.s[at] - g).T, x)
        cross["down"].addmm_(rest.T, ffn.p[at])
        add_to_gram(gram, ffn.p[at])
    return Sums(error / max(size, torch.finfo(torch.float32).tiny), cross, complete_gram(gram))


def _update(
    ffn: FFN, at: slice, m: Tensor, g: Tensor | None, wanted: Tensor, down: Tensor, kernel: Tensor, method: SparseLLM
) -> Tensor:
    """Update p, z and s of some tokens in this order, each from the latest values of the others.

    Returns:
        The residual of the outputs, Y − b − p·W_downᵀ, (tokens, d_model).
    """
    alpha, gamma = method.alpha or 0.0, method.gamma or 0.0
    s = None if ffn.s is None else ffn.s[at]
    opened = None if s is None else ffn.activation(s)
    hidden = ffn.activation(ffn.z[at]) if opened is None else opened * ffn.z[at]
    pull = (wanted - hidden @ down.T) @ kernel
    p = ffn.p[at] = hidden + pull @ down
    rest = pull * (gamma / (method.beta or 1.0))
    if g is None or ffn.s is None or s is None or opened is None:
        ffn.z[at] = toward_activation(ffn.activation, p, m, ffn.z[at], alpha, gamma)
        return rest
    z = ffn.z[at] = (alpha * m + gamma * opened * p) / (gamma * opened.square() + alpha)
    ffn.s[at] = (
        _descend(ffn.activation, p, g, z, s, alpha, gamma)
        if method.faithful
        else toward_activation(ffn.activation, p, g, s, alpha, gamma, z)
    )
    return rest


def _descend(activation: Activation, p: Tensor, g: Tensor, z: Tensor, s: Tensor, alpha: float, gamma: float) -> Tensor:
    """The s after two gradient steps on α‖s − g‖² + γ‖p − φ(s)⊙z‖², which overshoot where z is large."""
    for _ in range(_GRADIENT_STEPS):
        value, slope = derivative(activation, s)
        s = s - _GRADIENT_RATE * 2 * (alpha * (s - g) - gamma * (p - value * z) * z * slope)
    return s


def _kernel(down: Tensor, method: SparseLLM) -> Tensor:
    """K = (γ/β·I + WWᵀ)⁻¹ in p = φ + (Y − b − φ·Wᵀ)·K·W, which minimises β‖pWᵀ + b − Y‖² + γ‖p − φ‖².

    The residual R = Y − b − φ·Wᵀ becomes R − R·K·WWᵀ = γ/β·R·K.
    """
    matrix = down @ down.T
    matrix.diagonal().add_((method.gamma or 0.0) / (method.beta or 1.0))
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))


def gram_of(x: Tensor) -> Tensor:
    """Σxxᵀ over tokens, (width, width)."""
    total = x.new_zeros(x.shape[1], x.shape[1])
    for at in _portions(len(x)):
        add_to_gram(total, x[at])
    return complete_gram(total)


def _portions(n: int) -> Iterator[slice]:
    return (slice(start, start + TOKENS_AT_ONCE) for start in range(0, n, TOKENS_AT_ONCE))
