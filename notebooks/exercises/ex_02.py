"""Exercises of notebook 02: the Taylor score of a unit, agreement beyond chance, and the interaction of two units."""

from collections.abc import Callable

import torch
from exercises.answers import forgiving
from torch import Tensor

UnitScore = Callable[[list[Tensor], str, str], Tensor]
BeyondChance = Callable[[float, float], float]
Interaction = Callable[[float, float, float, float], float]

SLICES = ([1.0, -2.0, -3.0], [2.0, 1.0, -1.0], [-4.0, 1.0, 0.0])  # w·g of each row; vector 4, 2, 3; element 6, 4, 5


def stub_unit_score(slices: list[Tensor], granularity: str, reduction: str) -> Tensor:
    """What the notebook starts from: right for the sum of element scores."""
    return torch.stack([products.abs().sum() for products in slices]).sum()


def solution_unit_score(slices: list[Tensor], granularity: str, reduction: str) -> Tensor:
    """First each slice by its granularity, then the slices by the reduction."""
    vector = granularity == "vector"
    scores = torch.stack([part.sum().abs() if vector else part.abs().sum() for part in slices])
    return {"sum": scores.sum(), "max": scores.max(), "prod": scores.prod()}[reduction]


@forgiving()
def check_unit_score(answer: UnitScore) -> str:
    """Text that begins with ✓ where the answer is right, else a hint at the mistake."""
    cases = [(how, by) for how in ("vector", "element") for by in ("sum", "max", "prod")]
    got = {case: answer([torch.tensor(part) for part in SLICES], *case) for case in cases}
    if any(value is None for value in got.values()):
        return "Your function returns nothing for some case: begin with the score of one slice, one number each."
    if any(value < 0 for value in got.values()):
        return "A score is negative: importance has no sign; a unit that lowers the loss matters too."
    if got["vector", "sum"] == 5:
        return (
            "Here slices cancel each other: 4 and 3 came out as opposite signs. Take the absolute value of each slice."
        )
    if got["vector", "sum"] == got["element", "sum"] == 15:
        return (
            "Both granularities give 15. One takes the absolute value before the sum over a slice, the other after it."
        )
    if (got["vector", "sum"], got["element", "sum"]) == (15, 9):
        return "Both formulas are there, the wrong way round: in which of them may contributions cancel?"
    if (got["vector", "sum"], got["element", "sum"]) != (9, 15):
        return (
            f"For w·g = {SLICES} the sums are {got['vector', 'sum']:g} (vector), {got['element', 'sum']:g} (element) "
            "by your function. One slice scores |1 - 2 - 3| = 4 or 1 + 2 + 3 = 6."
        )
    if got["vector", "max"] == 9 or got["vector", "prod"] == 9:
        return "The sum is right, and the reduction is not used: `max` takes the largest slice, `prod` multiplies them."
    if got["vector", "max"] == 3 or got["element", "max"] in (3, 4):
        return (
            "Your `max` is the largest single product. Score each slice first; then take the largest of three scores."
        )
    if (got["vector", "max"], got["element", "max"]) != (4, 6):
        return f"`max` is the largest of the slices' scores 4, 2 and 3; yours is {got['vector', 'max']:g}."
    if (got["vector", "prod"], got["element", "prod"]) != (24, 120):
        return f"`prod` multiplies the slices' scores 4, 2 and 3; yours is {got['vector', 'prod']:g}."
    return "✓ Right: the granularity works inside a slice, the reduction between slices, and slices never cancel."


def stub_beyond_chance(common: float, kept: float) -> float:
    """What the notebook starts from: 0 at chance, but not 1 for the same plan."""
    return common - kept


def solution_beyond_chance(common: float, kept: float) -> float:
    """The share of the way from chance to the same plan."""
    return (common - kept) / (1 - kept)


@forgiving()
def check_beyond_chance(answer: BeyondChance) -> str:
    """Text that begins with ✓ where the answer is right, else a hint at the mistake."""
    got = answer(0.8, 0.5)
    hints = {
        0.6: "✓ Right: 80% in common, where chance gives 50%, is three fifths of the way to the same plan.",
        0.3: "This is 0 at chance, as it should be. But the same plan gets 0.5 and not 1: divide by the whole way.",
        1.6: "A ratio to chance is 1 at chance, and has another largest value for each budget. Subtract chance first.",
        0.4: "This is what is missing from the same plan, so it is 1 at chance. The scale should run the other way.",
        0.375: "You divide by what is in common. Divide by the whole way, from chance to the same plan.",
        0.8: "This does not use `kept`, which is what two random plans have in common.",
    }
    close = [hint for value, hint in hints.items() if abs(got - value) < 1e-6]
    if close[:1] == [hints[0.6]] and abs(answer(0.6, 0.7) + 1 / 3) > 1e-6:
        return (
            "At 50% kept this is right. Try another budget: with 70% kept and 60% in common it is -1/3, below chance."
        )
    return (
        close[0]
        if close
        else f"For 80% in common at 50% kept you have {got:.4g}. Chance is 50%, the same plan 100%: how far is it?"
    )


def stub_interaction(loss_dense: float, loss_a: float, loss_b: float, loss_both: float) -> float:
    """What the notebook starts from: losses where changes of the loss are meant."""
    return loss_both - loss_a - loss_b


def solution_interaction(loss_dense: float, loss_a: float, loss_b: float, loss_both: float) -> float:
    """The change without both, less the two changes without one."""
    return (loss_both - loss_dense) - (loss_a - loss_dense) - (loss_b - loss_dense)


@forgiving()
def check_interaction(answer: Interaction) -> str:
    """Text that begins with ✓ where the answer is right, else a hint at the mistake."""
    got = answer(2.0, 2.3, 2.1, 3.0)
    hints = {
        0.6: "✓ Right: alone they cost 0.3 and 0.1, together 1.0. The dense loss is subtracted once and added twice.",
        -0.6: "The sign is turned round: positive means that together they cost more than the sum.",
        -1.4: "You subtract losses. What a unit *costs* is its loss less the dense loss, for each of the three.",
        1.0: "This is what both cost together. Subtract what each costs alone.",
        0.7: "You compare with the more costly of the two alone. Compare with the sum of both.",
        -3.4: "The dense loss has the wrong sign: work out the three changes of the loss first, then combine them.",
        2.5: "You divide. The interaction is a difference, in nats.",
        0.8: "You compare with the mean of the two alone. Compare with their sum.",
    }
    close = [hint for value, hint in hints.items() if abs(got - value) < 1e-6]
    if close[:1] == [hints[0.6]] and abs(answer(2.0, 2.5, 2.5, 2.6) + 0.4) > 1e-6:
        return "The sign is lost: if one is of no use without the other, the interaction is negative. Take no |…|."
    return (
        close[0]
        if close
        else f"For losses 2.0 (dense), 2.3, 2.1 and 3.0 (both) you get {got:.4g}. Alone they cost 0.3, 0.1, both 1.0."
    )
