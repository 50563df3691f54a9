"""What is asked of any model: its mode, its device, its size, and how many tokens it takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While open, nothing is dropped out; afterwards each module has its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies."""
    return next(model.parameters()).device


def count_parameters(model: nn.Module) -> int:
    """Parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def max_positions(model: nn.Module) -> int | None:
    """Tokens that fit into one forward pass, as the configuration says; None where it sets no limit."""
    return positions_of(model.config)


def positions_of(config: Any) -> int | None:
    """The same, of a configuration."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def fitting_length(wanted: int, config: Any) -> int:
    """Tokens a window: as many as wanted, fewer where a model of this configuration takes fewer."""
    limit = positions_of(config)
    return wanted if limit is None or limit < 2 else min(wanted, limit)
