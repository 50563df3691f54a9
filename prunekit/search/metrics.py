"""The metrics of a search: perplexity, accuracy, or your own function."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from prunekit.checks import check_fields
from prunekit.documents import TextSource
from prunekit.errors import PrunekitError
from prunekit.evaluation.language_modelling import perplexity
from prunekit.evaluation.multiple_choice import zero_shot
from prunekit.evaluation.named_tasks import Tasks, named_tasks
from prunekit.evaluation.report import world_default
from prunekit.evaluation.windows import read_texts
from prunekit.fingerprint import digest_of_text
from prunekit.questions import Task

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
    others = [also] if isinstance(also, str | Metric) else also
    return [metric_of(each, tokenizer, text, tasks) for each in (metric, *others)]


def metric_of(
    metric: str | Metric,
    tokenizer: Any,
    text: TextSource | None,
    tasks: Tasks | None,
) -> Metric:
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
        (whole,) = read_texts(source, "windows", None, tokenizer)  # read here: a worker may not see our files
        return Metric("perplexity", partial(_perplexity, text=whole), log=True, of=digest_of_text(whole)[:16])
    if metric == "accuracy":
        asked = named_tasks(world_default(tokenizer, "tasks", "tasks") if tasks is None else tasks)
        return Metric("accuracy", partial(_accuracy, tasks=asked), maximize=True, of=digest_of_text(repr(asked))[:16])
    raise PrunekitError(
        f"metric={metric!r:.60} is unknown; give 'perplexity', 'accuracy', or Metric(name, (model, tokenizer) → figure)"
    )


def _perplexity(model: nn.Module, tokenizer: Any, *, text: str) -> float:
    return perplexity(model, tokenizer, [text])


def _accuracy(model: nn.Module, tokenizer: Any, *, tasks: list[Task]) -> float:
    return zero_shot(model, tokenizer, tasks).mean
