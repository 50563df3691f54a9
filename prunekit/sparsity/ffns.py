"""FFNs of a layer: finds them by testing which inputs are computed from which outputs, and prunes one by SparseLLM."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunekit.checks import Positive, check_value
from prunekit.errors import PrunekitError
from prunekit.sparsity.auxiliaries import FFN, Activation, Sums, Weights, gram_of, sweep
from prunekit.sparsity.matrices import Call, Matrix
from prunekit.sparsity.matrix_inputs import DAMPING, damped, factorize, upper_factor
from prunekit.sparsity.patterns import Pattern
from prunekit.sparsity.solvers import SparseLLM, solve

_FITTING_STEPS, _FITTING_RATE = 10, 0.01  # of W_down in a faithful two-matrix FFN
_ROWS = 64  # tokens for the test
_FUNCTIONS: tuple[Activation, ...] = (torch.relu, functional.silu, functional.gelu)


class Pruned(NamedTuple):
    """The weights of an FFN after SparseLLM.

    Attributes:
        weights: named as in `FFN`.
        errors: ‖FFN(X) − Y‖² / ‖Y‖² after each iteration; the first is SparseGPT's.
        kept: the iteration of these weights.
        damping: the largest damping that a factor needed.
    """

    weights: Weights
    errors: tuple[float, ...]
    kept: int
    damping: float


def prune_ffn(
    ffn: FFN,
    n_sequences: int,
    pattern: Pattern | Mapping[str, Pattern],
    method: SparseLLM | None = None,
    *,
    damping: float = DAMPING,
    watch: Callable[[str, Tensor, Tensor], None] | None = None,
) -> Pruned:
    """Prune the matrices of one FFN by SparseLLM.

    Args:
        ffn: its weights are unchanged; its z, s and p are changed.
        n_sequences: n in H = (2/n)·Σxxᵀ.
        pattern: the pattern of every matrix, or `"up"`, `"gate"` and `"down"` → its pattern.
        method: options of SparseLLM.
        damping: as for `sparsegpt`.
        watch: called after each call of the local solver with name, weight before, weight after.

    Raises:
        PrunekitError: a damping that is not above 0, activations that are not finite or all zero.
    """
    check_value("damping", damping, Positive)
    method = (method or SparseLLM()).for_form("gate" in ffn.weights)
    patterns = pattern if isinstance(pattern, Mapping) else dict.fromkeys(ffn.weights, pattern)
    gram_x, gram_p = gram_of(ffn.x), gram_of(ffn.p)
    for gram, what in ((gram_x, "reads"), (gram_p, "passes to its down projection")):
        if not bool(gram.isfinite().all()):
            raise PrunekitError(f"what the FFN {what} is not finite; check the weights and the calibration set")
        if not bool(gram.diagonal().any()):
            raise PrunekitError(f"what the FFN {what} is zero for every token of the calibration set; give another one")
    hessian_x = gram_x * (2 / n_sequences)
    factor_x = factorize(hessian_x, damping)
    largest = factor_x.damping
    weights = ffn.weights
    best, errors = (0, weights), list[float]()
    sums: Sums | None = None
    for iteration in range(method.n_iterations):
        if sums is not None:
            weights = _fitted(ffn, weights, sums, gram_x, method, damping)
            gram_p = sums.gram
            if method.faithful:  # damping adds up
                hessian_x = damped(hessian_x, damping)[0]
                factor_x = factorize(hessian_x, damping)
        factor_p = factorize(gram_p * (2 / n_sequences), damping)
        largest = max(largest, factor_x.damping, factor_p.damping)
        solved = {}
        for name, weight in weights.items():
            solved[name] = solve(weight, factor_p if name == "down" else factor_x, patterns[name])
            if watch is not None:
                watch(name, weight, solved[name])
        weights = solved
        sums = sweep(ffn, weights, method, last=iteration + 1 == method.n_iterations)
        errors.append(sums.error)
        if method.faithful or iteration == 0 or sums.error < min(errors[:-1]):
            best = (iteration, weights)
    return Pruned(best[1], tuple(errors), best[0], largest)


def _times_inverse(cross: Tensor, gram: Tensor, damping: float) -> Tensor:
    """cross·(gram + λI)⁻¹, or the pseudo-inverse if there is no inverse."""
    upper = upper_factor(damped(gram, damping)[0] if damping else gram)
    if upper is None:
        return cross @ torch.linalg.pinv(gram, hermitian=True)
    return (cross @ upper.T) @ upper


def _fitted(ffn: FFN, weights: Weights, sums: Sums, gram_x: Tensor, method: SparseLLM, damping: float) -> Weights:
    """Dense weights fitted to the present auxiliary variables: W + (z − WX)Xᵀ·(XXᵀ + λI)⁻¹, λ = 0 where faithful."""
    fitted = {}
    for name, cross in sums.cross.items():
        if name == "down" and method.faithful and "gate" not in weights:
            fitted[name] = _descended(weights[name], sums, ffn.y.numel())
            continue
        gram = sums.gram if name == "down" else gram_x
        fitted[name] = weights[name] + _times_inverse(cross, gram, 0.0 if method.faithful else damping)
    return fitted


def _descended(down: Tensor, sums: Sums, n_values: int) -> Tensor:
    """W_down after ten gradient steps on the mean of (W_down·p + b − Y)²."""
    rest, rate = sums.cross["down"], _FITTING_RATE * 2 / n_values
    for _ in range(_FITTING_STEPS):
        down = down + rate * rest
        rest = rest - rate * (rest @ sums.gram)
    return down


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a matrix: all, or one of the halves where two projections are fused.

    Attributes:
        matrix: (out, in).
        rows: a range of rows.
    """

    matrix: Matrix
    rows: slice

    @property
    def weight(self) -> Tensor:
        """A view (rows, in)."""
        return self.matrix.weight[self.rows]


