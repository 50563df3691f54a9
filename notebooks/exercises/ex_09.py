"""Exercise of notebook 09: Wanda for patterns, so many weights kept of every few along a row."""

from collections.abc import Callable

import torch
from exercises.answers import forgiving, tensors
from torch import Tensor

Pruner = Callable[[Tensor, Tensor, int, int], Tensor]

WEIGHT = torch.tensor(
    [
        [4.0, -3.0, 2.0, 1.0, 1.0, 2.0, 3.0, -4.0],
        [-1.0, 2.0, 3.0, -4.0, 4.0, 3.0, -2.0, 1.0],
        [8.0, 7.0, 6.0, 5.0, 4.5, 3.5, 2.5, 1.5],
        [1.0, -1.5, 2.5, 3.5, 5.0, -6.0, 7.0, 8.0],
    ]
)
LIKE = torch.ones(8)  # inputs of one size
SQUARES = torch.tensor([1.0, 4.0, 1.0, 9.0, 1.0, 1.0, 4.0, 1.0])


def stub_wanda_pattern(weight: Tensor, squares: Tensor, kept: int, of: int) -> Tensor:
    """What the notebook starts from: runs down a column, zeros where weights should stay, inputs not used."""
    runs = weight.abs().unflatten(0, (-1, of))
    lowest = runs.topk(kept, dim=1, largest=False).indices
    return weight.masked_fill(torch.zeros_like(runs, dtype=torch.bool).scatter(1, lowest, True).flatten(0, 1), 0)


def solution_wanda_pattern(weight: Tensor, squares: Tensor, kept: int, of: int) -> Tensor:
    """|w|·√squares in runs along each row, of which the of − kept lowest go."""
    runs = (weight.abs() * squares.sqrt()).unflatten(1, (-1, of))
    lowest = runs.topk(of - kept, dim=2, largest=False).indices
    return weight.masked_fill(torch.zeros_like(runs, dtype=torch.bool).scatter(2, lowest, True).flatten(1, 2), 0)


@forgiving(tensors)
def check_wanda_pattern(prune: Pruner) -> str:
    """`✓ …` where the answer is right, or else a hint at the first thing that is not."""
    weight = WEIGHT.clone()
    found = prune(weight, LIKE, 2, 4)
    if not isinstance(found, Tensor) or found.shape != WEIGHT.shape:
        return "Return the pruned matrix, in the shape of the weight: here (4, 8)."
    if not torch.equal(weight, WEIGHT):
        return "The weight that you were given has changed: return a new matrix, such as masked_fill makes."
    if bool(((found != 0) & (found != WEIGHT)).any()):
        return "Weights that stay have changed; Wanda moves none, that is SparseGPT's idea."
    return _check_runs(prune, found)


def _check_runs(prune: Pruner, found: Tensor) -> str:
    """Where runs lie, and how many weights of each stay."""
    stays = _stays(found, 4)
    if not bool((stays == 2).all()):
        row, run = (stays != 2).nonzero()[0].tolist()
        return (
            f"Row {row}, columns {4 * run} to {4 * run + 3}: {int(stays[row, run])} weights stay, 2 are asked for. "
            "Runs lie along a row: unflatten dimension 1 of (out, in), and choose inside each run."
        )
    stays = _stays(prune(WEIGHT, LIKE, 1, 4), 4)
    if bool((stays == 3).all()):
        return "(kept, of) = (1, 4) keeps one of every four; you keep three: how many are the lowest that go?"
    if not bool((stays == 1).all()) or not bool((_stays(prune(WEIGHT, LIKE, 5, 8), 8) == 5).all()):
        return "Two of every four are right, but not one of four, or five of eight: use both numbers, kept and of."
    return _check_scores(prune)


def _check_scores(prune: Pruner) -> str:
    """Which weights stay."""
    if not torch.equal(prune(WEIGHT, LIKE, 2, 4), solution_wanda_pattern(WEIGHT, LIKE, 2, 4)):
        return "With inputs all alike, the weights that are largest without their signs stay; yours are others."
    found = prune(WEIGHT, SQUARES, 2, 4)
    if torch.equal(found, solution_wanda_pattern(WEIGHT, LIKE, 2, 4)):
        return "Your zeros are the same whatever the inputs are: squares is not used, so this is magnitude."
    if torch.equal(found, solution_wanda_pattern(WEIGHT, SQUARES.square(), 2, 4)):
        return "The score is |w| times the *norm* of the input; squares holds sums of squares: take the root."
    if not torch.equal(found, solution_wanda_pattern(WEIGHT, SQUARES, 2, 4)):
        return "The runs are right, and the scores are not: |w| times the root of squares, each column with its own."
    return "✓ Right: this is Wanda's score in a pattern that hardware supports."


def _stays(pruned: Tensor, of: int) -> Tensor:
    return (pruned != 0).unflatten(1, (-1, of)).sum(2)
