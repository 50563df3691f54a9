"""Exercise of notebook 12: what the heads that a score puts last really cost."""

from collections.abc import Callable, Sequence

from exercises.answers import forgiving

RealCost = Callable[[Sequence[float], Sequence[float], int], float]

SCORES, LOSSES = [3.0, 1.0, 2.0, 0.0], [0.5, 2.0, 0.1, 0.3]


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
    for value, hint in hints.items():
        if isinstance(got, (int, float)) and abs(got - value) < 1e-6:
            return hint
    return (
        f"For scores {SCORES}, losses {LOSSES} and k=2 you have {got!r}. Which two heads have the lowest scores, and "
        "what does each of them cost?"
    )
