"""What is scored, and what of a model it must fit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import PrunekitError


@dataclass(frozen=True)
class Span:
    """Tokens of which the last ones are scored.

    Attributes:
        tokens: token ids, at least 2.
        start: position of the first token that is scored, in [1, len(tokens)); what stands before it is context.
        n_cut: tokens of the context that were cut off on the left, since the model does not take so many.
    """

    tokens: tuple[int, ...]
    start: int
    n_cut: int = 0

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
    return positions_of(model.config)


def positions_of(config: Any) -> int | None:
    """The same, of a configuration."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies."""
    return next(model.parameters()).device


def check_batches(model: nn.Module, spans: Sequence[Span], batch_size: int) -> None:
    """Refuses what would only fail deep inside the model."""
    if batch_size < 1:
        raise PrunekitError(f"batch_size={batch_size}; it is a number of rows, at least 1")
    check_tokens_fit(model, max((max(span.tokens) for span in spans), default=0))


def check_tokens_fit(model: nn.Module, highest: int) -> None:
    """Refuses a token that the model's vocabulary does not have."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    n_vocabulary = embedding.weight.shape[0]
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
