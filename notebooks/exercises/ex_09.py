"""Exercises of notebook 09: when a list of weights saves memory, the cheapest zero, and Wanda for patterns."""

from collections.abc import Callable

import torch
from exercises.answers import forgiving, hint_for, tensors
from torch import Tensor

BreakEven = Callable[[int, int], float]
Cheapest = Callable[[Tensor, Tensor], int]
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


ROW = torch.tensor([-3.5, 1.0, 3.0, 2.0], dtype=torch.float64)
# Input 2 can be predicted from input 3, so weight 2 is the cheapest once the others may move; inputs 0 and 1 are alone.
INPUTS = torch.tensor(
    [[1.0, 0, 0, 0], [0, 16.0, 0, 0], [0, 0, 4.0, 3.99], [0, 0, 3.99, 4.0]],
    dtype=torch.float64,
)


def stub_break_even(bits: int, index_bits: int) -> float:
    """What the notebook starts from: as if places needed no memory."""
    return 0.0


def solution_break_even(bits: int, index_bits: int) -> float:
    """(1 - s)·(bits + index_bits) = bits, solved for s."""
    return index_bits / (bits + index_bits)


@forgiving()
def check_break_even(answer: BreakEven) -> str:
    """`✓ …` where the answer is right, or else a hint at the mistake."""
    return hint_for(
        answer(16, 48),
        {
            0.75: "✓ Right: below this share of zeros, the list of places takes more than the zeros that are left out.",
            0.25: "This is the share of weights that stay. The share of *zeros* is asked for.",
            3.0: "This is the ratio of the two sizes. Solve (1 - s) · (bits + index_bits) = bits for s.",
            1 / 3: "You compare the two sizes only. A weight that stays costs both: its value and its place.",
            2 / 3: "You compare the two sizes only. A weight that stays costs both: its value and its place.",
            0.0: "Each weight in the list needs its place, too. With few zeros the list is larger than the matrix.",
            0.5: "This is right where a place needs as many bits as a value. Here it needs more.",
            64.0: "This is what one weight in the list needs. From which share of zeros on is the list smaller?",
        },
        "With 16 bits a value and 48 a place, 25 of 100 weights need 25 · 64 bits in the list, and 100 · 16 in the "
        "matrix. The two are equal there.",
    )


def stub_cheapest_zero(row: Tensor, h: Tensor) -> int:
    """What the notebook starts from: the smallest weight."""
    return int(row.abs().argmin())


def solution_cheapest_zero(row: Tensor, h: Tensor) -> int:
    """The weight with the least w² over its element on the diagonal of the inverse."""
    return int((row.square() / torch.linalg.inv(h).diagonal()).argmin())


@forgiving()
def check_cheapest_zero(answer: Cheapest) -> str:
    """`✓ …` where the answer is right, or else a hint at the mistake."""
    got = answer(ROW.clone(), INPUTS.clone())
    told = hint_for(
        got,
        {
            3: "",
            1: "This is the smallest weight, or you multiply by the inverse. No other input replaces its own.",
            0: "This is the cheapest if nothing else moves. The others may move: the inverse of H counts.",
            2: "You found an input that another one can replace. A smaller weight has this property, too: w² counts.",
        },
        f"Return the number of one weight, 0 to 3. You have {got!r}.",
    )
    if told:
        return told
    if answer(torch.tensor([1.0, 3.0], dtype=torch.float64), torch.tensor([[2.0, 1.9], [1.9, 40.0]]).double()) != 0:
        return "Right for one row. For w = [1, 3], H = [[2, 1.9], [1.9, 40]] weight 0 is cheapest: w² over the inverse."
    alone = torch.tensor([[1.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    if answer(torch.tensor([2.0, 1.0], dtype=torch.float64), alone) != 1:
        return "Square the weight: for w = [2, 1] and H = diag(1, 3) the costs are 4 / 1 and 1 / (1/3) = 3."
    return "✓ Right: it is cheap to remove a weight whose input the other inputs can predict."


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
