"""Log-likelihoods of token sequences: the one place where evaluation runs a model on text."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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


def share_prefixes(inputs: Sequence[tuple[int, ...]]) -> list[int]:
    """For each input, the position of one that begins with it (often itself).

    In a causal model the logits of a prefix are the first logits of the whole, so choices of one token
    (`" yes"`, `" no"`) cost a single pass over their context.
    """
    order = sorted(range(len(inputs)), key=inputs.__getitem__)
    host = list(range(len(inputs)))
    for here, after in zip(order[-2::-1], order[:0:-1], strict=True):
        if inputs[after][: len(inputs[here])] == inputs[here]:
            host[here] = host[after]
    return host


def log_likelihoods(model: nn.Module, spans: Sequence[Span], *, batch_size: int, progress: str | None = None) -> Tensor:
    """Sum of log p(token | all before it) over the scored tokens of each span.

    Batches are sorted by length and padded on the right, which no causal model sees.

    Args:
        model: a causal language model of `transformers`.
        spans: what to score.
        batch_size: sequences a forward pass.
        progress: name of the progress bar; None shows none.

    Returns:
        float64 (n_spans,), in nats, on the CPU.

    Raises:
        PrunekitError: batch_size is below 1, a token is outside the model's vocabulary, or the model's
            answer is not finite.
    """
    check_batches(model, spans, batch_size)
    riders: dict[int, list[int]] = {}
    for rider, host in enumerate(share_prefixes([span.tokens[:-1] for span in spans])):
        riders.setdefault(host, []).append(rider)
    hosts = sorted(riders, key=lambda host: -len(spans[host].tokens))
    sums = torch.zeros(len(spans), dtype=torch.float64)
    bar = tqdm(total=len(spans), desc=progress, disable=progress is None, leave=False, delay=1)
    with evaluating(model), bar:
        for first in range(0, len(hosts), batch_size):
            batch = hosts[first : first + batch_size]
            logits = forward_padded(model, [spans[host].tokens[:-1] for host in batch])
            for row, host in zip(logits, batch, strict=True):
                for rider in riders[host]:
                    sums[rider] = score_span(row, spans[rider])
                    bar.update()
            require_finite(sums, model)
    return sums


def forward_padded(model: nn.Module, inputs: Sequence[tuple[int, ...]]) -> Tensor:
    """Logits (batch, seq, vocabulary) of inputs of unequal length, padded on the right."""
    rows = [torch.tensor(tokens) for tokens in inputs]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (batch, seq)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    device = device_of(model)
    return model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits


def score_span(logits: Tensor, span: Span) -> float:
    """Log-likelihood of a span's scored tokens, in nats, from logits (seq, vocabulary) of an input that begins with it.

    The logits at position i are about token i + 1.
    """
    wanted = torch.tensor(span.tokens[span.start :], device=logits.device)
    rows = logits[span.start - 1 : len(span.tokens) - 1].float()
    return -F.cross_entropy(rows, wanted, reduction="none").double().sum().item()


def check_batches(model: nn.Module, spans: Sequence[Span], batch_size: int) -> None:
    """Refuses what would only fail deep inside the model."""
    if batch_size < 1:
        raise PrunekitError(f"batch_size={batch_size}; it is a number of sequences, at least 1")
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
