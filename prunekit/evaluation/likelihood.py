"""Spans of tokens to score, and checks that they fit a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prunekit.errors import PrunekitError


@dataclass(frozen=True)
class Span:
    """A sequence of tokens, of which the last ones are scored.

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
        """Number of scored tokens."""
        return len(self.tokens) - self.start


def check_batches(model: nn.Module, spans: Sequence[Span], batch_size: int) -> None:
    """Raises an error for spans that a model cannot take."""
    if batch_size < 1:
        raise PrunekitError(f"batch_size={batch_size}; it is a number of rows, at least 1")
    check_tokens_fit(model, max((max(span.tokens) for span in spans), default=0))


def check_tokens_fit(model: nn.Module, highest: int) -> None:
    """Raises an error for a token outside the model's vocabulary."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    n_vocabulary = embedding.weight.shape[0]
    if highest >= n_vocabulary:
        raise PrunekitError(
            f"the text holds token {highest}, but the model's vocabulary has {n_vocabulary}: "
            "this tokenizer belongs to another model; load both from the same place"
        )


def require_finite(values: Tensor, model: nn.Module) -> None:
    """Raises an error if a value is NaN or infinite; the message names the parameters at fault."""
    if bool(values.isfinite().all()):
        return
    broken = [name for name, weight in model.named_parameters() if not bool(weight.isfinite().all())]
    shown = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
    cause = (
        f"the weights {shown} are NaN or infinite; load the checkpoint again or redo the step that wrote them"
        if broken
        else f"all weights are finite, so the activations overflow in {next(model.parameters()).dtype}; try float32"
    )
    raise PrunekitError(f"the model's log-likelihoods are not finite: {cause}")
