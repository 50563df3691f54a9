"""Results of zero-shot multiple choice."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from prunekit.checks import Part, Whole, check_value
from prunekit.errors import PrunekitError
from prunekit.escaping import html_paragraph

GROUPS = ("task", "form", "domain", "tier", "hops")
_COLUMNS: dict[str, Any] = {
    "task": str, "question": Whole, "gold": Whole, "prediction": int, "correct": bool, "correct_norm": bool,
    "hit": bool, "margin": float | None, "chance": Part, "log_likelihoods": list[float],
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class ZeroShotResult:
    """Zero-shot results: one row per question, and accuracies.

    Attributes:
        questions: columns task, form, question (its number in the task), domain, tier, hops, gold and prediction
            (numbers of choices), correct (`acc`), correct_norm (`acc_norm`), hit (the one of the two that
            counts for the task), margin (log-likelihood of the right choice less that of the best wrong one,
            in nats, or nats a character where the task normalises; NaN where there is but one), chance,
            log_likelihoods (a list, one a choice, in nats), n_cut (tokens that were cut off the context on the left,
            since the model does not take so many). The prediction is -1 where a single choice was not the likeliest.
        n_computed: positions that the model was run on, including padding and the test of packing.
        n_tokens: positions of all choices with their contexts, had each been read alone.
    """

    questions: pd.DataFrame
    n_computed: int = 0
    n_tokens: int = 0

    def by(self, column: str) -> pd.DataFrame:
        """Accuracy by task, form, domain, tier or number of hops.

        Args:
            column: one of `"task" "form" "domain" "tier" "hops"`; questions that have no such label are left out.

        Returns:
            Index `column`; columns n (questions), accuracy, stderr (binomial), acc, acc_norm, chance, all in [0, 1].

        Raises:
            PrunekitError: there is no such column.
        """
        if column not in GROUPS:
            raise PrunekitError(f"no accuracy by {column!r}; group by one of {', '.join(map(repr, GROUPS))}")
        table = self.questions.groupby(column, sort=False).agg(
            n=("hit", "size"),
            accuracy=("hit", "mean"),
            acc=("correct", "mean"),
            acc_norm=("correct_norm", "mean"),
            chance=("chance", "mean"),
        )
        spread = (table["accuracy"] * (1 - table["accuracy"]) / table["n"]) ** 0.5
        table.insert(2, "stderr", spread)
        return table

    def accuracy(self) -> pd.Series:
        """Accuracy of each task, in [0, 1], in the tasks' order."""
        return self.by("task")["accuracy"]

    @property
    def mean(self) -> float:
        """Unweighted mean of the tasks' accuracies, as the papers' tables have it."""
        return float(self.accuracy().mean())

    def perplexities(self) -> pd.Series:
        """Perplexity of the word to be written, of each task whose questions have a single choice (LAMBADA).

        exp of the mean negative log-likelihood a word, whatever number of tokens it has, as lm-evaluation-harness has
        it.
        """
        single = self.questions[self.questions["chance"] == 0]
        sums = single["log_likelihoods"].map(lambda values: values[0]).astype(float)
        return np.exp(-sums.groupby(single["task"], sort=False).mean()).rename("perplexity")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: column → list, and the two numbers of positions."""
        plain = self.questions.astype(object).where(self.questions.notna(), None)
        columns = {str(name): plain[name].tolist() for name in plain}
        return columns | {"n_computed": self.n_computed, "n_tokens": self.n_tokens}

    @classmethod
    def from_dict(cls, columns: dict[str, Any]) -> "ZeroShotResult":
        """The result from the form of `to_dict`.

        Raises:
            PrunekitError: a column that is missing, or has values that cannot be.
        """
        columns = dict(columns)
        numbers = {name: columns.pop(name, 0) for name in ("n_computed", "n_tokens")}
        for name, kind in _COLUMNS.items():
            if name not in columns:
                raise PrunekitError(f"zero_shot has no column {name!r}")
            check_value(f"zero_shot[{name!r}]", columns[name], list[kind])  # type: ignore[valid-type]
        for name, value in numbers.items():
            check_value(name, value, Whole)
        return cls(pd.DataFrame(columns), **numbers)

    def __repr__(self) -> str:
        n_tasks = self.questions["task"].nunique()
        run = f"; {self.n_computed:,} tokens run for {self.n_tokens:,}" if self.n_computed else ""
        n_cut = int((self.questions["n_cut"] > 0).sum()) if "n_cut" in self.questions else 0
        cut = f"; {n_cut:,} contexts cut on the left to fit the model" if n_cut else ""
        return f"ZeroShotResult({self.mean:.1%} over {n_tasks} tasks, {len(self.questions):,} questions{run}{cut})"

    def _repr_html_(self) -> str:
        return f"{html_paragraph(self)}{self.by('task').to_html(float_format='{:.3f}'.format)}"
