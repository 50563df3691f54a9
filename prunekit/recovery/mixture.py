"""Dynamic fine-tuning: draws more training text from sources on which the pruned model lost more."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from prunekit.calibration import check_finite, mean_loss
from prunekit.checks import Count, Model, Part, Positive, Seed, Tokenizer, check_fields, checked
from prunekit.errors import PrunekitError
from prunekit.escaping import html_paragraph
from prunekit.recovery.data import TrainOn, with_replies
from prunekit.recovery.fine_tuning import recover
from prunekit.recovery.log import RecoveryLog
from prunekit.recovery.lora import LoRA
from prunekit.recovery.settings import FullTuning, TrainingSettings
from prunekit.recovery.sources import Source, Sources, join, open_sources, shuffle

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Mixture:
    """Settings of the mixture; the size of a source grows with its loss gap: n_s = N·[(1 - β)·softmax(Δ_s/τ) + β/S].

    Attributes:
        n_rounds: trainings, each on a mixture measured anew.
        uniform_share: β in [0, 1], the share drawn uniformly from all S sources; 1 is uniform sampling, the control.
        temperature: τ in nats per token; the smaller, the more the worst source gets.
        n_validation: windows of each source that are only measured, never trained on; at most a fifth of it.
        seed: which windows are drawn.

    Raises:
        PrunekitError: a value that cannot be.

    Source: LoRAShear, Alg. 5, which has no formula. Reconstructed: this one, with Δ_s the gap in log-perplexity to the
        dense model.
    """

    n_rounds: Count = 4
    uniform_share: Part = 0.3
    temperature: Positive = 0.1
    n_validation: Count = 32
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)

    def shares(self, gaps: Tensor) -> Tensor:
        """Share of each source from its gap in nats, (n_sources,); they sum to 1."""
        return (1 - self.uniform_share) * torch.softmax(gaps / self.temperature, 0) + self.uniform_share / len(gaps)


@dataclass(frozen=True)
class MixtureLog:
    """Log of a mixture: gaps and windows drawn in each round.

    Attributes:
        rows: one a round and source; see `table`. The last round only measures.
    """

    rows: tuple[dict[str, Any], ...]

    def table(self) -> pd.DataFrame:
        """Columns round (from 1), source, dense and loss (nats per token), gap (their difference), share, n_windows."""
        return pd.DataFrame(self.rows)

    def __add__(self, other: "MixtureLog") -> "MixtureLog":
        """This log followed by another stage, whose rounds are renumbered."""
        last = max((row["round"] for row in self.rows), default=0)
        return MixtureLog(self.rows + tuple({**row, "round": row["round"] + last} for row in other.rows))

    def __repr__(self) -> str:
        if not self.rows:
            return "MixtureLog(nothing was drawn)"
        table = self.table()
        first, last = (table[table["round"] == n]["gap"].mean() for n in (1, table["round"].max()))
        n_rounds, n_sources = (table.groupby("round")["n_windows"].sum() > 0).sum(), table["source"].nunique()
        return (
            f"MixtureLog({n_rounds} rounds over {n_sources} sources; mean gap {first:.3f} → {last:.3f} nats per token)"
        )

    def _repr_html_(self) -> str:
        if not self.rows:
            return html_paragraph(self)
        gaps = self.table().pivot(index="source", columns="round", values="gap")
        return f"{html_paragraph(self)}{gaps.to_html(float_format='{:.3f}'.format)}"


@checked
def recover_on_mixture(
    model: Model,
    dense: Model,
    sources: Sources | Sequence[Source],
    method: LoRA | FullTuning | None = None,
    mixture: Mixture | None = None,
    *,
    train_on: TrainOn = "replies",
    keep_zeros: bool | None = None,
    tokenizer: Tokenizer | None = None,
    inplace: bool = False,
) -> "PreTrainedModel":
    """Recovers a model in rounds: measures the gap on each source, draws training text by it, and trains.

    Args:
        model: the pruned model.
        dense: the model before pruning, against which is measured; it reads the same tokens.
        sources: name → text or tokens, as `open_sources` takes them, or what it returned. Their documents are mixed in
            every window.
        method: how to train; its steps are shared out between the rounds. None is `LoRA()`.
        mixture: how the sources are weighed; None is `Mixture()`.
        train_on: as for `recover`; of opened sources, it was said as they were opened. Gaps are those of all tokens.
        keep_zeros: as for `recover`.
        tokenizer: needed where sources are text.
        inplace: change `model` itself; what an interruption or an error leaves has the rounds until then.

    Returns:
        The model, in evaluation mode. Its `recovery_log` is the loss curve over all rounds, its `mixture_log` a
        `MixtureLog`.

    Raises:
        PrunekitError: no source, one that is too small to be measured and trained on, or what `recover` raises.

    Source: LoRAShear (arXiv 2310.18356), Alg. 5.
    """
    check_finite(model)
    method = method or LoRA()
    mixture = mixture or Mixture()
    drawn_from = opened(sources, tokenizer, method, mixture, model, train_on)
    a_step, n_steps = steps_over(drawn_from, method, mixture)
    dense_losses = [mean_loss(dense, source.validation) for source in drawn_from]
    changed = model if inplace else copy.deepcopy(model)
    rows: list[dict[str, Any]] = []
    logs: list[RecoveryLog] = []
    for number in tqdm(range(mixture.n_rounds), desc="rounds", leave=False, delay=1):
        steps = n_steps * (number + 1) // mixture.n_rounds - n_steps * number // mixture.n_rounds
        found = _measure(changed, drawn_from, dense_losses, mixture, number + 1, steps * a_step)
        rows += found
        once = replace(method, max_steps=steps, batch_size=a_step, seed=method.seed + number)
        drawn = [d for source, row in zip(drawn_from, found, strict=True) for d in source.draw(row["n_windows"])]
        joined = join(shuffle(drawn, once.seed), drawn_from[0].seq_len, drawn_from[0].bos)[: steps * a_step]
        windows = with_replies(joined)
        changed = recover(changed, once, windows, keep_zeros=keep_zeros, inplace=True, measure=False)
        logs.append(changed.recovery_log)
    rows += _measure(changed, drawn_from, dense_losses, mixture, mixture.n_rounds + 1, 0)
    changed.recovery_log = _joined(logs, method)  # type: ignore[assignment]
    changed.mixture_log = MixtureLog(tuple(rows))  # type: ignore[assignment]
    return changed


def opened(
    sources: Sources | Sequence[Source],
    tokenizer: Any,
    method: TrainingSettings,
    mixture: Mixture,
    model: Any,
    train_on: TrainOn = "replies",
) -> Sequence[Source]:
    """Sources to draw from, opened if they are not yet."""
    if isinstance(sources, Sequence) and sources and all(isinstance(source, Source) for source in sources):
        return sources
    options: Any = {"train_on": train_on, "n_validation": mixture.n_validation, "seed": mixture.seed}
    return open_sources(sources, tokenizer, method.seq_len, model, **options)  # type: ignore[arg-type]


def steps_over(sources: Sequence[Source], method: TrainingSettings, mixture: Mixture) -> tuple[int, int]:
    """Windows a step, and steps over all rounds.

    Raises:
        PrunekitError: more rounds than steps.
    """
    n_windows = sum(source.n_windows for source in sources)
    n_steps = method.n_steps(n_windows)
    if n_steps < mixture.n_rounds:
        raise PrunekitError(
            f"n_rounds={mixture.n_rounds}, but training has {n_steps} steps; give fewer rounds or more steps"
        )
    return method.windows_a_step(n_windows), n_steps


def _measure(
    model: Any, sources: Sequence[Source], dense: list[float], mixture: Mixture, number: int, n_windows: int
) -> list[dict[str, Any]]:
    """One row per source: its gap in the loss, and how many windows to draw."""
    losses = [mean_loss(model, source.validation) for source in sources]
    gaps = torch.tensor(losses, dtype=torch.float64) - torch.tensor(dense, dtype=torch.float64)
    shares = mixture.shares(gaps)
    counts = _whole(shares, n_windows)
    columns = zip(sources, dense, losses, gaps.tolist(), shares.tolist(), counts, strict=True)
    return [
        {"round": number, "source": s.name, "dense": d, "loss": m, "gap": g, "share": share, "n_windows": n}
        for s, d, m, g, share, n in columns
    ]


def _whole(shares: Tensor, total: int) -> list[int]:
    """Split a number into integers by shares, rounding up the largest remainders."""
    exact = shares * total
    counts = exact.floor()
    missing = total - int(counts.sum())
    counts[(exact - counts).argsort(descending=True, stable=True)[:missing]] += 1
    return [int(n) for n in counts]


def _joined(logs: list[RecoveryLog], method: TrainingSettings) -> RecoveryLog:
    losses, rates = (tuple(x for log in logs for x in getattr(log, name)) for name in ("losses", "learning_rates"))
    return RecoveryLog(losses, rates, sum(log.n_tokens for log in logs), logs[0].trainable, repr(method))
