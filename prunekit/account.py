"""The change of a model's loss by a step (`LossChange`), with a warning if the loss rises by much."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from prunekit.calibration import check_tokens, mean_loss
from prunekit.checks import NotNegative, Whole, check_fields
from prunekit.errors import DamageWarning, PrunekitError, warn

LIMIT = math.log(1.5)  # nats per token; a rise above it is warned of: half as much perplexity again
MOST_TOKENS = 1024  # that are read, before and after: some seconds of a small real model on two cores
_AT_ONCE = 256  # of them, so that the logits of a large vocabulary take a fraction of what scoring takes
_OVERFLOW = 700.0  # nats, of which exp is no float any more
HOW = "give held_out=calibration_set(text, tokenizer, held_out=True)"
ADVICE = {  # step → what to try where the loss rose by much
    "prune": "a smaller pruning_ratio, more calibration text, another importance, ranking or kinds, or protect_layers; "
    "recover() wins back a part",
    "sparsify": "less sparsity, method='sparsegpt' or 'sparsellm', more calibration text; recover() wins back a part",
    "recover": "a lower learning_rate, fewer epochs, or more text",
}


@dataclass(frozen=True)
class LossChange:
    """The loss of a model before and after one step.

    Attributes:
        step: `"prune"`, `"sparsify"` or `"recover"`.
        before: mean loss before the step, nats per token; infinite where it was not finite, None where not measured.
        after: the same after it, on the same tokens.
        n_tokens: tokens that were read; 0 where nothing was measured.
        tokens_from: which tokens these are, in words; where nothing was measured, why not.
    """

    step: str
    before: NotNegative | None
    after: NotNegative | None
    n_tokens: Whole
    tokens_from: str

    @property
    def is_measured(self) -> bool:
        """Whether both losses were measured."""
        return self.before is not None and self.after is not None

    @property
    def rise(self) -> float:
        """Loss after minus loss before, nats per token; NaN where not measured."""
        if self.before is None or self.after is None:
            return math.nan
        return math.inf if math.isinf(self.after) else self.after - self.before

    @property
    def perplexity_before(self) -> float:
        """Exp of the loss before; NaN where not measured."""
        return _perplexity(self.before)

    @property
    def perplexity_after(self) -> float:
        """Exp of the loss after; NaN where not measured."""
        return _perplexity(self.after)

    @property
    def is_large(self) -> bool:
        """Whether the loss rose by more than `LIMIT` or became non-finite."""
        return self.rise > LIMIT

    @property
    def warning(self) -> str | None:
        """The warning with what to try if the loss rose by much; otherwise None."""
        if not self.is_large:
            return None
        return (
            f"{self.step}: {self}, more than the factor {math.exp(LIMIT):g} that is taken as sound; try "
            f"{ADVICE.get(self.step, 'a smaller change')}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a non-finite loss is None with a number of tokens."""
        return {**asdict(self), "before": _finite(self.before), "after": _finite(self.after)}

    @classmethod
    def from_dict(cls, fields: Any) -> "LossChange":
        """The value from the form of `to_dict`.

        Raises:
            PrunekitError: the fields are not those of a loss change.
        """
        try:
            found = cls(**fields)
            check_fields(found)
        except (TypeError, PrunekitError):
            raise PrunekitError(f"{fields!r:.80} is no loss change; give what LossChange.to_dict returned") from None
        if found.n_tokens == 0:
            return replace(found, before=None, after=None)
        before, after = (math.inf if loss is None else loss for loss in (found.before, found.after))
        return replace(found, before=before, after=after)

    def __repr__(self) -> str:
        if not self.is_measured:
            return f"loss not measured: {self.tokens_from}"
        return (
            f"loss {self.before:.2f} → {self.after:.2f} nats per token (perplexity {self.perplexity_before:.4g} → "
            f"{self.perplexity_after:.4g}) on {self.tokens_from}"
        )


def _finite(loss: float | None) -> float | None:
    return loss if loss is not None and math.isfinite(loss) else None


def _perplexity(loss: float | None) -> float:
    if loss is None:
        return math.nan
    return math.exp(loss) if loss < _OVERFLOW else math.inf


class Sample(NamedTuple):
    """Tokens to measure on.

    Attributes:
        tokens: int64 (n, seq_len), few.
        origin: which these are, in words.
    """

    tokens: Tensor
    origin: str


