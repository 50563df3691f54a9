"""Exercises of notebook 04: when LoRA is small, how far a warm-up gets, and the nearest change of low rank."""

import math
from collections.abc import Callable

import torch
from exercises.answers import forgiving, hint_for, tensors
from torch import Tensor

LargestRank = Callable[[int, int], int]
Peak = Callable[[int, int, int, int, float], float]
OfRank = Callable[[Tensor, int], Tensor]


def stub_largest_rank(d_in: int, d_out: int) -> int:
    """What the notebook starts from: the largest rank that a matrix can have."""
    return min(d_in, d_out)


def solution_largest_rank(d_in: int, d_out: int) -> int:
    """The largest r with r·(in + out) < in·out."""
    return math.ceil(d_in * d_out / (d_in + d_out)) - 1


@forgiving()
def check_largest_rank(answer: LargestRank) -> str:
    """`✓ …` where the answer is right, or else a hint at the mistake."""
    got = answer(60, 20)  # 1200 / 80 = 15: rank 15 has as many numbers
    told = hint_for(
        got,
        {
            14: "",
            15: "With r = 15 the adapter has exactly as many numbers as the matrix. Fewer are asked for.",
            20: "20 is the largest rank that this matrix can have. Count: A has r·in numbers, B has r·out.",
            60: "60 is more than the rank of any 20 × 60 matrix. Count: A has r·in numbers, B has r·out.",
            19: "This takes the smaller side, less one. Count: A has r·in numbers, B has r·out.",
            29: "You counted in + out as if only one side mattered: A has r·in numbers, B has r·out.",
            1200: "This is the number of weights of the matrix. Divide by what one rank costs: in + out.",
            80: "This is what one rank costs, in + out. How many of these are less than in·out = 1200?",
        },
        f"For 60 inputs and 20 outputs you have {got!r}. One rank costs 60 + 20 numbers, the matrix has 1200.",
    )
    if told:
        return told
    if answer(64, 64) != 31:
        return "60 × 20 is right. At 64 × 64, r = 32 has as many numbers as the matrix, so the answer is 31."
    if answer(10, 7) != 4:
        return (
            "At 10 × 7, r = 4 has 68 numbers and the matrix 70, so 4 is still smaller: round down, and only then ask."
        )
    return "✓ Right: r·(in + out) < in·out. For a square matrix the limit is half of the side; for a long one, more."


def stub_peak_rate(n_windows: int, batch_size: int, epochs: int, warmup: int, rate: float) -> float:
    """What the notebook starts from: the rate in the settings."""
    return rate


def solution_peak_rate(n_windows: int, batch_size: int, epochs: int, warmup: int, rate: float) -> float:
    """The part of the warm-up that training gets to, times the rate."""
    steps = epochs * math.ceil(n_windows / batch_size)
    return rate * min(1.0, (steps - 1) / warmup)


@forgiving()
def check_peak_rate(answer: Peak) -> str:
    """`✓ …` where the answer is right, or else a hint at the mistake."""
    got = answer(100, 40, 5, 50, 1.0)
    told = hint_for(
        got,
        {
            0.28: "",
            0.3: "The first step has rate 0, so the last of 15 steps has 14 parts of the rise.",
            1.0: "The full rate is reached only after the warm-up, and training has fewer steps than that.",
            0.04: "This is one epoch: all windows are read `epochs` times.",
            0.06: "This is one epoch: all windows are read `epochs` times. And the first step has rate 0.",
            0.23: "The last batch of an epoch may be smaller, but it is a step too: round the batches up.",
            0.25: "The last batch of an epoch may be smaller, but it is a step too: round the batches up.",
            0.18: "You round the batches down. The last, smaller batch of an epoch is a step too.",
            0.2: "You round the batches down. The last, smaller batch of an epoch is a step too.",
            15.0: "This is the number of steps. Which part of the warm-up is that?",
            0.24: "Each epoch begins a new batch: round up inside an epoch, then multiply.",
        },
        f"For 100 windows, batches of 40, 5 epochs, warm-up 50 and rate 1 you have {got!r}. How many steps are there?",
    )
    if told:
        return told
    if abs(answer(1000, 10, 1, 50, 1.0) - 1.0) > 1e-6:
        return "This training is longer than its warm-up. After the warm-up the rate does not rise any further."
    if abs(answer(100, 40, 5, 50, 0.5) - 0.14) > 1e-6:
        return "Half of the rate must give half of the result: multiply by `rate`."
    return "✓ Right: a warm-up of w steps needs at least w batches of data."


def stub_nearest_of_rank(change: Tensor, rank: int) -> Tensor:
    """What the notebook starts from: the first rows, which is a matrix of this rank and not the nearest."""
    near = torch.zeros_like(change)
    near[:rank] = change[:rank]
    return near


def solution_nearest_of_rank(change: Tensor, rank: int) -> Tensor:
    """The first directions of the singular value decomposition."""
    left, sizes, right = torch.linalg.svd(change, full_matrices=False)
    return (left[:, :rank] * sizes[:rank]) @ right[:rank]


@forgiving(tensors)
def check_nearest_of_rank(answer: OfRank) -> str:
    """`✓ …` where the answer is right, or else a hint at the first thing that is not."""
    change = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = change.clone()
    found = answer(given, 2)
    if not torch.equal(given, change):
        return "The matrix that you were given has changed: return a new one."
    left, sizes, right = torch.linalg.svd(change, full_matrices=False)
    if found.shape != change.shape:
        return f"The result is {tuple(found.shape)}. Multiply the parts again, to the shape {tuple(change.shape)}."
    if torch.allclose(found, change):
        return "Nothing was left out: keep only the first `rank` singular values."
    wrong = {
        "the singular values are missing between the two matrices": left[:, :2] @ right[:2],
        "the singular values are in it twice": (left[:, :2] * sizes[:2] ** 2) @ right[:2],
        "these are the smallest singular values, and the first ones are the largest": (left[:, -2:] * sizes[-2:])
        @ right[-2:],
        "this is what is left over. Return the part with the largest singular values": change
        - solution_nearest_of_rank(change, 2),
    }
    for hint, value in wrong.items():
        if torch.allclose(found, value):
            return f"The shape is right, but {hint}."
    if torch.linalg.matrix_rank(found) != 2:
        return f"The rank is {int(torch.linalg.matrix_rank(found))}, and 2 was asked for."
    if not torch.allclose(found, solution_nearest_of_rank(change, 2)):
        return "The rank is right, but another matrix of rank 2 is nearer: `torch.linalg.svd` finds the directions."
    return "✓ Right: the nearest matrix of rank r keeps the r largest singular values (Eckart and Young)."
