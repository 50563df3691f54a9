"""The training log of a recovery."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import Tensor, nn

from prunekit.account import LossChange
from prunekit.checks import Amount, check_fields
from prunekit.digests import RECORD, record
from prunekit.errors import PrunekitError
from prunekit.files import read_json, reading, write_text
from prunekit.processes import this_process
from prunekit.recovery.settings import TrainingSettings

if TYPE_CHECKING:
    from transformers import TrainerCallback


@dataclass(frozen=True)
class RecoveryLog:
    """Training log, one entry per optimiser step.

    Attributes:
        losses: training loss of each step's batch, nats per token.
        learning_rates: learning rate of each step.
        n_tokens: tokens in the recovery data.
        trainable: parameters that were trained.
        method: the method's repr, which rebuilds it.
        loss_change: mean loss before and after on the same tokens; None where it was not measured.
    """

    losses: tuple[float, ...]
    learning_rates: tuple[float, ...]
    n_tokens: Amount
    trainable: Amount
    method: str
    loss_change: LossChange | None = None

    def table(self) -> pd.DataFrame:
        """One row per step: step (from 1), loss, learning_rate."""
        steps = range(1, len(self.losses) + 1)
        return pd.DataFrame({"step": steps, "loss": self.losses, "learning_rate": self.learning_rates})

    @property
    def ends(self) -> tuple[float, float]:
        """Mean loss of the first and of the last tenth of the steps, since single batches vary."""
        n = max(1, len(self.losses) // 10)
        return sum(self.losses[:n]) / n, sum(self.losses[-n:]) / n

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        change = None if self.loss_change is None else self.loss_change.to_dict()
        curves = {"losses": list(self.losses), "learning_rates": list(self.learning_rates)}
        return {**vars(self), **curves, "loss_change": change}

    @classmethod
    def load(cls, path: str | Path) -> "RecoveryLog":
        """Read a log that `save` wrote.

        Raises:
            PrunekitError: the file is missing, or it holds no such log.
        """
        fields = read_json(path, "RecoveryLog.save")
        with reading(path, "recovery log", "RecoveryLog.save"):
            return cls.from_dict(fields)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "RecoveryLog":
        """The log from the form of `to_dict`."""
        told = {name: fields[name] for name in ("losses", "learning_rates", "n_tokens", "trainable", "method")}
        change = fields.get("loss_change")
        found = cls(**told, loss_change=None if change is None else LossChange.from_dict(change))
        check_fields(found)
        return replace(found, losses=tuple(found.losses), learning_rates=tuple(found.learning_rates))

    def save(self, path: str | Path) -> Path:
        """Write as JSON; the file is complete or not there."""
        write_text(Path(path), json.dumps(self.to_dict(), indent=1))
        return Path(path)

    def __repr__(self) -> str:
        measured = f"; {self.loss_change}" if self.loss_change is not None else ""
        return (
            f"RecoveryLog({len(self.losses)} steps, loss {self.losses[0]:.3f} → {self.losses[-1]:.3f}{measured}; "
            f"{self.trainable:,} trained parameters, {self.n_tokens:,} tokens; {self.method})"
        )


def progress() -> "TrainerCallback":
    """A callback that shows the loss, records finished checkpoints, and stops at a non-finite loss."""
    from tqdm.auto import tqdm
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        bar: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            hidden = not state.is_world_process_zero
            self.bar = tqdm(total=state.max_steps, desc="recovery", unit="step", leave=False, delay=1, disable=hidden)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" not in (logs or {}):
                return
            self.bar.update(state.global_step - self.bar.n)
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
            control.should_training_stop |= not math.isfinite(logs["loss"])

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            this_process().wait_for_everyone()  # each has written its own random state
            if state.is_world_process_zero:
                made = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                record([path for path in made.iterdir() if path.is_file()], made / RECORD)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.close()

    return Progress()


def log_of(model: nn.Module, tokens: Tensor, method: TrainingSettings, logs: list[dict[str, float]]) -> RecoveryLog:
    """The log of a training, from the Trainer's entries, one for each step and one at the end.

    Raises:
        PrunekitError: a loss is not finite.
    """
    logs = [entry for entry in logs if "loss" in entry]
    losses = tuple(float(entry["loss"]) for entry in logs)
    if not losses or not all(map(math.isfinite, losses)):
        raise PrunekitError(
            f"the loss was not finite at step {len(losses)}: learning_rate={method.learning_rate} is too high, "
            "or the model's precision too low"
        )
    rates = tuple(float(entry["learning_rate"]) for entry in logs)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return RecoveryLog(losses, rates, tokens.numel(), trainable, repr(method))
