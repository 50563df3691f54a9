"""Which units one question needs: the fall of its answer's log-probability when each is ablated alone."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from prunekit.calibration import check_finite
from prunekit.checks import Model, Tokenizer, Whole, checked
from prunekit.discovery.groups import CoupledGroup
from prunekit.errors import PrunekitError
from prunekit.evaluation.likelihood import Span
from prunekit.evaluation.sequence_scores import require_finite
from prunekit.importance.ablation import ablated
from prunekit.importance.input_statistics import Reader, linear_readers
from prunekit.knowledge.ablation_sets import changing_inputs, consumed
from prunekit.knowledge.asking import check_prompt, span_sums_of, spans_of
from prunekit.knowledge.measurement import check_groups
from prunekit.models import device_of, evaluating
from prunekit.questions import Question

SINGLE = 64  # units of a group at most, for each to be ablated alone; a larger group is ablated as a whole
POSITIONS = 1024  # of a batch of ablations
Measure = Literal["answer", "choices"]


class _Row(NamedTuple):
    """One ablation: a group, some of its units, and the number of the unit if it is a single one of several."""

    group: CoupledGroup
    units: tuple[int, ...]
    unit: int | None


@checked
def needs(
    model: Model,
    tokenizer: Tokenizer,
    question: str | Question,
    answer: str | None = None,
    *,
    groups: Iterable[CoupledGroup],
    choices: Iterable[str] | None = None,
    measure: Measure = "answer",
    channels: Whole = 0,
) -> pd.DataFrame:
    """Measures which units one question needs: the fall of its answer's log-probability without each of them.

    Each unit of a group of 64 or fewer (heads) is ablated alone; a larger group (FFN channels) is ablated as a whole.
    With `channels=n`, the n single FFN channels with the largest first-order estimate are ablated alone too. Ablations
    are rows of one batch where the units' outputs are zeroed instead of their weights, which gives the same.

    Args:
        model: a causal language model of transformers; unchanged afterwards.
        tokenizer: the model's own tokenizer.
        question: the text that the answer continues, or a `Question`, of which the right choice is the answer.
        answer: the continuation, with the space that separates it from the question; None with a `Question`.
        groups: groups discovered in the model, of any kind.
        choices: continuations that the answer competes with, the answer among them; None with a `Question`.
        measure: `"answer"` is log p(answer | question), `"choices"` the logarithm of its share among the choices (the
            loss of `knowledge_of_units` with the other sign).
        channels: number of single FFN channels.

    Returns:
        One row per ablation, the largest fall first: group, kind, layer, unit (missing where a whole group of several
        units was ablated), dense and value (nats, without and with the ablation), fall (dense − value: above 0, the
        answer needs the unit), measure.

    Raises:
        PrunekitError: an empty question or answer, no groups or those of another model, choices that lack the answer or
            are needed and missing, or weights that are not finite.

    Source: an ablation of single units, as in LoRAShear (arXiv 2310.18356), Alg. 3, for one question instead of a set.
    """
    chosen = check_groups(model, groups)
    asked = _question(question, answer, choices)
    if measure == "choices" and len(asked.choices) < 2:
        raise PrunekitError("measure='choices' compares at least two; give choices=, or measure='answer'")
    check_finite(model)
    spans = spans_of(model, tokenizer, asked)
    right = asked.answer
    if measure == "answer":
        spans, right = [spans[right]], 0
    with evaluating(model):
        picked = _picked_channels(model, chosen, spans[right], channels) if channels else []
        with torch.no_grad():
            rows = [*_rows(chosen), *picked]
            dense = _scored(span_sums_of(model, spans), right)
            require_finite(dense, model)
            values = _values(model, spans, right, rows)
    return _table(rows, float(dense), values).assign(measure=measure)


def _question(question: str | Question, answer: str | None, choices: Iterable[str] | None) -> Question:
    if isinstance(question, Question):
        if answer is not None or choices is not None:
            raise PrunekitError("a Question brings its answer and choices; leave out answer= and choices=")
        check_prompt((question.contexts or [question.context])[0])
        return question
    check_prompt(question)
    if answer is None or not answer.strip():
        raise PrunekitError(f"answer={answer!r}; give the text that should follow the question, such as ' Paris'")
    several = (answer,) if choices is None else tuple(choices)
    if answer not in several:
        raise PrunekitError(f"the answer {answer!r} is not among the choices {several}; add it, spaces included")
    return Question(question, several, several.index(answer), "")


def _rows(groups: Iterable[CoupledGroup]) -> Iterator[_Row]:
    for group in groups:
        if group.n_units > SINGLE:
            yield _Row(group, tuple(range(group.n_units)), None)
        else:
            yield from (_Row(group, (unit,), unit) for unit in range(group.n_units))


def _scored(sums: Tensor, right: int) -> Tensor:
    """The answer's score of each copy, (copies,): its log-likelihood, or of several choices the log of its share."""
    if len(sums) == 1:
        return sums[0]
    return sums.log_softmax(0)[right].nan_to_num(nan=-torch.inf)


