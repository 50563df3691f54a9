"""The evaluation set of a knowledge distribution: questions and text windows, as spans and as a table."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from prunekit.calibration import check_tokens
from prunekit.documents import TextSource
from prunekit.errors import PrunekitError
from prunekit.evaluation.likelihood import Span, check_batches
from prunekit.evaluation.multiple_choice import choice_lengths, question_spans
from prunekit.evaluation.named_tasks import Tasks, named_tasks
from prunekit.evaluation.windows import read_spans
from prunekit.models import max_positions
from prunekit.questions import Question, Task

Texts = Tensor | TextSource | Mapping[str, Tensor | TextSource]
TEXT = "text"  # domain of an unnamed text


@dataclass(frozen=True, eq=False)
class Exam:
    """The evaluation set: questions first, then text windows.

    Attributes:
        table: one row per question or window: task, domain, tier, hops, context, right (the text of the right choice,
            or the window's), n_tokens (scored tokens of that), chance (NaN for a window).
        spans: one per choice and one per window, in the order of the table.
        places: (n_questions, largest n_choices): the span number of each choice, -1 where there are fewer.
        lengths: float64, like `places`: divisor of each choice's log-likelihood before the largest is taken.
        answers: int64 (n_questions,), the correct choices.
    """

    table: pd.DataFrame
    spans: list[Span]
    places: Tensor
    lengths: Tensor
    answers: Tensor

    def marks(self, sums: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Correctness and loss of each question and window.

        Args:
            sums: float64 (n_spans,), in nats.

        Returns:
            bool (n_questions + n_windows,), True for a correct answer, False for windows; and float64, for a question
            the cross-entropy in nats of the right choice among all, for a window the nats per token. A loss that is not
            finite becomes infinite, and the answer counts as wrong.
        """
        chosen = sums[self.places].masked_fill(self.places < 0, -torch.inf)  # (n_questions, n_choices)
        sound = (chosen.isfinite() | (self.places < 0)).all(1)
        hit = sound & ((chosen / self.lengths).argmax(1) == self.answers)
        among = -chosen.log_softmax(1).gather(1, self.answers[:, None])[:, 0]
        windows = self.table["chance"].isna().to_numpy()
        n_windows = int(windows.sum())
        tokens = torch.from_numpy(self.table["n_tokens"].to_numpy()[windows])
        read = -sums[len(sums) - n_windows :] / tokens
        loss = torch.cat([among.masked_fill(~sound, torch.inf), read]).nan_to_num(nan=torch.inf, posinf=torch.inf)
        return np.concatenate([hit.numpy(), np.zeros(n_windows, dtype=bool)]), loss.numpy()


def make_exam(
    model: nn.Module,
    tokenizer: Any,
    tasks: Tasks | None,
    text: Texts | None,
    *,
    limit: int | None = None,
    data_dir: str | Path | None = None,
) -> Exam:
    """Build the evaluation set from tasks and texts; `limit` and `data_dir` as in `zero_shot`.

    Raises:
        PrunekitError: neither is given and the tokenizer is not the embedded world's; a domain is in both; or an
            error of `zero_shot` or `measure_perplexity`.
    """
    if tokenizer is None:
        raise PrunekitError("tokenizer=None; give the model's own tokenizer")
    asked = _asked(tokenizer, tasks, text, limit, data_dir)
    most = max_positions(model)
    choices = [
        question_spans(tokenizer, question, most, f"question {number} of task {task.name!r}")
        for task, number, question in asked
    ]
    rows = [_row(task, question, spans) for (task, _, question), spans in zip(asked, choices, strict=True)]
    read = [(name, span) for name, source in _named_texts(text).items() for span in _windows(model, tokenizer, source)]
    _check_apart({row["domain"] for row in rows} | {row["task"] for row in rows}, {name for name, _ in read})
    rows += [_window_row(tokenizer, name, span) for name, span in read]
    spans = [span for several in choices for span in several] + [span for _, span in read]
    check_batches(model, spans, batch_size=1)
    return Exam(pd.DataFrame(rows), spans, *_layout([(task, question) for task, _, question in asked]))


def _asked(
    tokenizer: Any, tasks: Tasks | None, text: Texts | None, limit: int | None, data_dir: str | Path | None
) -> list[tuple[Task, int, Question]]:
    if tasks is None and not text:
        from prunekit import world

        if text is not None or not world.is_world_tokenizer(tokenizer):
            raise PrunekitError(
                "no tasks or text given: give tasks= (as for zero_shot), text= (as for perplexity), or both; only the "
                "embedded world has default tasks"
            )
        tasks = world.tasks()
    if tasks is None and (limit is not None or data_dir is not None):
        option = "data_dir" if limit is None else "limit"
        raise PrunekitError(f"{option}= is of tasks, and only text is given; give tasks= too, or leave it out")
    found = [] if tasks is None else named_tasks(tasks, limit=limit, data_dir=data_dir)
    single = [task.name for task in found if any(len(question.choices) < 2 for question in task.questions)]
    if single:
        raise PrunekitError(
            f"{single[0]!r} has questions with a single choice, so they have no loss relative to other choices; leave "
            "it out"
        )
    return [(task, number, question) for task in found for number, question in enumerate(task.questions)]


def _row(task: Task, question: Question, spans: list[Span]) -> dict[str, Any]:
    contexts = question.contexts or (question.context,) * len(question.choices)
    return {
        "task": task.name,
        "domain": question.domain,
        "tier": question.tier,
        "hops": question.hops,
        "context": contexts[question.answer],
        "right": question.choices[question.answer],
        "n_tokens": spans[question.answer].n_scored,
        "chance": question.chance,
    }


def _window_row(tokenizer: Any, name: str, span: Span) -> dict[str, Any]:
    told = tokenizer.decode(span.tokens[span.start :])
    return {"task": name, "domain": name, "tier": None, "hops": None, "context": "", "right": told,
            "n_tokens": span.n_scored, "chance": float("nan")}  # fmt: skip


def _layout(asked: list[tuple[Task, Question]]) -> Iterator[Tensor]:
    """Places, lengths and answers of the questions."""
    most = max((len(question.choices) for _, question in asked), default=1)
    places = torch.full((len(asked), most), -1)
    lengths = torch.ones(len(asked), most, dtype=torch.float64)
    first = 0
    for number, (task, question) in enumerate(asked):
        n = len(question.choices)
        places[number, :n] = torch.arange(first, first + n)
        if task.normalize:
            lengths[number, :n] = choice_lengths(question)
        first += n
    yield from (places, lengths, torch.tensor([question.answer for _, question in asked], dtype=torch.long))


def _named_texts(text: Texts | None) -> Mapping[str, Tensor | TextSource]:
    if text is None:
        return {}
    return text if isinstance(text, Mapping) else {TEXT: text}


def _windows(model: nn.Module, tokenizer: Any, source: Tensor | TextSource) -> list[Span]:
    """Text windows as `perplexity` cuts them; rows of tokens are used as they are."""
    if isinstance(source, Tensor):
        return [Span(tuple(row), 1) for row in check_tokens(source, model).tolist()]
    return read_spans(model, tokenizer, source).spans


def _check_apart(asked: set[str], read: set[str]) -> None:
    both = sorted(asked & read)
    if both:
        raise PrunekitError(
            f"{both[0]!r} names both questions and a text, which are measured in different units; give the text "
            f"another name: text={{'{both[0]} text': …}}"
        )
