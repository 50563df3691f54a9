"""Exercises of notebook 14: block influence, and how many layers must go for a given time."""

import math
from collections.abc import Callable

import torch
from exercises.answers import forgiving, tensors
from torch import Tensor

BlockInfluence = Callable[[Tensor, Tensor], Tensor]
Layers = Callable[[int, float], int]


def stub_block_influence(before: Tensor, after: Tensor) -> Tensor:
    """What the notebook starts from: the cosine of two means."""
    a, b = before.mean((0, 1)), after.mean((0, 1))
    return 1 - torch.cosine_similarity(a, b, dim=-1)


def solution_block_influence(before: Tensor, after: Tensor) -> Tensor:
    """One minus the mean of the tokens' cosines."""
    return 1 - torch.cosine_similarity(before, after, dim=-1).mean()


@forgiving(tensors)
def check_block_influence(block_influence: BlockInfluence) -> str:
    """`✓ …` where the answer is right, or else a hint at the first thing that is not."""
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randn(2, 2, 3, 5, generator=generator, dtype=torch.float64)
    found = block_influence(before, after).double()
    if found.numel() != 1:
        return f"The result has shape {tuple(found.shape)}: average over all tokens, so that one number is left."
    right = solution_block_influence(before, after)
    if torch.isclose(found, right):
        return "✓ Right: each token's turn first, then the mean over tokens."
    if torch.isclose(found, 1 - right):
        return "This is the mean cosine. Influence is one minus that: 0 must mean that nothing turns."
    if torch.isclose(found, stub_block_influence(before, after)):
        return "You average the streams, then compare. Turns in opposite directions cancel so: compare token by token."
    return "For each token take cosine_similarity over the last dimension; the result is 1 minus the mean of all these."


def stub_layers_to_remove(n_layers: int, share: float) -> int:
    """What the notebook starts from: rounded to the nearest, which may be too few."""
    return round(n_layers * (1 - share))


def solution_layers_to_remove(n_layers: int, share: float) -> int:
    """Both terms are proportional to the layers that are left, so only their number counts."""
    return math.ceil(n_layers * (1 - share) - 1e-9)


@forgiving()
def check_layers_to_remove(layers_to_remove: Layers) -> str:
    """`✓ …` where the answer is right, or else a hint at the first thing that is not."""
    for n_layers, share, right in ((30, 0.5, 15), (8, 0.75, 2), (30, 0.82, 6), (8, 0.9, 1), (30, 1.0, 0)):
        found = layers_to_remove(n_layers, share)
        if found != right:
            told = f"For {n_layers} layers and a share of {share} you say {found}, and it is {right}"
            if found == right - 1:
                return f"{told}: with {found} the time is still above the share. Round up, not to the nearest."
            if found == n_layers - right:
                return f"{told}: this is the number of layers that stay."
            return f"{told}. Both terms shrink with the number of layers, (L - k) / L; solve (L - k) / L ≤ share for k."
    return "✓ Right: without embeddings, both terms fall with the layers, so the constants do not matter."