def _values(model: nn.Module, spans: Sequence[Span], right: int, rows: list[_Row]) -> list[float]:
    """The answer's score under each ablation: rows of a batch where that is the same, else one after another."""
    readers = linear_readers(model)
    together = [number for number, row in enumerate(rows) if row.group.exact and consumed(row.group, readers)]
    at_once = max(1, POSITIONS // max(len(span.tokens) for span in spans))
    values: dict[int, float] = {}  # by number of the row
    for start in range(0, len(together), at_once):
        numbers = together[start : start + at_once]
        try:
            found = _in_one_batch(model, spans, right, [rows[number] for number in numbers], readers)
        except _NotBatchedError:
            break
        values |= zip(numbers, found.tolist(), strict=True)
    for number, row in enumerate(rows):
        if number not in values:
            with ablated(model, row.group, row.units):
                values[number] = float(_scored(span_sums_of(model, spans), right))
    return [values[number] for number in range(len(rows))]


class _NotBatchedError(Exception):
    """A consumer layer does not read one row a sequence."""


def _in_one_batch(
    model: nn.Module, spans: Sequence[Span], right: int, rows: Sequence[_Row], readers: dict[str, Reader]
) -> Tensor:
    """The answer's score in each row of a batch, in which other units are ablated; (n_rows,)."""
    zeroed: dict[str, list[tuple[int, Tensor]]] = {}
    for number, row in enumerate(rows):
        for member in consumed(row.group, readers):
            zeroed.setdefault(member.parameter, []).append((number, member.owned_by(row.units)))

    def zeroing(places: list[tuple[int, Tensor]]) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            if x.ndim != 3 or len(x) != len(rows):
                raise _NotBatchedError
            x = x.clone()
            for number, index in places:
                x[number, :, index.to(x.device)] = 0
            return x

        return change

    with changing_inputs(readers, {name: zeroing(places) for name, places in zeroed.items()}):
        return _scored(span_sums_of(model, spans, len(rows)), right)


def _picked_channels(model: nn.Module, groups: Sequence[CoupledGroup], span: Span, n: int) -> list[_Row]:
    """The channels whose removal changes the answer's log-probability most, by a first-order estimate."""
    readers = linear_readers(model)
    large = [group for group in groups if group.kind == "ffn_channel" and group.n_units > SINGLE]  # others: each unit
    ffns = [group for group in large if consumed(group, readers)]
    gates: dict[str, Tensor] = {}  # parameter of a consumer layer → factors of its inputs, all 1

    def gating(name: str) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            gate = gates.setdefault(name, torch.ones(x.shape[-1], device=x.device, dtype=x.dtype, requires_grad=True))
            return x * gate

        return change

    read = {member.parameter for group in ffns for member in consumed(group, readers)}
    with torch.enable_grad(), changing_inputs(readers, {name: gating(name) for name in read}):
        ids = torch.tensor([span.tokens], device=device_of(model))
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0, span.start - 1 :].float()
        log_p = logits.log_softmax(-1).gather(1, ids[0, span.start :, None]).sum()
        slopes = dict(zip(gates, torch.autograd.grad(log_p, list(gates.values())), strict=True)) if gates else {}
    estimates: list[tuple[float, _Row]] = []
    for group in ffns:
        parts = [slopes[m.parameter].cpu()[m.index].sum(1) for m in consumed(group, readers) if m.parameter in slopes]
        for unit, value in enumerate(sum(parts, torch.zeros(group.n_units)).tolist()):
            estimates.append((value, _Row(group, (unit,), unit)))
    return [row for _, row in sorted(estimates, key=lambda one: -abs(one[0]))[:n]]


def _table(rows: Sequence[_Row], dense: float, values: Sequence[float]) -> pd.DataFrame:
    units = [(row.group.name, row.group.kind, row.group.layer, row.unit) for row in rows]
    found = pd.DataFrame(units, columns=["group", "kind", "layer", "unit"]).astype({"layer": "Int64", "unit": "Int64"})
    found = found.assign(dense=dense, value=values, fall=[dense - value for value in values])
    return found.sort_values("fall", ascending=False, kind="stable", ignore_index=True)
