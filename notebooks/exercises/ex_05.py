"""Exercise of notebook 05: score a multiple-choice question from its log-likelihoods."""

from collections.abc import Callable, Sequence

from exercises.answers import forgiving

Pick = Callable[[Sequence[float], Sequence[str], bool], int]


def stub_pick(log_likelihoods: Sequence[float], choices: Sequence[str], normalize: bool) -> int:
    """What the notebook starts from: it takes the lowest score, and does not normalise."""
    return min(range(len(choices)), key=lambda i: log_likelihoods[i])


def solution_pick(log_likelihoods: Sequence[float], choices: Sequence[str], normalize: bool) -> int:
    """Number of the choice with the highest score, per character without leading white space where `normalize`."""
    lengths = [len(choice.lstrip()) if normalize else 1 for choice in choices]
    scores = [value / length for value, length in zip(log_likelihoods, lengths, strict=True)]
    return scores.index(max(scores))


@forgiving()
def check_pick(pick: Pick) -> str:
    """`✓ …` where the answer is right, or else a hint at the first thing that is not."""
    if pick([-9.0, -1.0, -4.0], [" a", " b", " c"], False) == 0:
        return "You picked −9, the least likely choice: log-likelihoods are negative, and the largest is nearest to 0."
    if pick([-9.0, -1.0, -4.0], [" a", " b", " c"], False) != 1:
        return "Without normalising, the choice with log-likelihood −1 wins over −9 and −4."
    uneven = ([-6.0, -4.0], [" a long sentence", " no"])
    if pick(*uneven, False) != 1:
        return "`normalize` is False here, so length must not count: −4 beats −6."
    if pick(*uneven, True) != 0:
        return "−6 over fifteen characters is more likely *per character* than −4 over two: divide before you compare."
    if pick([-4.0, -2.9], [" ab", "      a"], True) != 0:
        return "White space in front counts as length in your answer: −4 over two letters beats −2.9 over one."
    return "✓ Right: acc takes the sums, acc_norm the sums per character."
