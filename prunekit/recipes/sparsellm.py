"""SparseLLM (Bai et al., NeurIPS 2024, arXiv 2402.17946): sparsity with a joint objective for each FFN."""

from typing import Any, NamedTuple

from torch import Tensor

from prunekit.checks import Count, Model, Tokenizer, checked
from prunekit.discovery.parts import outermost_elements
from prunekit.documents import TextSource
from prunekit.recovery import FullTuning, LoRA, recover
from prunekit.sparsity import SparseLLM, SparsityReport, sparsify


class Sparsified(NamedTuple):
    """The result of the recipe.

    Attributes:
        model: with zeros, recovered where there were data to recover with; its shapes are those it had.
        report: what was done to each matrix, and how the error of each FFN fell; from before recovery.
    """

    model: Any
    report: SparsityReport


@checked
def sparsellm(
    model: Model,
    calib: Tensor,
    sparsity: float | str | None = None,
    *,
    pattern: tuple[int, int] | None = None,
    n_iterations: Count = 4,
    faithful: bool = False,
    half_depth: bool = False,
    allocation: str = "uniform",
    data: Tensor | TextSource | None = None,
    tokenizer: Tokenizer | None = None,
    recovery: LoRA | FullTuning | None = None,
) -> Sparsified:
    """Sparsifies layer by layer: attention by SparseGPT, FFNs by SparseLLM's alternation.

    Args:
        model: the dense model; unchanged.
        calib: integers (n_samples, seq_len). The paper has 128 samples of 2048 tokens of C4, the released code 64 or
            32 samples.
        sparsity: fraction of zeros in each matrix, or `"2:4"`.
        pattern: (kept, of) in place of it.
        n_iterations: T of the alternation.
        faithful: as the released code computes; see `SparseLLM`.
        half_depth: only the first half of the layers, as behind the paper's tables; figures of such models do not
            compare with those of whole depth.
        allocation: `"uniform"`, or `"global"`, one budget over all matrices, which the paper has not.
        data: to recover with, zeros staying zero, as for `recover`; None, as in the paper, leaves the model untuned.
        tokenizer: needed where `data` is text.
        recovery: how; None is `LoRA()`.

    Returns:
        The sparse model and the report.

    Raises:
        PrunekitError: what `sparsify` and `recover` raise.

    Source: the paper's Alg. 1. Differs: where and why, see `SparseLLM`; `faithful=True` computes what the code does.
    """
    layers = range((len(outermost_elements(model)) + 1) // 2) if half_depth else None
    method = SparseLLM(n_iterations=n_iterations, faithful=faithful)
    sparse = sparsify(
        model,  # type: ignore[arg-type]
        calib, method, sparsity, pattern=pattern, allocation=allocation, layers=layers,
    )  # fmt: skip
    report: SparsityReport = sparse.sparsity_report  # type: ignore[assignment]
    if data is not None:
        sparse = recover(sparse, recovery or LoRA(), data, tokenizer=tokenizer, keep_zeros=True, inplace=True)
    return Sparsified(sparse, report)
