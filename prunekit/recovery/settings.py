"""Training settings that all recovery methods share: learning rate, batch, length."""

import math

from prunekit.checks import check_fields

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
        return self.max_steps or max(1, math.ceil(self.epochs * math.ceil(n_windows / self.windows_a_step(n_windows))))

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
