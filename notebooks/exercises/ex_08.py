"""Exercise of notebook 08: one half-space step of a unit that is on its way to zero."""

from collections.abc import Callable

import torch
from exercises.answers import forgiving, tensors
from torch import Tensor

Step = Callable[[Tensor, Tensor, int], Tensor]

X = torch.tensor([3.0, 4.0], dtype=torch.float64)
ASIDE = torch.tensor([0.8, -0.6], dtype=torch.float64)  # at a right angle to X
ALONG = torch.tensor([0.6, 0.8], dtype=torch.float64)  # of length 1, along X
AGAINST = -2 * X


def stub_half_space_step(x: Tensor, update: Tensor, remaining: int) -> Tensor:
    """What the notebook starts from: it shrinks, but takes no update and has no half-space."""
    return x - x / remaining


def solution_half_space_step(x: Tensor, update: Tensor, remaining: int) -> Tensor:
    """x̃ = x + update − λ·x/‖x‖ with λ = (x + update)·x / (‖x‖·remaining), and 0 where x̃·x ≤ 0."""
    norm = x.norm()
    length = (x + update) @ x / (norm * remaining)
    trial = x + update - length * x / norm
    return trial if trial @ x > 0 and remaining > 1 else torch.zeros_like(x)


@forgiving(tensors)
def check_half_space_step(step: Step) -> str:
    """`✓ …` where the answer is right, or else a hint at the first thing that is not."""
    x = X.clone()
    found = step(x, torch.zeros(2, dtype=torch.float64), 5)
    if not isinstance(found, Tensor) or found.shape != X.shape:
        return f"Your function returns {found}: return the unit after the step, a tensor as long as x."
    if not torch.equal(x, X):
        return "The x that you were given has changed: return a new tensor, x is still needed for the half-space."
    if not torch.allclose(found, 0.8 * X):
        return f"Without an update, and with 5 steps to go, (3, 4) becomes (2.4, 3.2); yours is {_show(found)}."
    return _check_update(step)


def _check_update(step: Step) -> str:
    found = step(X, ASIDE, 5)
    if torch.allclose(found, 0.8 * X):
        return "The update is missing: x̃ starts from x + update, so that the unit keeps what training has just learned."
    if not torch.allclose(found, 0.8 * X + ASIDE):
        return f"With the update (0.8, -0.6) it becomes (3.2, 2.6); yours is {_show(found)}: shorten along x only."
    found, wanted = step(X, ALONG, 5), 0.8 * (X + ALONG)
    if not torch.allclose(found, wanted):
        return (
            "With the update (0.6, 0.8), which lengthens x from 5 to 6, a fifth of 6 goes, which leaves "
            f"{_show(wanted)}; yours is {_show(found)}: λ is a part of (x + update)·x / ‖x‖, the length along x."
        )
    return _check_half_space(step)


def _check_half_space(step: Step) -> str:
    found = step(X, AGAINST, 5)
    if bool(found.any()):
        return f"The update (-6, -8) turns x round: x̃·x is negative, so the unit falls on 0; yours is {_show(found)}."
    found = step(X, ASIDE, 1)
    if bool(found.any()):
        return (
            f"In the last step (remaining = 1) x̃·x is 0, and the unit is to fall on 0; yours is {_show(found)}. "
            "Behind the half-space means x̃·x ≤ 0, and rounding may leave it slightly above: ask for remaining == 1 too."
        )
    return "✓ Right: the unit takes its update, loses a part of its length, and the half-space makes the zero exact."


def _show(x: Tensor) -> str:
    return "(" + ", ".join(f"{value:.3g}" for value in x.tolist()) + ")"
