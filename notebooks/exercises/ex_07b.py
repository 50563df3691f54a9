"""Exercises of notebook 07b: rank what an answer needs, ablate by the mean, a bootstrap interval of a difference."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from exercises.answers import forgiving, tensors
from torch import Tensor

Ranker = Callable[[float, Mapping[str, float], float], list[str]]
Averager = Callable[[Tensor, Tensor, list[int]], Tensor]
Interval = Callable[[np.ndarray, np.ndarray, int, int], tuple[float, float]]

# --- 1: rank the units ------------------------------------------------------------------------------------------------

DENSE = -0.5  # nats
WITHOUT = {"0.0": -0.5, "2.1": -7.5, "3.2": -0.1, "4.0": -2.0, "6.1": -3.0, "7.3": -1.2}


def stub_needed_units(dense: float, without: Mapping[str, float], least: float) -> list[str]:
    """What the notebook starts from: the fall has the wrong sign, and nothing is sorted."""
    return [unit for unit, value in without.items() if value - dense >= least]


def solution_needed_units(dense: float, without: Mapping[str, float], least: float) -> list[str]:
    """Units whose ablation lowers the log-probability by `least` nats or more, the largest fall first."""
    falls = {unit: dense - value for unit, value in without.items()}
    return sorted((unit for unit, fall in falls.items() if fall >= least), key=lambda unit: -falls[unit])


@forgiving()
def check_needed_units(answer: Ranker) -> str:
    """`✓ …` where the answer is right, or else a hint at the first thing that is not."""
    found = list(answer(DENSE, dict(WITHOUT), 1.0))
    every = list(answer(DENSE, dict(WITHOUT), -10.0))
    right = solution_needed_units(DENSE, WITHOUT, 1.0)
    if "2.1" not in found:
        return "Unit 2.1 is missing: the log-probability falls from -0.5 to -7.5 without it. The fall is dense − value."
    if set(found) != set(right):
        return (
            f"With at least 1 nat these units are needed: {sorted(right)}. You return {sorted(found)}: is it ≥ least?"
        )
    if found != right:
        return f"The units are right, and the order is not: the largest fall comes first, {right}; yours is {found}."
    if every != solution_needed_units(DENSE, WITHOUT, -10.0):
        return "With least = -10 every unit qualifies, 3.2 last (the answer is likelier without it); use `least`."
    return "✓ Right: the fall is dense − value, and the unit that the answer needs most comes first."


# --- 2: ablate by the mean --------------------------------------------------------------------------------------------

INPUTS = torch.arange(24.0).view(1, 4, 6)  # (batch, seq, features)
CALIBRATION = torch.tensor([[[1.0, 2, 3, 4, 5, 6], [3, 2, 1, 0, -1, -2]], [[2.0, 8, 2, 2, 2, 2], [6, 0, 6, 6, 6, 6]]])


def stub_mean_ablated(inputs: Tensor, calibration: Tensor, units: list[int]) -> Tensor:
    """What the notebook starts from: the mean is over the wrong axis, and the inputs are changed in place."""
    inputs[..., units] = calibration.mean(-1).mean()
    return inputs


def solution_mean_ablated(inputs: Tensor, calibration: Tensor, units: list[int]) -> Tensor:
    """A copy whose features `units` are, at every token, their mean over all calibration tokens."""
    mean = calibration.flatten(0, -2).mean(0)  # (features,)
    found = inputs.clone()
    found[..., units] = mean[units]
    return found


@forgiving(tensors)
def check_mean_ablated(answer: Averager) -> str:
    """`✓ …` where the answer is right, or else a hint at the first thing that is not."""
    inputs, units = INPUTS.clone(), [1, 4]
    found = answer(inputs, CALIBRATION.clone(), units)
    if not isinstance(found, Tensor) or found.shape != INPUTS.shape:
        return "Return a tensor in the shape of the inputs, (batch, seq, features): here (1, 4, 6)."
    if not torch.equal(inputs, INPUTS):
        return "The inputs that you were given have changed: work on inputs.clone(), or the model keeps the change."
    others = [0, 2, 3, 5]
    if not torch.equal(found[..., others], INPUTS[..., others]):
        return "Features that are not in `units` have changed: write only to [..., units]."
    right = solution_mean_ablated(INPUTS, CALIBRATION, units)
    if bool((found[..., units] == 0).all()):
        return "The units are zero: this is zero ablation. Put each feature's mean over the calibration tokens there."
    if not torch.allclose(found, right):
        return (
            "The mean is not right: each feature has a mean of its own, over batch and seq of the calibration set; "
            f"feature 1 has {float(right[0, 0, 1]):g}."
        )
    return "✓ Right: every token reads the same value there, so the unit says nothing about this prompt any more."


# --- 3: a bootstrap interval ------------------------------------------------------------------------------------------


def _sample(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Changes of the loss of 80 questions in two models, which go together."""
    rng = np.random.default_rng(seed)
    first = rng.normal(1.0, 3.0, 80)
    return first, first + rng.normal(0.4, 0.5, 80)


def stub_moved_interval(first: np.ndarray, second: np.ndarray, n_resamples: int, seed: int) -> tuple[float, float]:
    """What the notebook starts from: the two models are resampled apart, and the limits hold half of the samples."""
    rng = np.random.default_rng(seed)
    means = [rng.choice(second, len(second)).mean() - rng.choice(first, len(first)).mean() for _ in range(n_resamples)]
    low, high = np.quantile(means, [0.25, 0.75])
    return float(low), float(high)


def solution_moved_interval(first: np.ndarray, second: np.ndarray, n_resamples: int, seed: int) -> tuple[float, float]:
    """The 95% percentile interval of the mean paired difference: questions are resampled, with replacement."""
    rng = np.random.default_rng(seed)
    difference = second - first
    means = [rng.choice(difference, len(difference)).mean() for _ in range(n_resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


@forgiving()
def check_moved_interval(answer: Interval) -> str:
    """`✓ …` where the answer is right, or else a hint at the first thing that is not."""
    first, second = _sample(0)
    low, high = (float(end) for end in answer(first.copy(), second.copy(), 500, 0))
    width, right = high - low, 2 * 1.96 * float((second - first).std()) / len(first) ** 0.5
    apart = 2 * 1.96 * float((first.var() + second.var()) ** 0.5) / len(first) ** 0.5
    if not low < high:
        return f"You return ({low:.2f}, {high:.2f}): the lower limit comes first, and an interval has a width."
    if width < 0.02 * right:
        return "The interval has no width: draw the questions with replacement (rng.choice does), not a permutation."
    if width > 0.6 * apart or 0.3 * apart < width < 0.45 * apart:
        return (
            "The interval is far too wide: both models answer the same questions, and hard ones are hard for both. "
            "Resample the differences of the same questions, not each model apart."
        )
    middle = float((second - first).mean())
    if low > middle or high < middle:
        return f"The interval does not hold the difference itself, second − first, {middle:.2f}: which way round is it?"
    if not 0.8 * right < width < 1.25 * right:
        return f"A 95% interval leaves 2.5% on each side; yours is {width / right:.1f} times as wide as it should be."
    return "✓ Right: a paired interval. If it excludes 0, chance among these questions hardly explains the difference."
