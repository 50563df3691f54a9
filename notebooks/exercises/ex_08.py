"""Exercises of notebook 08: a unit's part of LoRA's update, one half-space step, and the size of a patch."""

import math
from collections.abc import Callable

import torch
from exercises.answers import forgiving, tensors
from torch import Tensor

Update = Callable[[Tensor, Tensor, float, int, int], Tensor]
Step = Callable[[Tensor, Tensor, int], Tensor]
Patch = Callable[[float, float, float, float], float]

X = torch.tensor([3.0, 4.0], dtype=torch.float64)
ASIDE = torch.tensor([0.8, -0.6], dtype=torch.float64)  # at a right angle to X
ALONG = torch.tensor([0.6, 0.8], dtype=torch.float64)  # of length 1, along X
AGAINST = -2 * X


def stub_update_of_unit(a: Tensor, b: Tensor, scale: float, dim: int, index: int) -> Tensor:
    """What the notebook starts from: the update of all units."""
    return scale * b @ a


def solution_update_of_unit(a: Tensor, b: Tensor, scale: float, dim: int, index: int) -> Tensor:
    """A row takes its row of B and all of A, a column all of B and its column of A."""
    return scale * (b[index] @ a if dim == 0 else b @ a[:, index])


@forgiving(tensors)
def check_update_of_unit(update_of_unit: Update) -> str:
    """`✓ …` where the answer is right, or else a hint at the first thing that is not."""
    a = torch.tensor([[1.0, 2.0, 0.0, 3.0], [0.0, 1.0, 5.0, 1.0]])  # (rank, inputs)
    b = torch.tensor([[1.0, 2.0], [3.0, 1.0], [0.0, 4.0]])  # (outputs, rank)
    for dim, index, what in ((0, 1, "row 1"), (1, 2, "column 2")):
        found, right = (f(a, b, 2.0, dim, index) for f in (update_of_unit, solution_update_of_unit))
        if found.shape == (3, 4):
            return f"This is the update of all of W; return that of one unit, here of {what}: {len(right)} numbers."
        if found.shape != right.shape:
            return (
                f"The update of {what} (dim={dim}) has the shape {tuple(right.shape)}, and yours is "
                f"{tuple(found.shape)}. A row needs one row of B and all of A, a column all of B and one column of A."
            )
        if torch.allclose(2 * found, right):
            return f"γ is missing: for {what}, each number is half of what it should be, and γ is 2 here."
        if not torch.allclose(found, right):
            return f"The update of {what} is {_show(right)}; yours is {_show(found)}: it is that part of γBA."
    return "✓ Right: a row of B or a column of A belongs to the unit; the rank, in between, belongs to no unit."


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


def stub_patch(gone_before: float, gone_after: float, back_before: float, back_after: float) -> float:
    """What the notebook starts from: what training gains with the units missing, in perplexity."""
    return gone_before - gone_after


def solution_patch(gone_before: float, gone_after: float, back_before: float, back_after: float) -> float:
    """The gain of the loss with the units missing, minus the gain with them back, in nats."""
    return math.log(gone_before / gone_after) - math.log(back_before / back_after)


@forgiving()
def check_patch(patch: Patch) -> str:
    """`✓ …` where the answer is right, or else a hint at the first thing that is not."""
    given = (8.0, 4.0, 3.0, 3.5)  # training halves the perplexity with the units missing, and harms with them back
    found, right = float(patch(*given)), solution_patch(*given)
    if abs(found - right) < 1e-6:
        return "✓ Right: a gain of the loss, in nats per token, that is there only while the units are missing."
    gone, back = math.log(8.0 / 4.0), math.log(3.0 / 3.5)
    wrong = {
        "these are perplexities: take their logarithms, which are losses": (4.0, 4.5, 3.5, 2 - 3 / 3.5),
        "this is the gain with the units missing; subtract the gain with the units back": (gone,),
        "this is the gain with the units back; it must be subtracted from the gain with the units missing": (back,),
        "the sign is turned round: a gain is the loss before minus the loss after": (-right, -gone),
        "with the units back the loss rises, so the gain there is negative; subtract it, do not add it": (gone + back,),
    }
    hints = [hint for hint, values in wrong.items() if any(abs(found - value) < 1e-6 for value in values)]
    hint = hints[0] if hints else "(gain with the units missing) − (gain with the units back), each of log-perplexity"
    return f"The patch is worth {right:.3f} nats here; yours is {found:.3f}: {hint}."


def _show(x: Tensor) -> str:
    return "(" + ", ".join(f"{value:.3g}" for value in x.tolist()) + ")"
