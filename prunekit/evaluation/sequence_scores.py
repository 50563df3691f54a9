"""Log-likelihoods of token spans: the only place where evaluation runs a model on text.

Spans that begin alike are packed into one row, where this model is found to give the same likelihoods so. Not every
decoder listens to positions and mask, so that it is tried on a few rows before it is used. Logits are computed only
where a token is scored, where the model's head is found to be the last thing that it applies to each position.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from prunekit.errors import PrunekitError
from prunekit.evaluation.likelihood import (
    FULL,
    ROW,
    WIDEST,
    Batch,
    Row,
    Span,
    check_tokens_fit,
    dtype_of,
    pack,
    packed_batches,
    plain_batches,
    sample_rows,
    unpacked,
)
from prunekit.models import device_of, evaluating, max_positions
from prunekit.processes import check_alike, check_same_model, is_first, n_sharing, own_share, summed

TOLERANCE = 1e-4  # relative, of a span's sum in float32; wider where the model's numbers are coarser
CONTROL = 0.05  # allowed error of packing, as a share of the error without the tree's mask and positions


@dataclass(frozen=True, eq=False)
class Likelihoods:
    """Log-likelihoods of spans.

    Attributes:
        sums: float64 (n_spans,), sum of log p(token | all before it) over the scored tokens, in nats.
        greedy: bool (n_spans,), whether each scored token is the likeliest one where it stands.
        n_computed: positions that the model was run on, including padding and the test of packing.
        n_tokens: positions of all spans, had each been read alone.
    """

    sums: Tensor
    greedy: Tensor
    n_computed: int
    n_tokens: int


@dataclass(frozen=True, eq=False)
class Reading:
    """A plan for running spans through one model.

    Attributes:
        spans: the spans to score.
        rows: of a tree each where they are packed, else of one sequence each.
        packed: whether spans share rows.
        tokens_a_batch: positions a forward pass, about.
        gathers: whether logits are computed only where a token is scored.
        n_tried: positions that were run to find this out.
    """

    spans: Sequence[Span]
    rows: list[Row]
    packed: bool
    tokens_a_batch: int
    gathers: bool
    n_tried: int = 0

    def batches(self, model: nn.Module) -> Iterator[Batch]:
        """The batches, one by one, since masks need memory."""
        if self.packed:
            return packed_batches(model, self.spans, self.rows, self.tokens_a_batch)
        return plain_batches(model, self.spans, self.rows, self.tokens_a_batch, FULL)


def log_likelihoods(
    model: nn.Module, spans: Sequence[Span], *, batch_size: int, progress: str | None = None
) -> Likelihoods:
    """Log-likelihood of each span's scored tokens, and whether they are the greedy choice.

    Args:
        model: a causal language model of `transformers`.
        spans: what to score.
        batch_size: rows of about 128 tokens a forward pass; it does not change the result.
        progress: name of the progress bar; None shows none.

    Raises:
        PrunekitError: a token is outside the model's vocabulary, the model's answer is not finite, or processes that
            share the work have different spans or models.
    """
    check_tokens_fit(model, max((max(span.tokens) for span in spans), default=0))
    check_alike(hash(tuple((span.tokens, span.start) for span in spans)) // 4, "texts or questions")
    check_same_model(model)
    found = torch.zeros(2, len(spans), dtype=torch.float64)  # sums, and 1 where greedy
    silent = progress is None or not is_first()
    bar = tqdm(total=len(spans), desc=progress, disable=silent, leave=False, delay=1)
    with evaluating(model), torch.no_grad(), bar:
        reading = choose_reading(model, spans, batch_size * ROW)
        read_as = (reading.packed, reading.gathers, len(reading.rows))
        check_alike(hash(read_as) // 4, "batches, since a test of packing came out differently (one is out of memory?)")
        n_computed = 0
        for batch in own_share(reading.batches(model)):
            read = batch.read(scored_logits(model, batch, reading.gathers))
            found[:, batch.members] = torch.stack([values.double() for values in read])
            if not bool(found.isfinite().all()):
                break  # refused below, by all processes
            n_computed += batch.inputs["input_ids"].numel()
            bar.update(len(batch.members) * n_sharing())
        found = summed(found)
        require_finite(found[0], model)
    n_computed = reading.n_tried + int(summed(torch.tensor(n_computed)))
    return Likelihoods(found[0], found[1] > 0, n_computed, sum(len(span.tokens) - 1 for span in spans))


def require_finite(values: Tensor, model: nn.Module) -> None:
    """Raises an error if a value is NaN or infinite; the message names the parameters at fault."""
    if bool(values.isfinite().all()):
        return
    here = ((name, weight) for name, weight in model.named_parameters() if not weight.is_meta)  # the rest is offloaded
    broken = [name for name, weight in here if not bool(weight.isfinite().all())]
    shown = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
    cause = (
        f"the weights {shown} are NaN or infinite; load the checkpoint again or redo the step that wrote them"
        if broken
        else f"all weights are finite, so the activations overflow in {next(model.parameters()).dtype}; try float32"
    )
    raise PrunekitError(f"the model's log-likelihoods are not finite: {cause}")


def scored_logits(model: nn.Module, batch: Batch, gathers: bool, run: Callable[[], Tensor] | None = None) -> Tensor:
    """Logits (n_places, vocabulary) at the scored positions of a batch.

    Args:
        model: a causal LM in evaluation mode.
        batch: the batch to run.
        gathers: whether the head is only applied there.
        run: what runs the model and gives logits (rows, width, vocabulary), if not the model itself.
    """
    run = run or (lambda: model(**batch.inputs, use_cache=False).logits)
    if not gathers:
        return run().flatten(0, 1)[batch.places]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    with head.register_forward_pre_hook(lambda _, given: (given[0].flatten(0, 1)[batch.places][None], *given[1:])):
        return run()[0]


def choose_reading(model: nn.Module, spans: Sequence[Span], tokens_a_batch: int, *, runs: int = 1) -> Reading:
    """Choose packed or plain rows: packed if it saves time and a test gives the model's own likelihoods.

    Args:
        model: a causal LM in evaluation mode.
        spans: the spans to score.
        tokens_a_batch: positions a forward pass, about; it does not change the result.
        runs: how often they will be run.
    """
    plain = Reading(spans, unpacked(spans), False, tokens_a_batch, _gathers(model, spans))
    if max(len(span.tokens) for span in spans) - 1 > _attention_window(model):
        return plain
    limit = max_positions(model) or WIDEST  # models that learn positions have none for wider rows
    rows = pack(spans, min(ROW, limit), widest=min(WIDEST, limit))
    few = sample_rows(rows)
    alone = unpacked(spans, sorted({span for row in few for span in row.paths}))
    n_tried = _n_nodes(alone) + 2 * _n_nodes(few)
    if runs * (_n_nodes(plain.rows) - _n_nodes(rows)) <= n_tried:
        return plain
    chosen = replace(plain, rows=rows, packed=True) if _packs(model, plain, few, alone) else plain
    return replace(chosen, n_tried=n_tried)


def _n_nodes(rows: Sequence[Row]) -> int:
    return sum(len(row.tokens) for row in rows)


def _attention_window(model: nn.Module) -> float:
    """Tokens that some layers see at most, as the configuration says: a given mask may replace theirs."""
    config: Any = model.config
    window = getattr(config.get_text_config(), "sliding_window", None)
    return window if isinstance(window, int) and window > 0 else math.inf


def _gathers(model: nn.Module, spans: Sequence[Span]) -> bool:
    """Whether the output head gives the same logits when applied to some positions only, by a test on a few tokens."""
    ids = torch.tensor([max(spans, key=lambda span: len(span.tokens)).tokens[:8]], device=device_of(model))
    places = torch.tensor([0, ids.shape[1] - 1], device=ids.device)
    none = torch.zeros(0)
    batch = Batch({"input_ids": ids}, places, none, none, none, none)
    whole = scored_logits(model, batch, gathers=False)
    try:
        some = scored_logits(model, batch, gathers=True)
    except Exception:  # whatever a model does with logits of another shape than that of its input
        return False
    near = _coarseness(model) * whole.abs().max()
    return some.shape == whole.shape and bool(((some - whole).abs() <= near).all())


def _packs(model: nn.Module, plain: Reading, few: list[Row], alone: list[Row]) -> bool:
    """Whether a model follows given positions and masks, by a test on a few rows against single spans.

    As a control, it must err when given neither: where it does not, as with a model that nothing moves, the
    trial shows nothing, and there is nothing to trust.
    """
    spans, size, gathers = plain.spans, plain.tokens_a_batch, plain.gathers
    own = span_sums(model, plain_batches(model, spans, alone, size), len(spans), gathers)
    trial = list(packed_batches(model, spans, few, size))
    untold = [replace(batch, inputs={"input_ids": batch.inputs["input_ids"]}) for batch in trial]
    try:
        error = _error(span_sums(model, trial, len(spans), gathers), own)
        control = _error(span_sums(model, untold, len(spans), gathers), own)
    except Exception:  # whatever it is that a model's code says of arguments that it does not expect
        return False
    return error <= _coarseness(model) and error < CONTROL * control


def span_sums(model: nn.Module, batches: Iterable[Batch], n_spans: int, gathers: bool) -> Tensor:
    """Sum of log p(token | all before it) over each span's scored tokens, float64 (n_spans,), in nats, on the CPU."""
    sums = torch.zeros(n_spans, dtype=torch.float64)
    for batch in batches:
        sums[batch.members] = batch.read(scored_logits(model, batch, gathers))[0]
    return sums


def _coarseness(model: nn.Module) -> float:
    """The relative error that counts as rounding."""
    return max(TOLERANCE, 8 * torch.finfo(dtype_of(model)).eps)


def _error(sums: Tensor, own: Tensor) -> float:
    """The largest difference of a span's sum, relative to it or to one nat; NaN counts as infinite."""
    return float(((sums - own).abs() / own.abs().clamp_min(1)).nan_to_num(nan=torch.inf).max())