@dataclass(frozen=True, eq=False)
class FoundFFN:
    """An FFN of a layer: p = φ(z), or φ(s)⊙z.

    Attributes:
        parts: `"up"`, which outputs z; `"gate"`, which outputs s, if there is one; `"down"`, whose inputs are p.
        activation: φ.
    """

    parts: Mapping[str, Rows]
    activation: Activation

    @property
    def down(self) -> Matrix:
        """The down projection."""
        return self.parts["down"].matrix

    @property
    def matrices(self) -> list[Matrix]:
        """All its matrices, each once."""
        return list(dict.fromkeys(part.matrix for part in self.parts.values()))


@contextmanager
def activations_of(layer: nn.Module, found: dict[nn.Module, int]) -> Iterator[None]:
    """A context that records modules without matrices that keep a tensor's shape, with its width."""

    def note(module: nn.Module, args: tuple, result: Any) -> None:
        alike = len(args) == 1 and isinstance(result, Tensor) and isinstance(args[0], Tensor)
        if alike and args[0].shape == result.shape and result.dim():
            found[module] = result.shape[-1]

    with ExitStack() as hooks:
        for module in layer.modules():
            if not module._modules and _may_be_activation(module):
                hooks.callback(module.register_forward_hook(note).remove)
        yield


def _may_be_activation(module: nn.Module) -> bool:
    scalars = all(p is None or p.numel() == 1 for p in module._parameters.values())
    return scalars and not isinstance(module, nn.Dropout | nn.Identity | nn.LayerNorm | nn.RMSNorm)


def find_ffns(calls: list[Call], activations: dict[nn.Module, int]) -> list[FoundFFN]:
    """The FFNs among the matrix products of one batch; unknown forms are left out.

    Args:
        calls: the products in their order.
        activations: candidate modules → their width; ReLU, SiLU and GELU are tried too.
    """
    found: list[FoundFFN] = []
    for number, down in enumerate(calls):
        n_tokens, d_ff = down.inputs.shape
        alike = [call for call in calls[:number] if len(call.outputs) == n_tokens and call.matrix is not down.matrix]
        before = [call for call in alike if call.outputs.shape[1] in (d_ff, 2 * d_ff)]
        fitting = [module for module, width in activations.items() if width == d_ff]
        ffn = _matching(before, down, [*fitting, *_FUNCTIONS]) if len(down.inputs) else None
        if ffn is not None:
            found.append(ffn)
    return found


def _matching(before: list[Call], down: Call, activations: list[Activation]) -> FoundFFN | None:
    """The FFN form that reproduces the inputs of `down` best from outputs of earlier calls."""
    p = down.inputs[:_ROWS]
    parts = [(*part, call.inputs[:_ROWS]) for call in before for part in _parts(call, p.shape[1])]
    whole, ways = Rows(down.matrix, slice(None)), list[tuple[float, FoundFFN]]()
    for activation in (in_float32(a) for a in activations):
        for gate, s, x in parts:
            opened = activation(s)
            if not _elementwise(activation, s):
                continue
            ways.append((_distance(opened, p), FoundFFN({"up": gate, "down": whole}, activation)))
            same = (
                (up, z) for up, z, read in parts if up is not gate and read.shape == x.shape and torch.equal(read, x)
            )
            gated = ((_distance(opened * z, p), {"up": up, "gate": gate, "down": whole}) for up, z in same)
            ways += [(distance, FoundFFN(parts, activation)) for distance, parts in gated]
    best = min(ways, key=lambda way: way[0], default=None)
    return best[1] if best is not None and best[0] <= 4 * torch.finfo(p.dtype).eps else None


def in_float32(activation: Activation) -> Activation:
    """The activation on a copy in float32 or wider, safe for in-place modules."""
    if isinstance(activation, nn.Module) and any(p.element_size() < 4 for p in activation.parameters()):
        activation = copy.deepcopy(activation).float()
    return lambda z: activation(z.to(torch.promote_types(z.dtype, torch.float32), copy=True))


def _parts(call: Call, d_ff: int) -> list[tuple[Rows, Tensor]]:
    y = call.outputs[:_ROWS]
    halves = [slice(0, d_ff)] if y.shape[1] == d_ff else [slice(0, d_ff), slice(d_ff, 2 * d_ff)]
    return [(Rows(call.matrix, rows), y[:, rows]) for rows in halves]


def _elementwise(activation: Activation, z: Tensor) -> bool:
    """Whether a function is elementwise."""
    kept = torch.arange(z.shape[1], device=z.device) % 2 == 0
    return _distance(activation(z * kept.to(z))[:, kept], activation(z)[:, kept]) <= 1e-5


def _distance(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    size = b.float().norm()
    return float((a - b).float().norm() / size) if size else float("inf")
