"""Log-likelihoods of token sequences: the one place where evaluation runs a model on text."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from prunekit.errors import PrunekitError


@dataclass(frozen=True)
class Span:
    """Tokens of which the last ones are scored.

    Attributes:
        tokens: token ids, at least 2.
        start: position of the first token that is scored, in [1, len(tokens)); what stands before it is context.
    """

    tokens: tuple[int, ...]
    start: int

    @property
    def n_scored(self) -> int:
        """Tokens that are scored."""
        return len(self.tokens) - self.start


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside; the model's own mode again outside."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def max_positions(model: nn.Module) -> int | None:
    """Tokens that fit into one forward pass, as the configuration says; None where it sets no limit."""
    config: Any = model.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies."""
    return next(model.parameters()).device


@dataclass(frozen=True)
class Family:
    """Spans that share their context, which is then read only once.

    Attributes:
        prefix: the tokens before the last one of the context; empty where a span is alone.
        members: positions of the spans.
    """

    prefix: tuple[int, ...]
    members: tuple[int, ...]


def find_families(spans: Sequence[Span]) -> list[Family]:
    """Groups spans by their context: the choices of a question. A span alone is read in one go."""
    by_prefix: dict[tuple[int, ...], list[int]] = {}
    for position, span in enumerate(spans):
        by_prefix.setdefault(span.tokens[: span.start - 1], []).append(position)
    shared = {prefix: members for prefix, members in by_prefix.items() if prefix and len(members) > 1}
    together = {member for members in shared.values() for member in members}
    alone = [Family((), (member,)) for member in range(len(spans)) if member not in together]
    return [Family(prefix, tuple(members)) for prefix, members in shared.items()] + alone


def batch_families(families: Sequence[Family], spans: Sequence[Span], batch_size: int) -> Iterator[list[Family]]:
    """Batches of families whose prefixes are equally long, so that no prefix is padded, the longest first."""

    def length(family: Family) -> tuple[int, int]:
        return len(family.prefix), max(len(spans[member].tokens) for member in family.members)

    ordered = sorted(families, key=length, reverse=True)
    for _, same in groupby(ordered, key=lambda family: len(family.prefix)):
        while batch := list(islice(same, batch_size)):
            yield batch


def log_likelihoods(model: nn.Module, spans: Sequence[Span], *, batch_size: int, progress: str | None = None) -> Tensor:
    """Sum of log p(token | all before it) over the scored tokens of each span.

    Batches are sorted by length and padded on the right, which no causal model sees. A context that several
    spans share is read once, into the KV cache.

    Args:
        model: a causal language model of `transformers`.
        spans: what to score.
        batch_size: contexts a forward pass.
        progress: name of the progress bar; None shows none.

    Returns:
        float64 (n_spans,), in nats, on the CPU.

    Raises:
        PrunekitError: batch_size is below 1, a token is outside the model's vocabulary, or the model's
            answer is not finite.
    """
    check_batches(model, spans, batch_size)
    sums = torch.zeros(len(spans), dtype=torch.float64)
    bar = tqdm(total=len(spans), desc=progress, disable=progress is None, leave=False, delay=1)
    with evaluating(model), bar:
        for batch in batch_families(find_families(spans), spans, batch_size):
            members = [member for family in batch for member in family.members]
            skipped = len(batch[0].prefix)
            for member, row in zip(members, tail_logits(model, batch, spans), strict=True):
                sums[member] = score_span(row, spans[member], skipped)
            require_finite(sums, model)
            bar.update(len(members))
    return sums


def tail_logits(model: nn.Module, batch: Sequence[Family], spans: Sequence[Span]) -> Tensor:
    """Logits (n_members, seq, vocabulary) of what follows the families' prefixes, all of one length."""
    device, skipped = device_of(model), len(batch[0].prefix)
    tails = [torch.tensor(spans[member].tokens[skipped:-1]) for family in batch for member in family.members]
    ids = nn.utils.rnn.pad_sequence(tails, batch_first=True).to(device)  # (n_members, seq)
    seen = [torch.ones(skipped + len(tail), dtype=torch.long) for tail in tails]
    mask = nn.utils.rnn.pad_sequence(seen, batch_first=True).to(device)  # (n_members, skipped + seq)
    if not skipped:
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    prefixes = torch.tensor([family.prefix for family in batch], device=device)
    cache = model(input_ids=prefixes, use_cache=True).past_key_values
    owners = [row for row, family in enumerate(batch) for _ in family.members]
    cache.reorder_cache(torch.tensor(owners, device=device))
    return model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits


def score_span(logits: Tensor, span: Span, skipped: int = 0) -> float:
    """Log-likelihood of a span's scored tokens, in nats, from logits (seq, vocabulary) after `skipped` tokens.

    The logits at position i are about token i + 1.
    """
    wanted = torch.tensor(span.tokens[span.start :], device=logits.device)
    rows = logits[span.start - 1 - skipped : len(span.tokens) - 1 - skipped].float()
    return -F.cross_entropy(rows, wanted, reduction="none").double().sum().item()


def check_batches(model: nn.Module, spans: Sequence[Span], batch_size: int) -> None:
    """Refuses what would only fail deep inside the model."""
    if batch_size < 1:
        raise PrunekitError(f"batch_size={batch_size}; it is a number of contexts, at least 1")
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    n_vocabulary = embedding.weight.shape[0]
    highest = max((max(span.tokens) for span in spans), default=0)
    if highest >= n_vocabulary:
        raise PrunekitError(
            f"the text holds token {highest}, but the model's vocabulary has {n_vocabulary}: "
            "this tokenizer belongs to another model; load both from the same place"
        )


def require_finite(values: Tensor, model: nn.Module) -> None:
    """Raises a `PrunekitError` that names the parameters at fault where a value is NaN or infinite."""
    if bool(values.isfinite().all()):
        return
    broken = [name for name, weight in model.named_parameters() if not bool(weight.isfinite().all())]
    shown = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
    cause = (
        f"NaN or infinite weights stand in {shown}; load the checkpoint again or redo the step that wrote them"
        if broken
        else f"all weights are finite, so the activations overflow in {next(model.parameters()).dtype}; try float32"
    )
    raise PrunekitError(f"the model's log-likelihoods are not finite: {cause}")
