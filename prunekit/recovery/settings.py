"""Training settings that all recovery methods share, and full fine-tuning, which adds none."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from prunekit.checks import Count, Epochs, Length, NotNegative, Positive, Seed, check_fields
from prunekit.errors import PrunekitError, warn
from prunekit.processes import evenly

_FULL_BATCH = 8
_STEPS_AN_EPOCH = 32  # eight paper-sized steps change nothing in a small model; a hundred of this size do


class TrainingSettings:
    """Interface of training settings. Each method is a dataclass with these fields and its own defaults."""

    learning_rate: float
    batch_size: int | None
    epochs: float
    max_steps: int | None
    warmup: float
    seq_len: int
    seed: int
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)

    def windows_a_step(self, n_windows: int) -> int:
        """Windows in one optimiser step over `n_windows` of data."""
        fitting = max(1, min(_FULL_BATCH, n_windows // _STEPS_AN_EPOCH))
        return fitting if self.batch_size is None else min(self.batch_size, n_windows)

    def n_steps(self, n_windows: int) -> int:
        """Optimiser steps over `n_windows` of data."""
        taken = evenly(self.windows_a_step(n_windows))
        return self.max_steps or max(1, math.ceil(self.epochs * math.ceil(n_windows / taken)))

    @property
    def most_windows(self) -> int | None:
        """Windows that `max_steps` steps read at most; None where epochs decide."""
        return self.max_steps and self.max_steps * self.windows_a_step(_STEPS_AN_EPOCH * _FULL_BATCH)

    def unheeded(self, n_windows: int) -> list[str]:
        """Remarks on settings that cannot be followed with so few windows."""
        steps, remarks = self.n_steps(n_windows), []
        if self.batch_size is not None and self.batch_size > n_windows:
            remarks.append(f"batch_size={self.batch_size}, but there are {n_windows} windows: a step takes all of them")
        if self.warmup >= max(steps, 1):
            remarks.append(
                f"warmup={self.warmup:g} steps, but the training has {steps}: the learning rate does not reach "
                f"{self.learning_rate:g}"
            )
        return remarks


@dataclass(frozen=True)
class FullTuning(TrainingSettings):
    """Settings of full fine-tuning with AdamW; `LoRA` needs far less memory.

    Beside the weights it takes three more numbers for each of them: its gradient, and AdamW's two means.

    Attributes:
        learning_rate: peak, reached after warm-up and then falling linearly to 0.
        batch_size: windows an optimiser step; None takes 8, or fewer where the data would give less than 32
            steps an epoch.
        epochs: passes over the data.
        max_steps: stop after this many optimiser steps, and repeat the data to get there; by default `epochs` say it.
        warmup: optimiser steps of warm-up (1 or more), or their share of all steps (below 1).
        seq_len: tokens a window, where the data is text.
        weight_decay: of AdamW, on matrices; norms and biases have none.
        seed: of dropout and of the order of the data.

    Raises:
        PrunekitError: a value that cannot be.
    """

    learning_rate: Positive = 1e-4
    batch_size: Count | None = None
    epochs: Epochs = 2
    max_steps: Count | None = None
    warmup: NotNegative = 0.05
    seq_len: Length = 128
    weight_decay: NotNegative = 0.0
    seed: Seed = 0


def train_all(model: nn.Module) -> None:
    """Make every parameter trainable.

    Raises:
        PrunekitError: one that cannot be: no floating-point number, or float16, whose squared gradients vanish.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float64, torch.float32, torch.bfloat16):
            raise PrunekitError(
                f"{name} is {parameter.dtype}, which full fine-tuning cannot train; load the model with "
                "dtype='float32', or give a LoRA, such as LoRA(r=8), whose pairs are float32"
            )
    if any(p.dtype == torch.bfloat16 for p in model.parameters()):
        warn(
            "the weights are bfloat16: a step of less than 1/512 of a weight is rounded away; load the model with "
            "dtype='float32' to train it fully"
        )
    model.requires_grad_(True)
