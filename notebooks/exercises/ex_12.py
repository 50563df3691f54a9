"""Exercises of notebook 12: who writes an activation, what the lowest scores cost, and how much of a gap is closed."""

import math
from collections.abc import Callable, Sequence

import torch
from exercises.answers import forgiving, hint_for, tensors
from torch import Tensor

Written = Callable[[Tensor, Tensor, int], Tensor]
RealCost = Callable[[Sequence[float], Sequence[float], int], float]
GapClosed = Callable[[float, float, float, float], float]

ACTIVATIONS = torch.tensor([2.0, -1.0, 4.0])
DOWN = torch.tensor([[1.0, 2.0, 1.0], [3.0, -2.0, 0.5]])  # channel 1: 6 + 2 + 2 = 10
SCORES, LOSSES = [3.0, 1.0, 2.0, 0.0], [0.5, 2.0, 0.1, 0.3]


def stub_written_shares(activations: Tensor, down: Tensor, channel: int) -> Tensor:
    """What the notebook starts from: shares of the activations."""
    return activations / activations.sum()


def solution_written_shares(activations: Tensor, down: Tensor, channel: int) -> Tensor:
    """What each unit adds to this channel, over the sum of all."""
    written = activations * down[channel]
    return written / written.sum()


@forgiving(tensors)
def check_written_shares(answer: Written) -> str:
    """`✓ …` where the answer is right, or else a hint at the mistake."""
    found = answer(ACTIVATIONS.clone(), DOWN.clone(), 1)
    if found.shape != (3,):
        return f"The result has shape {tuple(found.shape)}: one share for each of the 3 units."
    wrong = {
        "✓ Right: what a unit writes is its activation times its weight to this channel.": [0.6, 0.2, 0.2],
        "These are shares of the activations. A large activation with a small weight writes little.": [0.4, -0.2, 0.8],
        "These are the numbers that the units add. Divide by their sum.": [6.0, 2.0, 2.0],
        "These are shares of the weights. The units' activations count, too.": [2.0, -4 / 3, 1 / 3],
        "This is another channel of the residual stream: take row `channel` of `down`.": [0.5, -0.5, 1.0],
        "You divide by the largest. Shares are of the sum.": [1.0, 1 / 3, 1 / 3],
    }
    for hint, value in wrong.items():
        if torch.allclose(found.double(), torch.tensor(value, dtype=torch.float64), atol=1e-6):
            return _check_signs(answer) or hint if hint.startswith("✓") else hint
    return f"Activations [2, -1, 4] meet the weights [3, -2, 0.5] of channel 1; your shares are {found.tolist()}."


def _check_signs(answer: Written) -> str:
    found = answer(ACTIVATIONS.clone(), torch.tensor([[3.0, 2.0, 0.5], [0.0, 0.0, 1.0]]), 0)  # 6 - 2 + 2
    if not torch.allclose(found.double(), torch.tensor([1.0, -1 / 3, 1 / 3], dtype=torch.float64), atol=1e-6):
        return "Right where all units add. A unit that subtracts has a negative share: no absolute values."
    return ""


def stub_real_cost(scores: Sequence[float], losses: Sequence[float], k: int) -> float:
    """What the notebook starts from."""
    return sum(sorted(losses)[:k])


def solution_real_cost(scores: Sequence[float], losses: Sequence[float], k: int) -> float:
    """The heads in the order of their scores; the measured losses of the first k, added up."""
    order = sorted(range(len(scores)), key=lambda head: scores[head])
    return sum(losses[head] for head in order[:k])


@forgiving()
def check_real_cost(real_cost: RealCost) -> str:
    """`✓ …` where the answer is right, or else a hint at the mistake."""
    got = real_cost(list(SCORES), list(LOSSES), 2)
    hints = {
        2.3: "✓ Right: heads 3 and 1 have the lowest scores, and removing them costs 0.3 and 2.0 nats.",
        0.4: "These are the two smallest losses. A pruner does not know the losses: it goes by the scores.",
        0.6: "These are the two heads with the highest scores. A pruner removes the lowest.",
        1.0: "You added up scores. The question is what the removal really costs.",
        1.15: "That is the mean. Add the losses up.",
        2.9: "These are all heads. Only the k with the lowest scores go.",
    }
    return hint_for(
        got,
        hints,
        f"For scores {SCORES}, losses {LOSSES} and k=2 you have {got!r}. Which two heads have the lowest scores, and "
        "what does each of them cost?",
    )


def stub_gap_closed(uncut_before: float, cut_before: float, uncut_after: float, cut_after: float) -> float:
    """What the notebook starts from: it compares the trained model with an untrained one."""
    return (cut_before - cut_after) / (cut_before - uncut_before)


def solution_gap_closed(uncut_before: float, cut_before: float, uncut_after: float, cut_after: float) -> float:
    """One less the gap after training over the gap before, in nats."""
    return 1 - math.log(cut_after / uncut_after) / math.log(cut_before / uncut_before)


@forgiving()
def check_gap_closed(answer: GapClosed) -> str:
    """`✓ …` where the answer is right, or else a hint at the mistake."""
    got = answer(10.0, 40.0, 8.0, 16.0)  # gaps: log 4 and log 2
    return hint_for(
        got,
        {
            0.5: "✓ Right: the cut model was four times as high, and is twice as high: half of the gap, in nats.",
            0.8: "You compare with the uncut model *before* training. It was trained too, and is better now.",
            1 - 8 / 30: "Perplexities are not added and subtracted: take their logarithms, which are losses in nats.",
            8
            / 30: "This is the part of the gap that is left, and in perplexities. Take logarithms, and what is closed.",
            math.log(40 / 16)
            / math.log(4): "The logarithms are right. But compare with the uncut model of the same moment: "
            "8 after training, not 10.",
            math.log(2): "This is the gap that was closed, in nats. Which share is it of the gap before?",
            1 - 1 / 3: "You compare ratios less one. Take logarithms: in nats, ratios are differences.",
            2.0: "This is a ratio of gaps, or of the last two perplexities. Return the share that was closed.",
        },
        f"For perplexities 10 and 40 before, 8 and 16 after you have {got!r}. The gaps are log(40/10) and log(16/8).",
    )
