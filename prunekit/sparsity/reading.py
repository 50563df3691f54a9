"""What the matrices of one layer read and return, batch after batch, with sums shared where the inputs are."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunekit.errors import PrunekitError
from prunekit.layerwise import Passes
from prunekit.sparsity.grams import add_to_gram, complete_gram
from prunekit.sparsity.matrices import Call, Matrix, watching


@dataclass
class Gram:
    """Sums over what one or more matrices read.

    Attributes:
        total: Σxxᵀ, float32 at least (in, in).
        n_tokens: that were read.
        n_sequences: in the calibration set.
    """

    total: Tensor
    n_tokens: int
    n_sequences: int

    @property
    def hessian(self) -> Tensor:
        """H = (2/n)·Σxxᵀ, n the number of sequences, as SparseGPT has it."""
        return self.total * (2 / self.n_sequences)


@dataclass
class Reading:
    """One layer's matrices and what they read.

    Attributes:
        first: the products of the first batch, in order; emptied once they have been looked at.
        leaders: matrix → the matrix whose inputs it shares, often itself.
        grams: leader → sums.
        kept: what was asked to be kept, whole: (matrix, "inputs" or "outputs") → portions (n_tokens, width).
        biases: of matrices that have one.
    """

    first: list[Call] = field(default_factory=list)
    leaders: dict[Matrix, Matrix] = field(default_factory=dict)
    grams: dict[Matrix, Gram] = field(default_factory=dict)
    kept: dict[tuple[Matrix, str], list[Tensor]] = field(default_factory=dict)
    biases: dict[Matrix, Tensor] = field(default_factory=dict)

    def gram(self, matrix: Matrix) -> Gram | None:
        """Sums over what a matrix read; None where no token came to it."""
        return self.grams.get(self.leaders.get(matrix, matrix))

    def whole(self, matrix: Matrix, side: str) -> Tensor:
        """All that was kept of a matrix, one tensor (n_tokens, width)."""
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
) -> Reading:
    """Run all batches through one layer, dense as it is, behind layers that are as they are.

    Args:
        passes: the batches on their way.
        layer: its path.
        matrices: those of the layer.
        n_sequences: in the calibration set.
        choose: the products of the first batch → what is to be kept whole; None keeps nothing.

    Raises:
        PrunekitError: inputs that are not finite.
    """
    reading = Reading()
    passes.begin()
    with torch.no_grad():
        with watching(matrices, reading.first.append):
            passes.run(layer, 0)
        reading.leaders = _leaders(reading.first)
        keep = set(choose(reading.first)) if choose is not None else set()

        def add(call: Call) -> None:
            _add(reading, call, n_sequences, keep)

        for call in reading.first:
            add(call)
        reading.first.clear()
        for batch in range(1, passes.n_batches):
            with watching(matrices, add):
                passes.run(layer, batch)
    for matrix, gram in reading.grams.items():
        complete_gram(gram.total)
        if not bool(gram.total.isfinite().all()):
            raise PrunekitError(f"what {matrix.name} reads is not finite; check the weights and the calibration set")
    return reading


def _leaders(calls: list[Call]) -> dict[Matrix, Matrix]:
    """Who shares inputs with whom: the same memory, all of it held until now, so that none was used twice."""
    times: dict[Matrix, int] = {}
    for call in calls:
        times[call.matrix] = times.get(call.matrix, 0) + 1
    first: dict[tuple, Matrix] = {}
    found = {}
    for call in calls:
        if times[call.matrix] == 1:
            x = call.inputs
            found[call.matrix] = first.setdefault((x.data_ptr(), x.shape, x.stride(), x._version), call.matrix)
    return found


def _add(reading: Reading, call: Call, n_sequences: int, keep: set[tuple[Matrix, str]]) -> None:
    matrix = call.matrix
    if reading.leaders.get(matrix, matrix) is matrix and len(call.inputs):
        x = call.inputs.to(torch.promote_types(call.inputs.dtype, torch.float32))
        gram = reading.grams.get(matrix)
        if gram is None:
            gram = reading.grams[matrix] = Gram(x.new_zeros(x.shape[1], x.shape[1]), 0, n_sequences)
        add_to_gram(gram.total, x)
        gram.n_tokens += len(x)
    for side, tensor in (("inputs", call.inputs), ("outputs", call.outputs)):
        if (matrix, side) in keep:
            reading.kept.setdefault((matrix, side), []).append(
                tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            )
    if call.bias is not None:
        reading.biases[matrix] = call.bias.detach()
