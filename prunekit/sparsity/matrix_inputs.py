"""Statistics of the inputs of one layer's matrices: Gram matrices, and their inverse as SparseGPT needs it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
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
        n_sequences: number of sequences in the calibration set.
    """

    squares: Tensor
    gram: Tensor | None
    n_sequences: int

    @property
    def hessian(self) -> Tensor:
        """H = (2/n)·Σxxᵀ, n the number of sequences, as SparseGPT has it."""
        assert self.gram is not None  # solvers that use a Hessian have requested it
        return self.gram * (2 / self.n_sequences)

    def copied(self) -> "InputSums":
        """A copy of the sums."""
        return replace(self, squares=self.squares.clone(), gram=None if self.gram is None else self.gram.clone())


@dataclass
class Reading:
    """Input statistics of one layer's matrices.

    Attributes:
        leaders: matrix → the matrix whose inputs it shares, often itself.
        sums: leader → its sums.
        kept: (matrix, "inputs" or "outputs") → stored activations, in parts (n_tokens, width).
        biases: matrix → its bias.
    """

    leaders: dict[Matrix, Matrix] = field(default_factory=dict)
    sums: dict[Matrix, InputSums] = field(default_factory=dict)
    kept: dict[tuple[Matrix, str], list[Tensor]] = field(default_factory=dict)
    biases: dict[Matrix, Tensor] = field(default_factory=dict)

    def sums_of(self, matrix: Matrix) -> InputSums | None:
        """Sums over the inputs of a matrix; None if no token reached it."""
        return self.sums.get(self.leaders.get(matrix, matrix))

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
    n_sequences: int,
    choose: Callable[[list[Call]], Keep] | None = None,
    with_gram: bool = True,
) -> Reading:
    """Run all batches through one dense layer and collect its input statistics.

    Args:
        passes: the batches in front of the layer.
        layer: path of the layer.
        matrices: matrices of the layer.
        n_sequences: number of sequences in the calibration set.
        choose: products of the first batch → activations to store; None stores none.
        with_gram: compute Σxxᵀ besides Σx².

    Raises:
        PrunekitError: inputs that are not finite.
    """
    reading, sharing, first = Reading(), _Sharing(), []
    passes.begin()

    def look(call: Call) -> None:
        for matrix, leader in sharing.note(call):
            reading.sums[matrix] = reading.sums[leader].copied()
        if sharing.leaders[call.matrix] is call.matrix:
            _add_to_sums(reading, call, n_sequences, with_gram)
        if choose is not None:  # the model may overwrite its outputs
            first.append(call._replace(inputs=call.inputs.clone(), outputs=call.outputs.clone()))

    def add(call: Call) -> None:
        if reading.leaders.get(call.matrix, call.matrix) is call.matrix:
            _add_to_sums(reading, call, n_sequences, with_gram)
        _keep(reading, call, keep)

    with torch.no_grad():
        with watching(matrices, look):
            passes.run(layer, 0)
        reading.leaders = sharing.settled(reading.sums)
        keep = set(choose(first)) if choose is not None else set()
        for call in first:
            _keep(reading, call, keep)
        first.clear()
        for batch in range(1, passes.n_batches):
            with watching(matrices, add):
                passes.run(layer, batch)
    for matrix, sums in reading.sums.items():
        if sums.gram is not None:
            complete_gram(sums.gram)
        if not bool(sums.squares.isfinite().all()):
            raise PrunekitError(
                f"the inputs of {matrix.name} are not finite; check the weights and the calibration set"
            )
    return reading


class _Sharing:
    """Groups matrices by shared inputs: the same unchanged memory, held until the batch ends."""

    def __init__(self) -> None:
        self._first: dict[tuple, Matrix] = {}
        self.leaders: dict[Matrix, Matrix] = {}
        self._held: list[Tensor] = []

    def note(self, call: Call) -> list[tuple[Matrix, Matrix]]:
        """Process a product; returns matrices that no longer share inputs, each with its former leader."""
        matrix, x = call.matrix, call.inputs
        self._held.append(x)
        if matrix in self.leaders:  # used again, with other inputs
            parted = [(m, leader) for m, leader in self.leaders.items() if m is not leader and matrix in (m, leader)]
            self.leaders |= {m: m for m, _ in parted}
            return parted
        key = (x.data_ptr(), x.shape, x.stride(), version_of(x))
        self.leaders[matrix] = self._first.setdefault(key, matrix)
        return []

    def settled(self, sums: dict[Matrix, InputSums]) -> dict[Matrix, Matrix]:
        """Matrix → the matrix whose sums it shares."""
        self._held.clear()
        return {matrix: leader for matrix, leader in self.leaders.items() if leader in sums}


def _add_to_sums(reading: Reading, call: Call, n_sequences: int, with_gram: bool) -> None:
    if len(call.inputs):
        x = call.inputs.to(torch.promote_types(call.inputs.dtype, torch.float32))
        sums = reading.sums.get(call.matrix)
        if sums is None:
            gram = x.new_zeros(x.shape[1], x.shape[1]) if with_gram else None
            sums = reading.sums[call.matrix] = InputSums(x.new_zeros(x.shape[1]), gram, n_sequences)
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
