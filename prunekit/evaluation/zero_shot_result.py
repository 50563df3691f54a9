"""The answers to multiple-choice questions, as a value that can be grouped, printed and saved."""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from prunekit.errors import PrunekitError

GROUPS = ("task", "form", "domain", "tier", "hops")


@dataclass(frozen=True, eq=False)
class ZeroShotResult:
    """One row a question, and the accuracies that follow from them.

    Attributes:
        questions: columns task, form, question (its number in the task), domain, tier, hops, gold and prediction
            (numbers of choices), correct (`acc`), correct_norm (`acc_norm`), hit (the one of the two that
            counts for the task), margin (log-likelihood of the right choice less that of the best wrong one,
            in nats, or nats a character where the task normalises), chance.
    """

    questions: pd.DataFrame

    def by(self, column: str) -> pd.DataFrame:
        """Accuracy a task, form, domain, tier or number of hops.

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

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: column → list."""
        plain = self.questions.astype(object).where(self.questions.notna(), None)
        return {str(name): plain[name].tolist() for name in plain}

    @classmethod
    def from_dict(cls, columns: dict[str, Any]) -> "ZeroShotResult":
        """The result that `to_dict` wrote down."""
        return cls(pd.DataFrame(columns))

    def __repr__(self) -> str:
        n_tasks = self.questions["task"].nunique()
        return f"ZeroShotResult({self.mean:.1%} over {n_tasks} tasks, {len(self.questions):,} questions)"

    def _repr_html_(self) -> str:
        return f"<p>{self!r}</p>{self.by('task').to_html(float_format='{:.3f}'.format)}"
