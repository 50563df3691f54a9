"""The sparsity report: what was pruned in each matrix, with remarks and warnings."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from prunekit.account import LossChange
from prunekit.checks import Count, NotNegative, Whole, check_value
from prunekit.errors import PrunekitError, reason
from prunekit.escaping import html_paragraph
from prunekit.files import read_text, write_text
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
    on_ffns = _on_ffns(rows) if method == "sparsellm" else ()
    return (*_on_target(rows, wanted), *_on_statistics(rows, tokens, widest, damping), *on_ffns)


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
            "were pruned one by one, by SparseGPT"
        )
    first = sum(row["kept"] == 0 and len(row["ffn_error"]) > 1 for row in ffns)
    if first:
        yield (
            f"in {first} of {len(ffns)} FFNs no iteration had less error than the first, which is SparseGPT's; its "
            "weights were kept"
        )


_ROW: dict[str, Any] = {
    "layer": Whole, "matrix": str, "method": str, "n_weights": Count, "n_zeros": Whole,
    "error": NotNegative | None, "ffn_error": list[NotNegative] | None, "kept": Whole | None,
}  # fmt: skip


@dataclass(frozen=True)
class SparsityReport:
    """Report of one call of `sparsify`.

    Attributes:
        method: `"magnitude"`, `"wanda"`, `"sparsegpt"` or `"sparsellm"`.
        target: the target, such as `"70%"` or `"2 of 4 zero"`.
        rows: one a matrix: layer (number), matrix, method (used here), n_weights, n_zeros, error (‖X(W − Ŵ)ᵀ‖² /
            ‖XWᵀ‖² on the calibration set, X of the dense layer behind sparse ones; None where not measured), ffn_error
            (after each iteration of SparseLLM), kept (of which iteration the weights are), damping, note.
        left: parameters of the layers that stay dense → why.
        remarks: remarks on the whole model.
        loss: change of the model's loss; None if not measured.
    """

    method: str
    target: str
    rows: tuple[dict[str, Any], ...]
    left: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    loss: LossChange | None = field(default=None, compare=False)  # on other tokens it is another, for the same zeros

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the weights of these matrices."""
        total = sum(row["n_weights"] for row in self.rows)
        return sum(row["n_zeros"] for row in self.rows) / max(total, 1)

    def after(self, earlier: "SparsityReport") -> "SparsityReport":
        """The report with the other matrices of an earlier report added."""
        mine = {row["matrix"] for row in self.rows}
        others = tuple(row for row in earlier.rows if row["matrix"] not in mine)
        if not others:
            return self
        remark = f"{len(others)} matrices are from an earlier call ({earlier.method}, target {earlier.target})"
        rows = sorted((*others, *self.rows), key=lambda row: row["layer"])
        return replace(self, rows=tuple(rows), remarks=(*self.remarks, *earlier.remarks, remark))

    def table(self) -> pd.DataFrame:
        """One row per matrix, with its sparsity."""
        table = pd.DataFrame(self.rows)
        errors = pd.to_numeric(table["error"])  # without a calibration set there are no errors
        return table.assign(sparsity=table["n_zeros"] / table["n_weights"], error=errors)

    def by_layer(self) -> pd.DataFrame:
        """One row per layer: n_weights, n_zeros, sparsity, and the mean error of its matrices."""
        sums = {name: (name, "sum") for name in ("n_weights", "n_zeros")}
        table = self.table().groupby("layer").agg(**sums, error=("error", "mean"))
        return table.assign(sparsity=table["n_zeros"] / table["n_weights"])

    def ffn_errors(self) -> pd.DataFrame:
        """One row per FFN and iteration of SparseLLM: layer, matrix (the down projection), iteration, error, kept."""
        rows = [
            (row["layer"], row["matrix"], iteration, error, row["kept"] == iteration)
            for row in self.rows
            for iteration, error in enumerate(row["ffn_error"] or ())
        ]
        return pd.DataFrame(rows, columns=["layer", "matrix", "iteration", "error", "kept"])

    def __repr__(self) -> str:
        kinds = pd.Series([row["method"] for row in self.rows]).value_counts()
        done = ", ".join(f"{n} by {name}" for name, n in kinds.items())
        left = f"; {len(self.left)} left dense" if self.left else ""
        loss = f"; {self.loss}" if self.loss is not None else ""
        zeros = f"target {self.target}, {self.sparsity:.2%} zero in {len(self.rows)} matrices"
        return f"SparsityReport({zeros}: {done}{left}{loss})"

    def _repr_html_(self) -> str:
        formats = {"sparsity": "{:.1%}".format, "error": "{:.4f}".format}
        remarks = "".join(f"<li>{escape(remark)}</li>" for remark in self.remarks)
        told = [f"<code>{escape(name)}</code> stays dense: {escape(why)}" for name, why in self.left.items()]
        left = "".join(f"<li>{each}</li>" for each in told)
        table = self.by_layer().to_html(formatters=formats, na_rep="not measured")  # formatters see no NaN
        return f"{html_paragraph(self)}<ul>{remarks}{left}</ul>{table}"

    def to_json(self) -> str:
        """The report as JSON text."""
        told = {each.name: getattr(self, each.name) for each in fields(self)}
        return json.dumps({**told, "loss": None if self.loss is None else self.loss.to_dict()}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "SparsityReport":
        """The report from the text that `to_json` wrote.

        Raises:
            PrunekitError: the text is not a report.
        """
        try:
            told = json.loads(text)
            told["loss"] = None if told.get("loss") is None else LossChange.from_dict(told["loss"])
            for each in fields(cls):
                check_value(each.name, told[each.name], each.type)
            for number, row in enumerate(told["rows"]):
                for name, kind in _ROW.items():
                    check_value(f"rows[{number}][{name!r}]", row[name], kind)
                if row["n_zeros"] > row["n_weights"]:
                    raise PrunekitError(f"rows[{number}] has more zeros than weights")
            told |= {"rows": tuple(told["rows"]), "remarks": tuple(told["remarks"])}
            return cls(**{each.name: told[each.name] for each in fields(cls)})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PrunekitError(
                f"this is not a sparsity report ({reason(error)}); give what SparsityReport.to_json wrote"
            ) from None

    def save(self, path: str | Path) -> Path:
        """Write it as a JSON file; the file is complete or not written."""
        write_text(Path(path), self.to_json())
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> "SparsityReport":
        """Read a report that `save` wrote.

        Raises:
            PrunekitError: the file is missing, or contains no report.
        """
        return cls.from_json(read_text(path, "SparsityReport.save"))
