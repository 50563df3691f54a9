"""SparseLLM on one FFN: its matrices and auxiliary variables take turns, so that each layer knows of the other.

Shapes here have tokens first. With X (tokens, d_model) what an FFN reads and Y what it returns, z and s stand for the
outputs of the up and gate projections (s is missing in two-matrix FFNs), p for the input of the down projection:
p = φ(z), or φ(s)⊙z. SparseLLM minimises

    β‖p·W_downᵀ + b − Y‖² + γ‖p − φ(z)‖² + α‖z − X·W_upᵀ − b‖²

over sparse weights and free p, z, s, by turns.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from prunekit.checks import check_integers, check_reals
from prunekit.errors import PrunekitError
from prunekit.sparsity.activations import Activation, derivative, toward_activation
from prunekit.sparsity.factors import DAMPING, Factor, damped, factorize, upper_factor
from prunekit.sparsity.patterns import Pattern
from prunekit.sparsity.solvers import BLOCK, check_damping, solve

TOKENS_AT_ONCE = 4096  # through which the auxiliaries are brought up to date; temporaries are of this size
_GRADIENT_STEPS, _GRADIENT_RATE = 2, 0.01  # of s
_FITTING_STEPS, _FITTING_RATE = 10, 0.01  # of W_down in a faithful two-matrix FFN


@dataclass(frozen=True)
class SparseLLM:
    """How SparseLLM alternates.

    Attributes:
        n_iterations: T; with 1 it is SparseGPT.
        faithful: as in the released code, which fits weights with an undamped pseudo-inverse (two-matrix FFNs: W_down
            with ten gradient steps), lets damping pile up, and keeps the last iteration. False, the default, fits them
            by a proximal step towards the weights they have, damps each iteration alike, and keeps the iteration whose
            FFN output has the least error.
        alpha: weight of ‖z − WX‖²; None is .1 for two-matrix FFNs and 5 for gated ones, as in the released code.
        beta: weight of ‖W_down·p − Y‖²; None as above.
        gamma: weight of ‖p − φ(z)‖²; None as above.

    Source: SparseLLM (Bai et al., NeurIPS 2024), Eq. 4 to 12. Differs as said under `faithful`; there, pseudo-inverses
        are Gram matrices and Cholesky factors, and gradients closed forms.
    """

    n_iterations: int = 4
    faithful: bool = False
    alpha: float | None = None
    beta: float | None = None
    gamma: float | None = None

    def __post_init__(self) -> None:
        check_integers(n_iterations=(self.n_iterations, 1))
        for name in ("alpha", "beta", "gamma"):
            value = getattr(self, name)
            if value is not None:
                check_reals(**{name: (value, 1e-12, float("inf"))})

    def for_form(self, gated: bool) -> "SparseLLM":
        """The same with its weights filled in."""
        default = 5.0 if gated else 0.1
        alpha, beta, gamma = (default if w is None else w for w in (self.alpha, self.beta, self.gamma))
        return replace(self, alpha=alpha, beta=beta, gamma=gamma)


@dataclass
class FFN:
    """One FFN with what went through it; `gate` and its fellows are None where it has two matrices.

    Attributes:
        up: (d_ff, d_model).
        gate: (d_ff, d_model) or None.
        down: (d_model, d_ff).
        up_bias: (d_ff,) or None.
        gate_bias: (d_ff,) or None.
        down_bias: (d_model,) or None.
        activation: φ, elementwise.
        x: inputs (n_tokens, d_model).
        y: outputs (n_tokens, d_model), with the bias.
        z: outputs of up (n_tokens, d_ff), with the bias; changed by `prune_ffn`, as are s and p.
        s: outputs of gate (n_tokens, d_ff) or None.
        p: inputs of down (n_tokens, d_ff).
    """

    up: Tensor
    gate: Tensor | None
    down: Tensor
    up_bias: Tensor | None
    gate_bias: Tensor | None
    down_bias: Tensor | None
    activation: Callable[[Tensor], Tensor]
    x: Tensor
    y: Tensor
    z: Tensor
    s: Tensor | None
    p: Tensor


class Pruned(NamedTuple):
    """The weights of an FFN after SparseLLM.

    Attributes:
        up: (d_ff, d_model).
        gate: (d_ff, d_model) or None.
        down: (d_model, d_ff).
        errors: ‖FFN(X) − Y‖² / ‖Y‖² after each iteration; the first is SparseGPT's.
        kept: which iteration these weights are of.
        damping: the largest that a factor needed.
    """

    up: Tensor
    gate: Tensor | None
    down: Tensor
    errors: tuple[float, ...]
    kept: int
    damping: float


class _Sums(NamedTuple):
    """What one sweep over the tokens leaves: the error before it, and what the next fit needs."""

    error: float
    up: Tensor  # (z − X·W_upᵀ − b)ᵀX
    gate: Tensor | None
    down: Tensor  # (Y − b − p·W_downᵀ)ᵀp
    gram: Tensor  # pᵀp


class _Weights(NamedTuple):
    up: Tensor
    gate: Tensor | None
    down: Tensor


def prune_ffn(
    ffn: FFN,
    n_sequences: int,
    pattern: Pattern,
    method: SparseLLM | None = None,
    *,
    block_size: int = BLOCK,
    damping: float = DAMPING,
    watch: Callable[[str, Tensor, Tensor], None] | None = None,
) -> Pruned:
    """Prune the matrices of one FFN by SparseLLM.

    Args:
        ffn: its weights are left alone; its z, s and p are changed.
        n_sequences: n in H = (2/n)·Σxxᵀ.
        pattern: what each matrix is to look like.
        method: how.
        block_size: as for `sparsegpt`.
        damping: as for `sparsegpt`.
        watch: told of each call of the local solver: name, weight before, weight after.

    Raises:
        PrunekitError: activations that are not finite or all zero.
    """
    check_damping(damping)
    method = (method or SparseLLM()).for_form(ffn.gate is not None)
    solver = _Solver(pattern, block_size, damping, watch or (lambda *_: None))
    gram_x, gram_p = _gram(ffn.x), _gram(ffn.p)
    _check(gram_x, gram_p)
    inner = _Fitter(gram_x, n_sequences, method.faithful, damping)
    down_factor = solver.factor(gram_p * (2 / n_sequences))
    weights, best, errors = _Weights(ffn.up, ffn.gate, ffn.down), (0, _Weights(ffn.up, ffn.gate, ffn.down)), []
    sums: _Sums | None = None
    for iteration in range(method.n_iterations):
        if sums is not None:
            weights = _fitted(ffn, weights, sums, inner, method, damping)
            down_factor = solver.factor(sums.gram * (2 / n_sequences))
        weights = _pruned(weights, inner.factor(solver), down_factor, solver)
        last = iteration + 1 == method.n_iterations
        sums = _sweep(ffn, weights, method, last)
        errors.append(sums.error)
        if method.faithful or iteration == 0 or sums.error < min(errors[:-1]):
            best = (iteration, weights)
    return Pruned(*best[1], tuple(errors), best[0], solver.largest)


def _check(gram_x: Tensor, gram_p: Tensor) -> None:
    for gram, what in ((gram_x, "reads"), (gram_p, "hands to its down projection")):
        if not bool(gram.isfinite().all()):
            raise PrunekitError(f"what the FFN {what} is not finite; check the weights and the calibration set")
        if not bool(gram.diagonal().any()):
            raise PrunekitError(f"what the FFN {what} is zero for every token of the calibration set; give another one")


class _Solver:
    """SparseGPT with what is the same for all its calls."""

    def __init__(self, pattern: Pattern, block_size: int, damping: float, watch: Callable) -> None:
        self._pattern, self._block_size, self._watch, self.damping = pattern, block_size, watch, damping
        self.largest = damping

    def factor(self, hessian: Tensor) -> Factor:
        found = factorize(hessian, self.damping)
        self.largest = max(self.largest, found.damping)
        return found

    def __call__(self, name: str, weight: Tensor, factor: Factor) -> Tensor:
        result = solve(weight, factor, self._pattern, self._block_size)
        self._watch(name, weight, result)
        return result


class _Fitter:
    """What the up and gate projections share: the Hessian of X, and least squares on X."""

    def __init__(self, gram: Tensor, n_sequences: int, faithful: bool, damping: float) -> None:
        self._hessian, self._faithful, self._damping = gram * (2 / n_sequences), faithful, damping
        self._factor: Factor | None = None
        self._gram = gram

    def factor(self, solver: _Solver) -> Factor:
        """The factor for pruning; a faithful Hessian is damped once more each time."""
        if self._factor is None or self._faithful:
            self._factor = solver.factor(self._hessian)
            if self._faithful:
                dead = self._factor.dead
                self._hessian = damped(self._hessian, self._damping)[0]
                self._factor = self._factor._replace(dead=dead)
        return self._factor

    def fitted(self, weight: Tensor, cross: Tensor) -> Tensor:
        """A weight moved by least squares: W + (z − WX)Xᵀ·(XXᵀ + λI)⁻¹, λ = 0 where faithful."""
        return weight + _times_inverse(cross, self._gram, 0.0 if self._faithful else self._damping)


def _times_inverse(cross: Tensor, gram: Tensor, damping: float) -> Tensor:
    """cross·(gram + λI)⁻¹, with the pseudo-inverse where there is no inverse."""
    upper = upper_factor(damped(gram, damping)[0] if damping else gram)
    if upper is None:
        return cross @ torch.linalg.pinv(gram, hermitian=True)
    return (cross @ upper.T) @ upper


def _fitted(ffn: FFN, weights: _Weights, sums: _Sums, inner: _Fitter, method: SparseLLM, damping: float) -> _Weights:
    """Dense weights for the auxiliary variables as they are."""
    up = inner.fitted(weights.up, sums.up)
    gate = None if weights.gate is None or sums.gate is None else inner.fitted(weights.gate, sums.gate)
    if method.faithful and gate is None:
        return _Weights(up, None, _descended(weights.down, sums, ffn.y.numel()))
    change = _times_inverse(sums.down, sums.gram, 0.0 if method.faithful else damping)
    return _Weights(up, gate, weights.down + change)


def _descended(down: Tensor, sums: _Sums, n_values: int) -> Tensor:
    """W_down after ten gradient steps on the mean of (W_down·p + b − Y)²."""
    rest, rate = sums.down, _FITTING_RATE * 2 / n_values
    for _ in range(_FITTING_STEPS):
        down = down + rate * rest
        rest = rest - rate * (rest @ sums.gram)
    return down


def _pruned(weights: _Weights, inner: Factor, down: Factor, solver: _Solver) -> _Weights:
    up = solver("up", weights.up, inner)
    gate = None if weights.gate is None else solver("gate", weights.gate, inner)
    return _Weights(up, gate, solver("down", weights.down, down))


def _sweep(ffn: FFN, weights: _Weights, method: SparseLLM, last: bool) -> _Sums:
    """Bring p, z and s up to date, some tokens at once; after the last iteration only the error is asked for."""
    d_ff, d_model = weights.up.shape
    kernel = _kernel(weights.down, method)
    error = size = 0.0
    zeros = ffn.x.new_zeros
    up, gate, down, gram = zeros(d_ff, d_model), zeros(d_ff, d_model), zeros(d_model, d_ff), zeros(d_ff, d_ff)
    for at in _portions(len(ffn.x)):
        x, y = ffn.x[at], ffn.y[at]
        m = _affine(x, weights.up, ffn.up_bias)
        g = None if weights.gate is None else _affine(x, weights.gate, ffn.gate_bias)
        hidden = ffn.activation(m) if g is None else ffn.activation(g) * m
        error += float((_affine(hidden, weights.down, ffn.down_bias) - y).square().sum())
        size += float(y.square().sum())
        if last:
            continue
        _update(ffn, at, m, g, y if ffn.down_bias is None else y - ffn.down_bias, weights.down, kernel, method)
        p = ffn.p[at]
        up.addmm_((ffn.z[at] - m).T, x)
        if g is not None and ffn.s is not None:
            gate.addmm_((ffn.s[at] - g).T, x)
        down.addmm_((y - _affine(p, weights.down, ffn.down_bias)).T, p)
        gram.addmm_(p.T, p)
    return _Sums(error / max(size, torch.finfo(torch.float32).tiny), up, gate, down, gram)


def _update(
    ffn: FFN, at: slice, m: Tensor, g: Tensor | None, wanted: Tensor, down: Tensor, kernel: Tensor, method: SparseLLM
) -> None:
    """p, z and s of some tokens, in this order, each from the newest of the others."""
    alpha, gamma = method.alpha or 0.0, method.gamma or 0.0
    if g is None or ffn.s is None:
        hidden = ffn.activation(ffn.z[at])
        p = ffn.p[at] = hidden + ((wanted - hidden @ down.T) @ kernel) @ down
        ffn.z[at] = toward_activation(ffn.activation, p, m, ffn.z[at], alpha, gamma)
        return
    s = ffn.s[at]
    opened = ffn.activation(s)
    hidden = opened * ffn.z[at]
    p = ffn.p[at] = hidden + ((wanted - hidden @ down.T) @ kernel) @ down
    z = ffn.z[at] = (alpha * m + gamma * opened * p) / (gamma * opened.square() + alpha)
    ffn.s[at] = (
        _descend(ffn.activation, p, g, z, s, alpha, gamma)
        if method.faithful
        else toward_activation(ffn.activation, p, g, s, alpha, gamma, z)
    )


def _descend(activation: Activation, p: Tensor, g: Tensor, z: Tensor, s: Tensor, alpha: float, gamma: float) -> Tensor:
    """s after two gradient steps on α‖s − g‖² + γ‖p − φ(s)⊙z‖², which overshoot where z is large."""
    for _ in range(_GRADIENT_STEPS):
        value, slope = derivative(activation, s)
        s = s - _GRADIENT_RATE * 2 * (alpha * (s - g) - gamma * (p - value * z) * z * slope)
    return s


def _kernel(down: Tensor, method: SparseLLM) -> Tensor:
    """K in p = φ + (Y − b − φ·Wᵀ)·K·W, which minimises β‖pWᵀ + b − Y‖² + γ‖p − φ‖²: (γ/β·I + WWᵀ)⁻¹."""
    matrix = down @ down.T
    matrix.diagonal().add_((method.gamma or 0.0) / (method.beta or 1.0))
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


def _gram(x: Tensor) -> Tensor:
    total = x.new_zeros(x.shape[1], x.shape[1])
    for at in _portions(len(x)):
        total.addmm_(x[at].T, x[at])
    return total


def _portions(n: int) -> Iterator[slice]:
    return (slice(start, start + TOKENS_AT_ONCE) for start in range(0, n, TOKENS_AT_ONCE))
