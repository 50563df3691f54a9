"""Full fine-tuning: trains every parameter."""

from dataclasses import dataclass

import torch
from torch import nn

from prunekit.checks import Count, Epochs, Length, NotNegative, Positive, Seed
from prunekit.errors import PrunekitError, warn
from prunekit.recovery.settings import TrainingSettings


@dataclass(frozen=True)
class FullTuning(TrainingSettings):
    """Settings of full fine-tuning with AdamW; `LoRA` needs far less memory.

    Beside the weights it takes three more numbers for each of them: its gradient, and AdamW's two means.

    Attributes:
        learning_rate: peak, reached after warm-up and then falling linearly to 0.
        batch_size: windows an optimiser step; None takes 8, or fewer where the data would give less than 32
            steps an epoch.
        epochs: passes over the data.
        max_steps: stop after this many optimiser steps, and repeat the data to get there; None goes by `epochs`.
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
