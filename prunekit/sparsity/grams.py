"""Sums of products of activations, of which one half says all."""

import torch
from torch import Tensor

_COLUMNS = 512  # of a Gram matrix that are summed at once, down from the diagonal


def add_to_gram(total: Tensor, x: Tensor) -> None:
    """Add Σxxᵀ to the lower half of a Gram matrix; what stands above is not kept up.

    Args:
        total: (width, width), changed in place.
        x: (n_tokens, width).
    """
    for start in range(0, len(total), _COLUMNS):
        total[start:, start : start + _COLUMNS].addmm_(x[:, start:].T, x[:, start : start + _COLUMNS])


def complete_gram(total: Tensor) -> Tensor:
    """The whole of a Gram matrix out of its lower half, in place."""
    for start in range(0, len(total), _COLUMNS):
        end = start + _COLUMNS
        total[start:end, end:] = total[end:, start:end].T
        block = total[start:end, start:end]
        block.copy_(torch.tril(block) + torch.tril(block, -1).T)
    return total
