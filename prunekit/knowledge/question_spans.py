"""The evaluation set of a knowledge distribution as spans of tokens, and their likelihoods with prefixes reused."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from prunekit.calibration import check_tokens
from prunekit.digests import bytes_of
from prunekit.discovery.groups import CoupledGroup
from prunekit.discovery.parts import layer_of
from prunekit.documents import TextSource
from prunekit.errors import PrunekitError
from prunekit.evaluation.likelihood import Batch, Span, check_tokens_fit
from prunekit.evaluation.multiple_choice import Asked, choice_lengths, task_spans
from prunekit.evaluation.sequence_scores import TOLERANCE, choose_reading, scored_logits, span_sums
from prunekit.evaluation.standard_tasks import Tasks, named_tasks
from prunekit.evaluation.windows import read_spans
from prunekit.layerwise import Layerwise
from prunekit.questions import Question, Task

Texts = Tensor | TextSource | Mapping[str, Tensor | TextSource]
TEXT = "text"  # domain of an unnamed text


@dataclass(frozen=True, eq=False)
class EvaluationSet:
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

    def outcomes(self, sums: Tensor) -> tuple[np.ndarray, np.ndarray]:
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


def make_evaluation_set(
    model: nn.Module,
    tokenizer: Any,
    tasks: Tasks | None,
    text: Texts | None,
    *,
    limit: int | None = None,
    data_dir: str | Path | None = None,
) -> EvaluationSet:
    """Build the evaluation set from tasks and texts; `limit` and `data_dir` as in `zero_shot`.

    Raises:
        PrunekitError: neither is given and the tokenizer is not the embedded world's; a domain is in both; or an
            error of `zero_shot` or `measure_perplexity`.
    """
    if tokenizer is None:
        raise PrunekitError("tokenizer=None; give the model's own tokenizer")
    asked, choices = task_spans(model, tokenizer, _tasks(tokenizer, tasks, text, limit, data_dir))
    rows = [_row(task, question, spans) for (task, _, question), spans in zip(asked, choices, strict=True)]
    texts = text if isinstance(text, Mapping) else {} if text is None else {TEXT: text}
    read = [(name, span) for name, source in texts.items() for span in _windows(model, tokenizer, source)]
    _check_apart({row["domain"] for row in rows} | {row["task"] for row in rows}, {name for name, _ in read})
    rows += [_window_row(tokenizer, name, span) for name, span in read]
    spans = [span for several in choices for span in several] + [span for _, span in read]
    check_tokens_fit(model, max((max(span.tokens) for span in spans), default=0))
    return EvaluationSet(pd.DataFrame(rows), spans, *_layout(asked))


def _tasks(
    tokenizer: Any, tasks: Tasks | None, text: Texts | None, limit: int | None, data_dir: str | Path | None
) -> list[Task]:
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
    return found


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


def _layout(asked: list[Asked]) -> tuple[Tensor, Tensor, Tensor]:
    """Places, lengths and answers of the questions."""
    most = max((len(question.choices) for _, _, question in asked), default=1)
    places = torch.full((len(asked), most), -1)
    lengths = torch.ones(len(asked), most, dtype=torch.float64)
    first = 0
    for number, (task, _, question) in enumerate(asked):
        n = len(question.choices)
        places[number, :n] = torch.arange(first, first + n)
        if task.normalize:
            lengths[number, :n] = choice_lengths(question)
        first += n
    return places, lengths, torch.tensor([question.answer for _, _, question in asked], dtype=torch.long)


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


Layers = tuple[int, ...]
MANY = 100  # approximate runs of the same spans, which justify a test of packing


class Runner:
    """Computes likelihoods of the same spans again and again, skipping layers that did not change.

    Layers below a changed one are not run. Those above it run only if the changed layer's output for a batch is new:
    ablating all heads and ablating the whole block give the same output.

    Attributes:
        packed: whether spans share rows of a batch; tested on this model, like the next.
        resumed: whether layers are skipped.
    """

    def __init__(self, model: nn.Module, spans: Sequence[Span], tokens_a_batch: int) -> None:
        """Takes a causal LM in evaluation mode, the spans, and the approximate positions per forward pass."""
        self._model, self._n = model, len(spans)
        reading = choose_reading(model, spans, tokens_a_batch, runs=MANY)
        self.packed, self._gathers = reading.packed, reading.gathers
        self._batches = list(reading.batches(model))
        self._chain = _chain(model, self._batches)
        self.resumed = self._chain is not None
        self._known: dict[tuple[int, bytes], Tensor] = {}  # batch and digest of the changed layer's output → sums
        self._layer = -1  # the layer of these sums

    def layers_of(self, group: CoupledGroup) -> Layers:
        """Ascending numbers of the layers with a group's weights; () if a module outside the layers uses them too."""
        if self._chain is None:
            return ()
        parameters = dict(self._model.named_parameters())
        mine = {id(parameters[member.parameter]) for member in group.members}
        names = [name for name, p in self._model.named_parameters(remove_duplicate=False) if id(p) in mine]
        numbers = {path: number for number, path in enumerate(self._chain.layers)}
        paths = [layer_of(name, set(numbers)) for name in names]
        return () if None in paths else tuple(sorted({numbers[path] for path in paths if path is not None}))

    def sums(self, changed: Layers) -> Tensor:
        """Sum of log-likelihoods of each span, float64 (n_spans,), in nats.

        Args:
            changed: layers that differ from the dense model, by `layers_of`; the first must not decrease between calls.
        """
        if self._chain is None or not changed:
            return span_sums(self._model, self._batches, self._n, self._gathers)
        found = torch.zeros(self._n, dtype=torch.float64)
        for number, batch in enumerate(self._batches):
            found[batch.members] = self._resumed(self._chain, changed, number)
        return found

    def _resumed(self, chain: Layerwise, changed: Layers, number: int) -> Tensor:
        """Sums of one batch, run from the first changed layer."""
        first = changed[0]
        hidden = chain.run(first, number)
        if len(changed) > 1:
            return self._read(chain, first + 1, number, hidden)
        if first != self._layer:
            self._layer, self._known = first, {}
        key = number, hashlib.sha256(bytes_of(hidden)).digest()
        if key not in self._known:
            self._known[key] = self._read(chain, first + 1, number, hidden)
        return self._known[key]

    def _read(self, chain: Layerwise, layer: int, number: int, hidden: Tensor) -> Tensor:
        """Sums of one batch, run from the residual stream before a layer."""
        batch = self._batches[number]
        logits = scored_logits(self._model, batch, self._gathers, lambda: chain.logits(layer, number, hidden))
        return batch.read(logits)[0]


def _chain(model: nn.Module, batches: Sequence[Batch]) -> Layerwise | None:
    """The batches before the first layer; None if resuming a small batch does not reproduce its logits."""
    small = min(batches, key=lambda batch: batch.inputs["input_ids"].numel()).inputs
    trial = Layerwise.of(model, [small])
    if trial is None:
        return None
    whole = model(**small, use_cache=False).logits
    near = TOLERANCE * float(whole.abs().max())
    for number in range(len(trial.layers)):
        try:
            resumed = trial.logits(number + 1, 0, trial.run(number, 0))
        except Exception:  # the model uses more of a layer's output than the residual stream
            return None
        if not torch.allclose(resumed, whole, rtol=0, atol=near):
            return None
    return Layerwise.of(model, [batch.inputs for batch in batches])
