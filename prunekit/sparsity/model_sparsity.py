"""`sparsify`: sets weights of a model to zero, block by block."""

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from prunekit.account import check_measure, closed, opened, set_aside
from prunekit.calibration import check_tokens, in_batches
from prunekit.checks import Network, Positive, check_choice, checked
from prunekit.compat import EXPERTS_IMPLEMENTATION as EXPERTS
from prunekit.discovery.parts import outermost_elements
from prunekit.errors import PrunekitError, warn
from prunekit.layerwise import Passes
from prunekit.models import evaluating, written_out
from prunekit.sparsity.layers import Settings, prune_alone, prune_layer
from prunekit.sparsity.matrices import Matrix, find_matrices
from prunekit.sparsity.matrix_inputs import DAMPING
from prunekit.sparsity.patterns import Pattern, allocate, check_sparsifiable, pattern_of
from prunekit.sparsity.solvers import SparseLLM
from prunekit.sparsity.sparsity_report import SparsityReport, remarks_on

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHODS = ("magnitude", "wanda", "sparsegpt", "sparsellm")
ALLOCATIONS = ("uniform", "global")


@checked
def sparsify(
    model: Network,
    calib: Tensor | None,
    method: str | SparseLLM = "sparsellm",
    sparsity: float | str | None = None,
    *,
    pattern: tuple[int, int] | None = None,
    allocation: str = "uniform",
    layers: Iterable[int] | None = None,
    damping: Positive = DAMPING,
    inplace: bool = False,
    held_out: Tensor | None = None,
    measure: bool = True,
) -> "PreTrainedModel":
    """Sets weights of a model's layers to zero; shapes stay the same.

    Blocks are pruned one after the other: input statistics are collected while a block is dense, its matrices are
    pruned, and the calibration set passes through it. Memory holds the residual stream of the set, the statistics of
    one block, and with SparseLLM its auxiliary variables.

    Args:
        model: a causal LM of any family, experts included. Embeddings, lm_head, norms and routers stay dense.
        calib: integers (n_samples, seq_len); None is allowed for `"magnitude"`.
        method: `"magnitude"`, `"wanda"`, `"sparsegpt"`, `"sparsellm"`; in Python also `SparseLLM(...)` with options.
        sparsity: fraction of zeros, in [0, 1), or `"2:4"`.
        pattern: (kept, of) in place of it: `kept` weights stay of every `of` along a row.
        allocation: `"uniform"`, each matrix alike; or `"global"`, one budget over all matrices, shared by
            sensitivity (see `allocate`); not with a pattern.
        layers: numbers of the layers to prune; None is all.
        damping: damping of Hessians, as a share of their mean diagonal.
        inplace: change `model` itself, which needs no second copy; after an interrupt, the finished layers stay pruned.
        held_out: integers (n, seq_len) on which the loss is measured before and after, about 1,024 of these tokens;
            `calibration_set(..., held_out=True)` draws some. None takes the first windows of `calib`, where there is
            one.
        measure: whether to measure the loss; without it there is no warning of damage.

    Returns:
        The sparse model, in evaluation mode; its `sparsity_report` lists each matrix, also those of earlier calls,
            and its `loss_change` is a `LossChange`. A `DamageWarning` is issued if the loss rises by much.

    Raises:
        PrunekitError: an invalid method, sparsity, pattern or layer, a pattern that does not divide a matrix's
            rows, bad tokens, activations that are not finite or all zero, or a model that is quantised, carries
            adapters or has weights that are not finite. `model` is unchanged then, unless `inplace`.

    Source: SparseGPT's and Wanda's block-by-block order; SparseLLM (arXiv 2402.17946) for FFNs, attention being pruned
        locally by SparseGPT.
    """
    wanted = pattern_of(sparsity, pattern)
    alternation = method if isinstance(method, SparseLLM) else SparseLLM()
    name = "sparsellm" if isinstance(method, SparseLLM) else method
    check_choice("method", name, METHODS)
    check_choice("allocation", allocation, ALLOCATIONS)
    if allocation == "global" and wanted.of is not None:
        raise PrunekitError(f"allocation='global' cannot move zeros between matrices where {wanted}; use 'uniform'")
    check_measure(measure, held_out)
    check_sparsifiable(model)
    tokens = _tokens(model, calib, name, allocation)
    opening = opened("sparsify", model, held_out, {"sparsify": tokens}) if measure else None
    target: Any = model if inplace else copy.deepcopy(model)
    with torch.inference_mode(False), evaluating(target), written_out(target, [EXPERTS]), torch.no_grad():
        paths = outermost_elements(target)
        device = target.get_input_embeddings().weight.device
        first = torch.zeros(1, 2, dtype=torch.long, device=device) if tokens is None else tokens[:1]
        found = find_matrices(target, paths, first)
        matrices = _chosen(found.matrices, paths, layers, wanted)
        earlier = vars(target).pop("sparsity_report", None)  # an earlier report is no longer valid
        set_aside(target)
        batches = in_batches(tokens) if tokens is not None else ()
        shared = dict.fromkeys(matrices, wanted)
        patterns = allocate(target, batches, matrices, wanted) if allocation == "global" else shared
        n_sequences = 1 if tokens is None else len(tokens)
        settings = Settings(name, alternation, patterns, damping, n_sequences)
        rows = _run(target, paths, batches, matrices, settings)
    remarks = remarks_on(name, rows, tokens, wanted, max(matrix.weight.shape[1] for matrix in matrices), damping)
    for remark in remarks:
        warn(remark)
    change = None if opening is None else closed(opening, target)
    report = SparsityReport(name, str(wanted), tuple(rows), found.left, remarks, change)
    target.sparsity_report = report if earlier is None else report.after(earlier)
    return target.eval()


