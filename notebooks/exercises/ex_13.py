"""Exercises of notebook 13: a divergence from logits, the size of kept predictions, and a student of both goals."""

from collections.abc import Callable

import torch
from exercises.answers import forgiving, hint_for, tensors
from torch import Tensor

Divergence = Callable[[Tensor, Tensor], Tensor]
Gigabytes = Callable[[float, int], float]

BETWEEN = "between the two"
GUESSES = ("nearer to the dense model than distillation", BETWEEN, "below both in perplexity")


def stub_divergence(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """What the notebook starts from: the divergence the other way round."""
    p, q = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    return (q.exp() * (q - p)).sum(-1)


def solution_divergence(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """Σ p log(p / q), with p the teacher's."""
    p, q = teacher_logits.log_softmax(-1), student_logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@forgiving(tensors)
def check_divergence(divergence: Divergence) -> str:
    """`✓ …` where the answer is right, or else a hint at the first thing that is not."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    found = divergence(teacher, student)
    if found.shape != (3,):
        return f"For logits of shape (3, 5) the result has shape {tuple(found.shape)}; sum over the last dimension."
    if torch.allclose(found, solution_divergence(teacher, student)):
        return "✓ Right: the teacher's probability says how much each token counts."
    if torch.allclose(found, stub_divergence(teacher, student)):
        return "This is KL(student ‖ teacher): the weights in the sum must be the teacher's probabilities."
    if torch.allclose(found, -solution_divergence(teacher, student)):
        return "The sign is turned round: a divergence is never negative. It is log p − log q, in this order."
    if torch.allclose(found, (teacher.softmax(-1) * (teacher - student)).sum(-1)):
        return "Logits are not log-probabilities yet: use log_softmax on both first."
    return "Start with log p and log q by log_softmax(-1); then sum p · (log p − log q) over the last dimension."


def stub_gigabytes(n_tokens: float, top_k: int) -> float:
    """What the notebook starts from: one token at every place."""
    return 8 * n_tokens / 1e9


def solution_gigabytes(n_tokens: float, top_k: int) -> float:
    """8 bytes for each kept token of each place."""
    return 8 * top_k * n_tokens / 1e9


@forgiving()
def check_gigabytes(gigabytes: Gigabytes) -> str:
    """`✓ …` where the answer is right, or else a hint at the first thing that is not."""
    value = float(gigabytes(1e6, 32))
    hints = {
        0.256: "✓ Right: bytes grow with the number of places and with the tokens kept at each.",
        0.008: "Every place keeps top_k tokens, not one.",
        0.128: "Each kept token has an id of 4 bytes and a log-probability of 4 bytes.",
        256.0: "That is megabytes: divide by 1e9.",
        2.56e8: "That is bytes: divide by 1e9.",
        2.048: "8 is the number of bytes already; no bits are asked for.",
    }
    return hint_for(value, hints, f"For a million tokens and top_k=32 you get {value:g}: 8 bytes · top_k · places.")


def stub_guess() -> str:
    """What the notebook starts from."""
    return GUESSES[0]


def solution_guess() -> str:
    """Half of each loss leads between the two students, in both measures."""
    return BETWEEN


@forgiving()
def check_guess(guess: Callable[[], str]) -> str:
    """`✓ …` where the guess fits what was measured, or else a hint."""
    said = guess()
    if said not in GUESSES:
        return f"{said!r} is no guess of the list: choose one of {', '.join(map(repr, GUESSES))}."
    if said == BETWEEN:
        return "✓ Right: half of each loss, and a student between the two, in perplexity and in distance."
    if said == GUESSES[0]:
        return "Look at its distance: the loss on the text pulls it away from the dense model."
    return "Look at its perplexity beside that of 'all weights on text': only half of its loss asks for that."
