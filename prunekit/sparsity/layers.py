"""Prunes the matrices of one layer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import PrunekitError
from prunekit.layerwise import Passes
from prunekit.sparsity.auxiliaries import FFN
from prunekit.sparsity.ffns import FoundFFN, activations_of, find_ffns, prune_ffn
from prunekit.sparsity.matrices import Call, Matrix
from prunekit.sparsity.matrix_inputs import Factor, InputSums, Reading, factorize, read_layer
from prunekit.sparsity.patterns import Pattern
from prunekit.sparsity.solvers import SparseLLM, solve, zeroed_lowest, zeroed_lowest_of_rows

UNREACHED = "no token of the calibration set reached it"


@dataclass(frozen=True)
class Settings:
    """Settings that all layers share.

    Attributes:
        method: `"magnitude"`, `"wanda"`, `"sparsegpt"` or `"sparsellm"`.
        alternation: SparseLLM's options.
        patterns: matrix → its pattern.
        damping: damping of Hessians.
        n_sequences: number of sequences in the calibration set.
    """

    method: str
    alternation: SparseLLM
    patterns: Mapping[Matrix, Pattern]
    damping: float
    n_sequences: int


def prune_layer(
    module: nn.Module, passes: Passes, layer: str, matrices: list[Matrix], settings: Settings
) -> list[dict[str, Any]]:
    """Prune the matrices of one layer in place, all from one dense pass.

    Args:
        module: the layer.
        passes: the calibration set in front of the layer.
        layer: path of the layer.
        matrices: the matrices of the layer.
        settings: the settings.

    Returns:
        One row per matrix, as `SparsityReport.rows` has them.

    Raises:
        PrunekitError: activations that are not finite or all zero.
    """
    ffns: list[FoundFFN] = []
    activations: dict[nn.Module, int] = {}

    def choose(calls: list[Call]) -> Iterator[tuple[Matrix, str]]:
        ffns.extend(_with_other_experts(find_ffns(calls, activations), matrices))
        for ffn in ffns:
            yield from [(part.matrix, "outputs") for part in ffn.parts.values()]
            yield from [(ffn.parts["up"].matrix, "inputs"), (ffn.down, "inputs")]

    with activations_of(module, activations):
        look = choose if settings.method == "sparsellm" else None
        reading = read_layer(passes, layer, matrices, look, with_gram=settings.method != "wanda")
    rows: dict[Matrix, dict[str, Any]] = {}
    for ffn in ffns:
        if ffn.down in reading.sums:
            rows |= _prune_ffn(ffn, reading, settings)
    for matrix in matrices:
        if matrix not in rows:
            rows[matrix] = _prune_matrix(matrix, reading.sums.get(matrix), settings)
    return [rows[matrix] for matrix in matrices]


def prune_alone(matrix: Matrix, pattern: Pattern, note: str | None = None) -> dict[str, Any]:
    """Prune a matrix in place by magnitude; returns its row."""
    before = matrix.weight.clone()
    after = zeroed_lowest(before, before.abs(), pattern)
    return _written(matrix, "magnitude", before, after, None, note=note)


def _prune_matrix(matrix: Matrix, sums: InputSums | None, settings: Settings) -> dict[str, Any]:
    """Prune a matrix in place by itself; returns its row."""
    pattern, method, damping = settings.patterns[matrix], settings.method, None
    if sums is None or not bool(sums.squares.any()):
        if sums is not None and matrix.expert is None:
            raise PrunekitError(
                f"the inputs of {matrix.name} are zero for every token of the calibration set; give another set, "
                "or check whether the weights before it are all zero"
            )
        return prune_alone(matrix, pattern, UNREACHED)
    before = matrix.weight.to(sums.squares.dtype)
    if method == "wanda":
        after = zeroed_lowest_of_rows(before, before.abs() * sums.squares.sqrt(), pattern)
    else:  # of SparseLLM, what lies in no FFN
        factor, method = _factor(matrix, sums, settings), "sparsegpt"
        after, damping = solve(before, factor, pattern), factor.damping
    return _written(matrix, method, before, after, sums.gram, damping=damping)


def _factor(matrix: Matrix, sums: InputSums, settings: Settings) -> Factor:
    """The factor of H = (2/n)·Σxxᵀ, n the number of sequences; computed once for all matrices with these inputs."""
    if sums.factor is None:
        assert sums.gram is not None  # solvers that use a Hessian have requested it
        try:
            sums.factor = factorize(sums.gram * (2 / settings.n_sequences), settings.damping)
        except PrunekitError as error:
            raise PrunekitError(f"{matrix.name}: {error}") from None
    return sums.factor


def _prune_ffn(found: FoundFFN, reading: Reading, settings: Settings) -> dict[Matrix, dict[str, Any]]:
    """Prune an FFN in place by SparseLLM; returns a row per matrix."""
    patterns = {name: settings.patterns[part.matrix] for name, part in found.parts.items()}
    ffn = _tensors(found, reading)
    befores = {matrix: matrix.weight.to(ffn.x.dtype).clone() for matrix in found.matrices}
    done = prune_ffn(ffn, settings.n_sequences, patterns, settings.alternation, damping=settings.damping)
    afters, rows = {matrix: before.clone() for matrix, before in befores.items()}, {}
    for name, part in found.parts.items():
        afters[part.matrix][part.rows] = done.weights[name]
    for matrix, before in befores.items():
        gram = reading.sums[matrix].gram if matrix in reading.sums else None
        rows[matrix] = _written(matrix, "sparsellm", before, afters[matrix], gram, damping=done.damping)
    rows[found.down] |= {"ffn_error": list(done.errors), "kept": done.kept}
    return rows


def _tensors(found: FoundFFN, reading: Reading) -> FFN:
    """The weights and activations of an FFN."""
    parts, x = found.parts, reading.whole(found.parts["up"].matrix, "inputs")
    with_bias = {name: part for name, part in parts.items() if part.matrix in reading.biases}
    outputs = {name: reading.whole(part.matrix, "outputs")[:, part.rows] for name, part in parts.items()}
    return FFN(
        weights={name: part.weight.to(x.dtype) for name, part in parts.items()},
        biases={name: reading.biases[part.matrix][part.rows].to(x.dtype) for name, part in with_bias.items()},
        activation=found.activation, x=x, y=outputs["down"], z=outputs["up"], s=outputs.get("gate"),
        p=reading.whole(found.down, "inputs"),
    )  # fmt: skip


def _with_other_experts(ffns: list[FoundFFN], matrices: list[Matrix]) -> list[FoundFFN]:
    """FFNs with those of unreached experts added, in the form of the other experts."""
    known = {(m.parameter, m.expert): m for m in matrices}
    found = {ffn.down: ffn for ffn in ffns}
    for ffn in ffns:
        for down in matrices if ffn.down.expert is not None else []:
            if down.parameter == ffn.down.parameter and down not in found:
                parts = {
                    name: replace(part, matrix=known[part.matrix.parameter, down.expert])
                    for name, part in ffn.parts.items()
                }
                found[down] = replace(ffn, parts=parts)
    return list(found.values())


def _written(
    matrix: Matrix, method: str, before: Tensor, after: Tensor, gram: Tensor | None, *, damping: float | None = None,
    note: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write a pruned weight into the model; returns its row of the report."""
    row = {
        "matrix": matrix.name, "method": method, "n_weights": after.numel(), "n_zeros": int((after == 0).sum()),
        "error": None if gram is None else _relative_error(before, after, gram), "ffn_error": None, "kept": None,
        "damping": damping, "note": note,
    }  # fmt: skip
    matrix.weight.copy_(after.to(matrix.tensor.dtype))  # of which `before` may be a view
    return row


def _relative_error(before: Tensor, after: Tensor, gram: Tensor) -> float:
    """‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖²."""
    change = before - after
    lost, size = ((change @ gram) * change).sum(), ((before @ gram) * before).sum()
    return float(lost / size.clamp_min(torch.finfo(size.dtype).tiny))
