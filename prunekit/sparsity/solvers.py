"""The solvers magnitude, Wanda and SparseGPT: each returns a pruned copy of one weight matrix. Their options."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prunekit.calibration import all_finite
from prunekit.checks import Count, Positive, check_fields, check_value
from prunekit.errors import PrunekitError, warn
from prunekit.sparsity.matrix_inputs import DAMPING, Factor, factorize
from prunekit.sparsity.patterns import Pattern, pattern_of

BLOCK = 128  # columns between updates of all later columns; SparseGPT's blocksize
_SUB_BLOCK = 8  # columns between two updates of the rest of their block


def magnitude(
    weight: Tensor,
    statistics: Tensor | None = None,
    sparsity: float | str | None = None,
    *,
    pattern: tuple[int, int] | None = None,
) -> Tensor:
    """Prune a weight matrix by magnitude: the largest weights stay.

    Args:
        weight: (out, in).
        statistics: unused; all solvers have the same signature.
        sparsity: fraction of zeros over the whole matrix, in [0, 1), or `"2:4"`.
        pattern: (kept, of) in place of it: `kept` weights stay of every `of` along a row.

    Returns:
        The pruned copy, (out, in).

    Raises:
        PrunekitError: a weight that is not a finite matrix, or an invalid sparsity.

    Source: Han et al. (2015), one threshold a matrix; at the threshold itself weights go, as in SparseGPT's code.
    """
    return zeroed_lowest(weight, weight.abs(), _pattern_for(weight, sparsity, pattern))


def wanda(
    weight: Tensor,
    statistics: Tensor,
    sparsity: float | str | None = None,
    *,
    pattern: tuple[int, int] | None = None,
) -> Tensor:
    """Prune a weight matrix by Wanda: |weight| times the norm of its input, row by row, without an update.

    Args:
        weight: (out, in).
        statistics: sums of squares of each input (in,), or the Hessian (in, in), of which the diagonal is read. Any
            scale.
        sparsity: fraction of zeros in each row, in [0, 1), rounded down to whole weights; or `"2:4"`.
        pattern: (kept, of) in place of it.

    Returns:
        The pruned weight, new, (out, in).

    Raises:
        PrunekitError: an error of `magnitude`, or statistics that do not fit or are not finite.

    Source: Wanda (Sun et al., ICLR 2024), Eq. 1.
    """
    wanted = _pattern_for(weight, sparsity, pattern)
    squares = _check_statistics(statistics, weight).diagonal() if statistics.dim() == 2 else statistics
    scores = weight.abs() * _check_squares(squares, weight).sqrt()
    return zeroed_lowest_of_rows(weight, scores, wanted)


def sparsegpt(
    weight: Tensor,
    statistics: Tensor | Factor,
    sparsity: float | str | None = None,
    *,
    pattern: tuple[int, int] | None = None,
    block_size: int = BLOCK,
    damping: float = DAMPING,
) -> Tensor:
    """Prune a weight matrix by SparseGPT: column by column, with an update of the later columns.

    Args:
        weight: (out, in).
        statistics: the Hessian H = (2/n)·Σxxᵀ of the inputs, (in, in), any scale; or its `factorize(H)`, which
            matrices with the same inputs share.
        sparsity: fraction of zeros in each block of columns, in [0, 1), or `"2:4"`.
        pattern: (kept, of) in place of it.
        block_size: columns per block.
        damping: λ as a share of H's mean diagonal; raised tenfold, with a warning, where H has no factor. Not
            used with a `Factor`.

    Returns:
        The pruned and updated weight, new, (out, in). Inputs that are always zero have zero weights.

    Raises:
        PrunekitError: an error of `wanda`, inputs that are all zero, or an invalid damping.

    Source: SparseGPT (Frantar and Alistarh, ICML 2023), Alg. 1. Differs: computed in sub-blocks of the transposed
        weight, with a selection in place of a sort; the same masks.
    """
    wanted = _pattern_for(weight, sparsity, pattern)
    check_value("block_size", block_size, Count)
    check_value("damping", damping, Positive)
    if isinstance(statistics, Factor):
        return solve(weight, statistics, wanted, block_size)
    if not bool(_check_statistics(statistics, weight).diagonal().any()):
        raise PrunekitError("all inputs of this matrix are zero; give another calibration set")
    found = factorize(statistics, damping)
    if found.damping != damping:
        warn(f"the Hessian has no Cholesky factor with damping={damping:g}; {found.damping:g} was used")
    return solve(weight, found, wanted, block_size)


def solve(weight: Tensor, factor: Factor, pattern: Pattern, block_size: int = BLOCK) -> Tensor:
    """`sparsegpt` with a given factor and without its checks."""
    columns = weight.T.to(factor.upper.dtype).clone(memory_format=torch.contiguous_format)  # (in, out), changed below
    columns[factor.dead] = 0
    if pattern.sparsity > 0:
        size = block_size if pattern.of is None else max(block_size // pattern.of, 1) * pattern.of
        for start in range(0, len(columns), size):
            end = min(start + size, len(columns))
            errors = _solve_block(columns[start:end], factor.upper[start:end, start:end], pattern)
            columns[end:].addmm_(factor.upper[start:end, end:].T, errors, alpha=-1)
    return columns.T.to(weight.dtype).contiguous()


def _solve_block(block: Tensor, upper: Tensor, pattern: Pattern) -> Tensor:
    """Prune a block (columns, out) in place; returns each column's error over its diagonal, (columns, out)."""
    diagonal = upper.diagonal()[:, None]
    mask = torch.zeros_like(block, dtype=torch.bool)
    if pattern.of is None:
        scores = block**2 / diagonal**2
        mask = scores <= threshold(scores, pattern.sparsity)
    errors = torch.empty_like(block)
    step = _SUB_BLOCK if pattern.of is None else max(_SUB_BLOCK // pattern.of, 1) * pattern.of
    for start in range(0, len(block), step):
        end = min(start + step, len(block))
        for j in range(start, end):
            if pattern.of is not None and j % pattern.of == 0:
                run = slice(j, j + pattern.of)
                mask[run] = pattern.lowest(block[run] ** 2 / diagonal[run] ** 2)
            torch.div(block[j] * mask[j], diagonal[j], out=errors[j])
            block[j].masked_fill_(mask[j], 0)
            block[j + 1 : end].addr_(upper[j, j + 1 : end], errors[j], alpha=-1)
        block[end:].addmm_(upper[start:end, end:].T, errors[start:end], alpha=-1)
    return errors


def threshold(scores: Tensor, sparsity: float) -> Tensor:
    """The score at or below which weights are pruned: number ⌊numel·sparsity⌋ in ascending order, counted from 0."""
    return scores.flatten().kthvalue(int(scores.numel() * sparsity) + 1).values


def zeroed_lowest(weight: Tensor, scores: Tensor, pattern: Pattern) -> Tensor:
    """A weight (out, in) without those of the lowest scores, none of them updated."""
    if pattern.sparsity == 0:
        return weight.clone()
    if pattern.of is not None:
        return weight.masked_fill(pattern.lowest(scores.T).T, 0)
    return weight.masked_fill(scores <= threshold(scores, pattern.sparsity), 0)


def zeroed_lowest_of_rows(weight: Tensor, scores: Tensor, pattern: Pattern) -> Tensor:
    """A weight (out, in) without those of the lowest scores in each row, none of them updated."""
    if pattern.of is not None:
        return zeroed_lowest(weight, scores, pattern)
    n_zeros = int(weight.shape[1] * pattern.sparsity)
    if n_zeros == 0:
        return weight.clone()
    limit = scores.kthvalue(n_zeros, dim=1, keepdim=True).values  # twice as fast as a sort
    below, tied = scores < limit, scores == limit
    first = tied.cumsum(1) <= n_zeros - below.sum(1, keepdim=True)  # of equal scores the first are pruned
    return weight.masked_fill(below | (tied & first), 0)


def _pattern_for(weight: Any, sparsity: Any, pattern: Any) -> Pattern:
    """The pattern of the arguments, once it and the weight are valid."""
    wanted = pattern_of(sparsity, pattern)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        given = f"{weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise PrunekitError(f"a weight is a tensor of floating-point numbers (out, in), not {given}")
    if not all_finite(weight):
        raise PrunekitError("the weight has NaN or infinite values")
    wanted.check_width(weight.shape[1], "the weight")
    return wanted


def _check_statistics(statistics: Any, weight: Tensor) -> Tensor:
    n_in = weight.shape[1]
    if not isinstance(statistics, Tensor) or statistics.shape != (n_in, n_in):
        given = tuple(statistics.shape) if isinstance(statistics, Tensor) else type(statistics).__name__
        raise PrunekitError(f"the Hessian of a weight with {n_in} inputs is a tensor ({n_in}, {n_in}), not {given}")
    if not all_finite(statistics):
        raise PrunekitError("the Hessian has NaN or infinite values: check the activations")
    return statistics


def _check_squares(squares: Tensor, weight: Tensor) -> Tensor:
    if squares.shape != weight.shape[1:]:
        n_in = weight.shape[1]
        raise PrunekitError(f"sums of squares have shape {tuple(squares.shape)}; give one for each input, ({n_in},)")
    if not bool(squares.isfinite().all()) or bool((squares < 0).any()):
        raise PrunekitError("sums of squares are finite and not negative; these are not; check the activations")
    return squares


@dataclass(frozen=True)
class SparseLLM:
    """The SparseLLM method and its options.

    Attributes:
        n_iterations: T; with 1 it is SparseGPT.
        faithful: as in the released code, which fits weights with an undamped pseudo-inverse (two-matrix FFNs: W_down
            with ten gradient steps), moves s by two steps of a fixed length, adds up damping, and keeps the last
            iteration. It diverges if X is nearly rank-deficient or z is large. False, the default, fits weights by
            a proximal step, moves s by steps that cannot overshoot, damps each iteration alike,
            and keeps the iteration whose FFN output has the least error.
        alpha: weight of ‖z − WX‖²; None is .1 for two-matrix FFNs and 5 for gated ones, as in the released code.
        beta: weight of ‖W_down·p − Y‖²; None as above.
        gamma: weight of ‖p − φ(z)‖²; None as above.

    Source: SparseLLM (Bai et al., NeurIPS 2024), Eq. 4 to 12. Differs as said under `faithful`; there, pseudo-inverses
        are Gram matrices and Cholesky factors, and gradients closed forms.
    """

    n_iterations: Count = 4
    faithful: bool = False
    alpha: Positive | None = None
    beta: Positive | None = None
    gamma: Positive | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def for_form(self, gated: bool) -> "SparseLLM":
        """The options with default weights filled in."""
        default = 5.0 if gated else 0.1
        alpha, beta, gamma = (default if w is None else w for w in (self.alpha, self.beta, self.gamma))
        return replace(self, alpha=alpha, beta=beta, gamma=gamma)
