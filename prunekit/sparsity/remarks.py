"""Remarks and warnings about a sparsification."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from prunekit.sparsity.patterns import Pattern

Rows = Sequence[dict[str, Any]]  # as in `SparsityReport.rows`


def remarks_on(
    method: str, rows: Rows, tokens: Tensor | None, wanted: Pattern, widest: int, damping: float
) -> tuple[str, ...]:
    """Remarks for the report, also issued as warnings.

    Args:
        method: the method.
        rows: one per matrix.
        tokens: the calibration set.
        wanted: the target.
        widest: number of inputs of the widest matrix.
        damping: the given damping.
    """
    return (
        *_on_target(rows, wanted),
        *_on_statistics(rows, tokens, widest, damping),
        *(_on_ffns(rows) if method == "sparsellm" else ()),
    )


def _on_statistics(rows: Rows, tokens: Tensor | None, widest: int, damping: float) -> Iterator[str]:
    dampings = {row["damping"] for row in rows if row["damping"] is not None}
    if tokens is not None and dampings and tokens.numel() < widest:
        yield (
            f"the calibration set has {tokens.numel()} tokens and a matrix {widest} inputs: its Hessian is held "
            "together by damping alone; give more text"
        )
    if dampings - {damping}:
        yield f"damping was raised from {damping:g} to {max(dampings):g} where a Hessian had no Cholesky factor"
    unreached = [row["matrix"] for row in rows if row["note"]]
    if unreached:
        yield f"no token reached {len(unreached)} matrices, which were pruned by magnitude: {unreached[0]}, …"


def _on_target(rows: Rows, wanted: Pattern) -> Iterator[str]:
    if not any(row["n_zeros"] for row in rows):
        yield f"{wanted} sets no weight of these matrices to zero"
        return
    reached = sum(row["n_zeros"] for row in rows) / sum(row["n_weights"] for row in rows)
    if reached < wanted.sparsity - 0.005:
        yield (f"{reached:.2%} are zero instead of {wanted}: Wanda takes whole weights of each row, rounded down")


def _on_ffns(rows: Rows) -> Iterator[str]:
    ffns = [row for row in rows if row["ffn_error"]]
    alone = sorted({row["layer"] for row in rows} - {row["layer"] for row in ffns})
    if alone:
        yield (
            f"the FFNs of {len(alone)} layers ({alone[0]}, …) have no form that SparseLLM supports: their matrices "
            "were "
            "pruned one by one, by SparseGPT"
        )
    first = sum(row["kept"] == 0 and len(row["ffn_error"]) > 1 for row in ffns)
    if first:
        yield (
            f"in {first} of {len(ffns)} FFNs no iteration had less error than the first, which is SparseGPT's; its "
            "weights were kept"
        )