def _tokens(model: nn.Module, calib: Tensor | None, method: str, allocation: str) -> Tensor | None:
    if calib is not None:
        return check_tokens(calib, model)
    if method != "magnitude" or allocation == "global":
        what = f"method={method!r}" if method != "magnitude" else "allocation='global'"
        raise PrunekitError(f"{what} needs a calibration set: give calib=calibration_set(...), integers (n, seq_len)")
    return None


def _chosen(
    matrices: Sequence[Matrix], paths: list[str], layers: Iterable[int] | None, wanted: Pattern
) -> list[Matrix]:
    """The matrices of some layers, in the order of these."""
    numbers = list(range(len(paths))) if layers is None else _numbers(layers, len(paths))
    inside = {paths[number]: number for number in numbers}
    chosen = [matrix for matrix in matrices if matrix.layer in inside]
    if not chosen:
        raise PrunekitError(
            "no layer has a matrix that multiplies activations in a supported way; give another model or other layers"
        )
    for matrix in chosen:
        wanted.check_width(matrix.weight.shape[1], matrix.name)
    return sorted(chosen, key=lambda matrix: inside[matrix.layer])


def _numbers(layers: Any, n_layers: int) -> list[int]:
    numbers = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]
    wrong = [number for number in numbers if type(number) is not int or not 0 <= number < n_layers]
    if wrong or not numbers:
        raise PrunekitError(f"layers={layers!r}: give numbers from 0 to {n_layers - 1}, such as range({n_layers})")
    return sorted(set(numbers))


def _run(
    model: nn.Module, paths: list[str], batches: Sequence[Tensor], matrices: list[Matrix], settings: Settings
) -> list[dict[str, Any]]:
    """Prune layer by layer; matrices by themselves if no input statistics are needed."""
    passes = Passes(model, batches)
    rows: list[dict[str, Any]] = []
    for path in tqdm(
        dict.fromkeys(m.layer for m in matrices), desc=settings.method, unit="layer", leave=False, delay=1
    ):
        inside = [matrix for matrix in matrices if matrix.layer == path]
        if settings.method != "magnitude":
            done = prune_layer(model.get_submodule(path), passes, path, inside, settings)
        else:
            done = [prune_alone(matrix, settings.patterns[matrix]) for matrix in inside]
        rows += [{"layer": paths.index(path), **row} for row in done]
    return rows
