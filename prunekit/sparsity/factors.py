"""The inverse of a Hessian as SparseGPT needs it: a damped Cholesky factor that does not fail."""

from typing import NamedTuple

import torch
from torch import Tensor

from prunekit.errors import PrunekitError

DAMPING = 0.01  # of the mean diagonal; SparseGPT's percdamp
_STEP = 10.0  # factor on damping if no Cholesky factor exists
_TRIES = 7
_SMALL = 128  # largest triangular matrix inverted directly


class Factor(NamedTuple):
    """The Cholesky factor of an inverse Hessian, shared by matrices with the same inputs.

    Attributes:
        upper: U with H⁻¹ = UᵀU, upper triangular, (in, in).
        dead: inputs that are always zero, bool (in,).
        damping: share of the mean diagonal that was added.
    """

    upper: Tensor
    dead: Tensor
    damping: float


def damped(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The damped Hessian, with 1 on the diagonal of dead inputs, and the mask of dead inputs."""
    dead = hessian.diagonal() == 0
    result = hessian.clone()
    result.diagonal()[dead] = 1
    result.diagonal().add_(damping * result.diagonal().mean())
    return result, dead


def factorize(hessian: Tensor, damping: float = DAMPING) -> Factor:
    """The factor of a damped Hessian; damping grows tenfold until a Cholesky factor exists.

    One Cholesky factor and one triangular inverse: with P the reversal of rows and columns, PHP = LLᵀ gives
    U = P L⁻¹ P.

    Args:
        hessian: H = (2/n)·Σxxᵀ, float (in, in); any scale.
        damping: share of the mean diagonal, above 0.

    Raises:
        PrunekitError: no factor exists even with strong damping.
    """
    used = damping
    for _ in range(_TRIES):
        matrix, dead = damped(hessian, used)
        upper = upper_factor(matrix)
        if upper is not None:
            return Factor(upper, dead, used)
        used *= _STEP
    raise PrunekitError(
        f"the Hessian has no Cholesky factor even with damping={used / _STEP:g}: give Σxxᵀ of the inputs"
    )


def upper_factor(matrix: Tensor) -> Tensor | None:
    """U, upper triangular, with matrix⁻¹ = UᵀU; None where the matrix is not positive definite.

    The Cholesky factor is computed in float64, since its error grows with the square of the inverse's.
    """
    flipped = matrix.flip(0, 1)
    lower, failed = torch.linalg.cholesky_ex(flipped if flipped.device.type == "mps" else flipped.double())
    if failed:
        return None
    upper = _inverse(lower.to(matrix.dtype)).flip(0, 1)
    return upper if bool(upper.diagonal().isfinite().all()) else None


def _inverse(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix, by recursive halving, so that most of the work is matrix products."""
    n = len(lower)
    if n <= _SMALL:
        eye = torch.eye(n, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, eye, upper=False)
    half, result = n // 2, torch.zeros_like(lower)
    first, last = _inverse(lower[:half, :half]), _inverse(lower[half:, half:])
    result[:half, :half], result[half:, half:] = first, last
    torch.mm(last @ lower[half:, :half], first, out=result[half:, :half]).neg_()
    return result
