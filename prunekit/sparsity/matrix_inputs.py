"""Statistics of the inputs of one layer's matrices: Gram matrices, and their inverse as SparseGPT needs it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from prunekit.compat import version_of
from prunekit.errors import PrunekitError
from prunekit.layerwise import Passes
from prunekit.sparsity.matrices import Call, Matrix, watching

_COLUMNS = 512  # columns of a Gram matrix summed at once, from the diagonal down


def add_to_gram(total: Tensor, x: Tensor) -> None:
    """Add Σxxᵀ to the lower half of a Gram matrix; the upper half is not updated.

    Args:
        total: (width, width), changed in place.
        x: (n_tokens, width).
    """
    for start in range(0, len(total), _COLUMNS):
        total[start:, start : start + _COLUMNS].addmm_(x[:, start:].T, x[:, start : start + _COLUMNS])


def complete_gram(total: Tensor) -> Tensor:
    """Fill a Gram matrix from its lower half, in place."""
    for start in range(0, len(total), _COLUMNS):
        end = start + _COLUMNS
        total[start:end, end:] = total[end:, start:end].T
        block = total[start:end, start:end]
        block.copy_(torch.tril(block) + torch.tril(block, -1).T)
    return total


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


@dataclass
class InputSums:
    """Sums over the inputs of one or more matrices.

    Attributes:
        squares: Σx², float32 at least (in,).
        gram: Σxxᵀ (in, in); None if not needed, since it costs a matrix product.
        factor: that of the Hessian, once it is computed.
    """

    squares: Tensor
    gram: Tensor | None
    factor: Factor | None = None

    def copied(self) -> "InputSums":
        """A copy of the sums."""
        return InputSums(self.squares.clone(), None if self.gram is None else self.gram.clone())


@dataclass
class Reading:
    """Input statistics of one layer's matrices.

    Attributes:
        sums: matrix → sums over its inputs, the same object for matrices with the same inputs. A matrix that no token
            reached is not in it.
        kept: (matrix, "inputs" or "outputs") → stored activations, in parts (n_tokens, width).
        biases: matrix → its bias.
    """

    sums: dict[Matrix, InputSums] = field(default_factory=dict)
    kept: dict[tuple[Matrix, str], list[Tensor]] = field(default_factory=dict)
    biases: dict[Matrix, Tensor] = field(default_factory=dict)

    def whole(self, matrix: Matrix, side: str) -> Tensor:
        """Stored activations of a matrix, one tensor (n_tokens, width)."""
        portions = self.kept[matrix, side]
        if len(portions) > 1:
            portions[:] = [torch.cat(portions)]
        return portions[0]


Keep = Iterable[tuple[Matrix, str]]


def read_layer(
    passes: Passes,
    layer: str,
    matrices: list[Matrix],
    choose: Callable[[list[Call]], Keep] | None = None,
    with_gram: bool = True,
) -> Reading:
    """Run all batches through one dense layer and collect its input statistics.

    The first batch shows which matrices share their inputs: those that read the same unchanged memory.

    Args:
        passes: the batches in front of the layer.
        layer: path of the layer.
        matrices: matrices of the layer.
        choose: products of the first batch → activations to store; None stores none.
        with_gram: compute Σxxᵀ besides Σx².

    Raises:
        PrunekitError: inputs that are not finite.
    """
    reading, first = Reading(), list[Call]()
    read: dict[
        tuple, tuple[Tensor, InputSums]
    ] = {}  # memory → the inputs, held so that it stays theirs, and their sums
    passes.begin()

    def look(call: Call) -> None:
        x, sums = call.inputs, reading.sums.get(call.matrix)
        memory = (x.data_ptr(), x.shape, x.stride(), version_of(x))
        if sums is not None:  # used again, with other inputs, which no other matrix shares
            reading.sums[call.matrix] = sums.copied()
            _add_to_sums(reading, call, with_gram)
        elif memory in read:
            reading.sums[call.matrix] = read[memory][1]
        elif len(x):
            _add_to_sums(reading, call, with_gram)
            read[memory] = x, reading.sums[call.matrix]
        if choose is not None:  # the model may overwrite its outputs
            first.append(call._replace(inputs=call.inputs.clone(), outputs=call.outputs.clone()))

    def add(call: Call) -> None:
        if call.matrix not in followers:
            _add_to_sums(reading, call, with_gram)
        _keep(reading, call, keep)

    with torch.no_grad():
        with watching(matrices, look):
            passes.run(layer, 0)
        read.clear()
        leaders = {id(sums): matrix for matrix, sums in reversed(reading.sums.items())}
        followers = reading.sums.keys() - leaders.values()  # whose inputs are added where their leader reads them
        keep = set(choose(first)) if choose is not None else set()
        for call in first:
            _keep(reading, call, keep)
        first.clear()
        for batch in range(1, passes.n_batches):
            with watching(matrices, add):
                passes.run(layer, batch)
    for matrix, sums in reading.sums.items():
        if sums.gram is not None and matrix not in followers:
            complete_gram(sums.gram)
        if not bool(sums.squares.isfinite().all()):
            raise PrunekitError(
                f"the inputs of {matrix.name} are not finite; check the weights and the calibration set"
            )
    return reading


def _add_to_sums(reading: Reading, call: Call, with_gram: bool) -> None:
    if len(call.inputs):
        x = call.inputs.to(torch.promote_types(call.inputs.dtype, torch.float32))
        sums = reading.sums.get(call.matrix)
        if sums is None:
            gram = x.new_zeros(x.shape[1], x.shape[1]) if with_gram else None
            sums = reading.sums[call.matrix] = InputSums(x.new_zeros(x.shape[1]), gram)
        sums.squares.add_(x.square().sum(0))
        if sums.gram is not None:
            add_to_gram(sums.gram, x)


def _keep(reading: Reading, call: Call, keep: set[tuple[Matrix, str]]) -> None:
    """Copy stored activations, since the model may overwrite them."""
    for side, tensor in (("inputs", call.inputs), ("outputs", call.outputs)):
        if (call.matrix, side) in keep:
            wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
            reading.kept.setdefault((call.matrix, side), []).append(wide)
    if call.bias is not None:
        reading.biases[call.matrix] = call.bias.detach()