class Opening(NamedTuple):
    """A measurement before a step, to complete after it.

    Attributes:
        step: that is to come.
        sample: to measure on; None where nothing is measured.
        before: loss, nats per token.
        why: nothing is measured.
    """

    step: str
    sample: Sample | None
    before: float | None
    why: str = HOW


def few(tokens: Tensor) -> Tensor:
    """A copy of the first windows of a calibration set (n, seq_len), for the measurement."""
    return tokens[: max(1, MOST_TOKENS // max(tokens.shape[1], 1))].detach().clone()


def check_measure(measure: bool, held_out: Any) -> None:
    """Raise an error for tokens to measure on where nothing is measured.

    Raises:
        PrunekitError: names the two options.
    """
    if held_out is not None and not measure:
        raise PrunekitError(
            "held_out= is what the loss is measured on, and measure=False measures nothing; leave out one"
        )


def opened(
    step: str, model: nn.Module, held_out: Tensor | None, seen: Mapping[str, Tensor | None], why: str | None = None
) -> Opening:
    """Measure a model before a step; an error of the measurement is recorded and does not stop the step.

    Args:
        step: that is to come.
        model: before it.
        held_out: integers (n, seq_len) to measure on; None takes the first windows of what is seen.
        seen: who sees tokens → which; the first that are not None count.
        why: nothing can be measured after the step; None measures.

    Raises:
        PrunekitError: `held_out` is no integers (n, seq_len) that the model can read.
    """
    sample = _sample(model, held_out, seen)
    if sample is None or why is not None:
        return Opening(step, None, None, why or HOW)
    try:
        return Opening(step, sample, loss_on(model, sample.tokens))
    except Exception as error:  # any error of a forward pass: the measurement is secondary
        return Opening(step, None, None, _failed(error))


def _sample(model: nn.Module, held_out: Tensor | None, seen: Mapping[str, Tensor | None]) -> Sample | None:
    """Held-out windows where they are given, otherwise windows that were seen, described as such."""
    if held_out is not None:
        chosen = few(check_tokens(held_out, model))
        return Sample(chosen, f"{_counted(len(chosen), 'held-out window')} of {chosen.shape[1]} tokens")
    for by, tokens in seen.items():
        if tokens is not None:
            chosen = few(tokens)
            told = f"{_counted(len(chosen), 'window')} of {chosen.shape[1]} tokens that {by} saw (not held out)"
            return Sample(chosen, told)
    return None


def _counted(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def set_aside(model: Any) -> None:
    """Move the change of an earlier step into `earlier_changes`: a step that is not measured has no `loss_change`."""
    change = vars(model).pop("loss_change", None)
    if change is not None:
        model.earlier_changes = (*getattr(model, "earlier_changes", ()), change)


def closed(opening: Opening, model: Any) -> LossChange:
    """Measure a model after a step, store the result as `loss_change`, and warn if the loss rose by much.

    The model is made by now, so that neither an error nor an interrupt here may lose it.

    Args:
        opening: of the same step.
        model: the result of the step.
    """
    step, sample, before, why = opening
    change = LossChange(step, None, None, 0, why)
    if sample is not None:
        try:
            change = LossChange(step, before, loss_on(model, sample.tokens), sample.tokens.numel(), sample.origin)
        except KeyboardInterrupt:
            change = replace(change, tokens_from="it was interrupted")
        except Exception as error:
            change = replace(change, tokens_from=_failed(error))
    model.loss_change = change
    if change.warning is not None:
        warn(change.warning, DamageWarning)
    return change


def _failed(error: Exception) -> str:
    kind = "" if isinstance(error, PrunekitError) else f"{type(error).__name__}: "
    return kind + (str(error).splitlines() or ["no reason given"])[0]


def loss_on(model: nn.Module, tokens: Tensor) -> float:
    """Mean loss, nats per token; infinite where it is not finite.

    Raises:
        PrunekitError: tokens that the model cannot read.
    """
    check_tokens(tokens, model)
    parts = tokens.split(max(1, _AT_ONCE // tokens.shape[1]))
    try:
        return sum(mean_loss(model, part) * len(part) for part in parts) / len(tokens)
    except PrunekitError:  # the tokens are good: the loss is not finite
        return math.inf
