"""Gram matrices of activations, stored as their lower half."""

import torch
from torch import Tensor

_COLUMNS = 512  # columns of a Gram matrix summed at once, from the diagonal down


def add_to_gram(total: Tensor, x: Tensor) -> None:
    """Add Σxxᵀ to the lower half of a Gram matrix; the upper half is not updated.

    Args:
        total: (width, width), changed in place.
        x: (n_tokens, width).
    """
    for start in range(0, len(total), _COLUMNS):
        total[start:, start : start + _COLUMNS].addmm_(x[:, start:].T, x[:, start : start + _COLUMNS])


def complete_gram(total: Tensor) -> Tensor:
    """Fill a Gram matrix from its lower half, in place."""
    for start in range(0, len(total), _COLUMNS):
        end = start + _COLUMNS
        total[start:end, end:] = total[end:, start:end].T
        block = total[start:end, start:end]
        block.copy_(torch.tril(block) + torch.tril(block, -1).T)
    return total
