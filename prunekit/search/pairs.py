"""Samples of a search: candidates, the metrics, and what was measured."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from prunekit.checks import check_fields
from prunekit.digests import digest_of_text
from prunekit.documents import Document, TextSource
from prunekit.errors import PrunekitError
from prunekit.escaping import html_paragraph
from prunekit.evaluation.language_modelling import perplexity
from prunekit.evaluation.multiple_choice import zero_shot
from prunekit.evaluation.report import unbeaten, world_default
from prunekit.evaluation.standard_tasks import Tasks, named_tasks
from prunekit.evaluation.windows import whole_text
from prunekit.questions import Task
from prunekit.search.hyperparameters import Range
from prunekit.search.space import Point, Space

Measure = Callable[[nn.Module, Any], float]  # (model, tokenizer) → figure


@dataclass(frozen=True)
class Metric:
    """A function that measures a model, and how its values are compared.

    Attributes:
        name: column name in tables.
        measure: (model, tokenizer) → the value. It is sent to workers, so it must be picklable.
        maximize: whether more is better.
        log: whether the predictor learns its logarithm, as for perplexity.
        of: identifies the evaluation data, so that searches on different data are kept apart.
    """

    name: str
    measure: Measure
    maximize: bool = False
    log: bool = False
    of: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or not callable(self.measure):
            raise PrunekitError(
                f"a metric named {self.name!r} of {self.measure!r:.40} is not allowed; give a name and a function "
                "of a model and its tokenizer"
            )
        check_fields(self)


def metrics_of(
    metric: str | Metric,
    also: str | Metric | Iterable[str | Metric],
    tokenizer: Any,
    text: TextSource | None,
    tasks: Tasks | None,
) -> list[Metric]:
    """The metrics, the optimised one first; arguments and errors are those of `metric_of`."""
    others = [also] if isinstance(also, str | Metric) else list(also)
    for option, given, reader in (("text", text, "perplexity"), ("tasks", tasks, "accuracy")):
        if given is not None and reader not in (metric, *others):
            raise PrunekitError(
                f"{option}= is only used by the metric {reader!r}, which is not requested; leave {option}= out, or "
                f"request {reader!r}"
            )
    return [metric_of(each, tokenizer, text, tasks) for each in (metric, *others)]


def metric_of(metric: str | Metric, tokenizer: Any, text: TextSource | None, tasks: Tasks | None) -> Metric:
    """The metric for a name: `"perplexity"` of a text or mean `"accuracy"` over tasks; a `Metric` is returned as it is.

    Args:
        metric: one of the two names, or a `Metric`.
        tokenizer: the model's own.
        text: what perplexity is measured on, as `perplexity` takes it; None is the embedded world's validation text.
        tasks: as `zero_shot` takes them; None is the embedded world's.

    Raises:
        PrunekitError: an unknown metric, or no text or tasks for another tokenizer than the world's.
    """
    if isinstance(metric, Metric):
        return metric
    if metric == "perplexity":
        source = world_default(tokenizer, "validation_text", "text") if text is None else text
        whole = whole_text(source, tokenizer)  # read here: a worker may not see our files
        return Metric("perplexity", partial(_perplexity, text=whole), log=True, of=_digest(whole))
    if metric == "accuracy":
        asked = named_tasks(world_default(tokenizer, "tasks", "tasks") if tasks is None else tasks)
        return Metric("accuracy", partial(_accuracy, tasks=asked), maximize=True, of=digest_of_text(repr(asked))[:16])
    raise PrunekitError(
        f"metric={metric!r:.60} is unknown; give 'perplexity', 'accuracy', or Metric(name, (model, tokenizer) → figure)"
    )


def _digest(document: Document) -> str:
    return digest_of_text(document if isinstance(document, str) else repr(document.tolist()))[:16]


def _perplexity(model: nn.Module, tokenizer: Any, *, text: Document) -> float:
    return perplexity(model, tokenizer, [text])


def _accuracy(model: nn.Module, tokenizer: Any, *, tasks: list[Task]) -> float:
    return zero_shot(model, tokenizer, tasks).mean


@dataclass(frozen=True, eq=False)
class Pairs:
    """Candidates and what was measured of them.

    Attributes:
        space: the space of the candidates.
        table: one row per candidate: number, round, the hyperparameters, costs, metrics, seconds.
        metric: name of the optimised column.
        maximize: whether higher is better.
        log: whether the predictor learns its logarithm.
        failed: number of a trial → why it could not be measured.
    """

    space: Space
    table: pd.DataFrame
    metric: str
    maximize: bool = False
    log: bool = False
    failed: Mapping[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def points(self) -> list[Point]:
        """The candidates, one dictionary per row."""
        return [self._point(row) for _, row in self.table.iterrows()]

    @property
    def values(self) -> np.ndarray:
        """Values for the predictor, float (n,): lower is better, logarithms if the metric asks for them.

        Infinite values become the largest or smallest finite one.
        """
        found = self._figures()
        finite = found[np.isfinite(found)]
        return np.clip(found, finite.min(), finite.max()) if len(finite) else np.zeros(len(found))

    def _figures(self) -> np.ndarray:
        """The same values, infinite ones included."""
        found = self.table[self.metric].to_numpy(float)
        with np.errstate(divide="ignore"):
            found = np.log(found) if self.log else found
        return -found if self.maximize else found

    def best(self, **at_most: float) -> Point:
        """The best candidate within upper limits on columns, such as `best(parameters=2e6)`.

        Raises:
            PrunekitError: a cost that was not noted, or none so cheap.
        """
        return self._point(self.best_row(**at_most))

    def best_row(self, **at_most: float) -> pd.Series:
        """The table row of the best candidate within upper limits.

        Raises:
            PrunekitError: a cost that was not noted, or none so cheap.
        """
        fits = pd.Series(data=True, index=self.table.index)
        for name, limit in at_most.items():
            fits &= self._noted(name) <= limit
        if not fits.any():
            least = {name: float(self.table[name].min()) for name in at_most if len(self.table)}
            raise PrunekitError(
                f"no sample of {len(self)} is within {at_most}; the lowest values are {least or 'unknown'}"
            )
        return self.table.loc[pd.Series(self._figures(), self.table.index)[fits].idxmin()]

    def front(self, cost: str = "parameters") -> pd.DataFrame:
        """The Pareto front of a cost and the metric: rows that no other row beats in both, cheapest first.

        Raises:
            PrunekitError: a cost that was not noted.
        """
        self._noted(cost)
        return unbeaten(self.table.assign(_value=self._figures()), cost, "_value").drop(columns="_value")

    def _noted(self, name: str) -> pd.Series:
        if name not in self.table:
            raise PrunekitError(f"{name!r} was not noted; choose from {', '.join(map(str, self.table.columns))}")
        return self.table[name]

    def _point(self, row: pd.Series) -> Point:
        """The candidate in a row, where 1.0 may stand for 1, and a used budget may be below its range."""
        return {
            name: knob.nearest(row[name]) if isinstance(knob, Range) else knob.plain(row[name])
            for name, knob in self.space.knobs.items()
        }

    def __repr__(self) -> str:
        if not len(self):
            return f"Pairs(none measured; {len(self.failed)} failed)"
        failed = f"; {len(self.failed)} could not be measured" if self.failed else ""
        best = self.table[self.metric].max() if self.maximize else self.table[self.metric].min()
        return f"Pairs({len(self)} candidates; best {self.metric} {best:.4g}{failed})"

    def _repr_html_(self) -> str:
        order = self.table.sort_values(self.metric, ascending=not self.maximize) if len(self) else self.table
        return f"{html_paragraph(self)}{order.head(10).to_html(index=False, float_format='{:.3g}'.format)}"
