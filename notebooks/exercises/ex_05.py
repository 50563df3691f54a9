"""Exercises of notebook 05: a share of likelihood, the picked choice, and the error of a paired difference."""

import math
from collections.abc import Callable, Sequence

from exercises.answers import forgiving, hint_for, shown

Share = Callable[[Sequence[float], int], float]
Pick = Callable[[Sequence[float], Sequence[str], bool], int]
PairedError = Callable[[Sequence[int], Sequence[int]], float]


def stub_right_share(log_likelihoods: Sequence[float], answer: int) -> float:
    """What the notebook starts from: a share of logarithms."""
    return log_likelihoods[answer] / sum(log_likelihoods)


def solution_right_share(log_likelihoods: Sequence[float], answer: int) -> float:
    """The softmax of the log-likelihoods, with the largest subtracted first."""
    highest = max(log_likelihoods)
    likelihoods = [math.exp(value - highest) for value in log_likelihoods]
    return likelihoods[answer] / sum(likelihoods)


@forgiving()
def check_right_share(answer: Share) -> str:
    """`✓ …` where the answer is right, or else a hint at the mistake."""
    logs = [math.log(0.3), math.log(0.1), math.log(0.2)]
    got = answer(logs, 0)
    told = hint_for(
        got,
        {
            0.5: "",
            0.3: "This is the likelihood of the choice. Divide by the sum over all three choices.",
            logs[0] / sum(logs): "Logarithms have no shares: take the exponential of each first, then divide.",
            math.log(0.5): "This is the logarithm of the share. Return the share itself.",
            1.0: "You divide by the right choice or by the largest one. Divide by the sum over all choices.",
            1 / 3: "This is chance, one over the number of choices. The likelihoods should count.",
        },
        f"For likelihoods 0.3, 0.1 and 0.2 you have {shown(got)}; the share of the first is 0.3 / 0.6.",
    )
    if told:
        return told
    if not isinstance(answer(logs, 1), float) or abs(answer(logs, 1) - 1 / 6) > 1e-6:
        return "Right for choice 0. The second argument says which choice is the right one: here it is 1."
    try:
        far = answer([-1000.0, -1001.0], 0)
    except Exception:  # 0 / 0
        far = math.nan
    if not abs(far - 1 / (1 + math.exp(-1))) < 1e-3:  # float32 may be used
        return "Long choices have log-likelihoods like -1000, and exp(-1000) is 0. Subtract the largest value first."
    return "✓ Right: a softmax over the choices, safe for long ones too."


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
    if pick([-6.0, -5.0], [" extraordinarily", " a b"], True) != 0:
        return "−6 over fifteen characters beats −5 over three: count characters, not words."
    if pick([-4.0, -2.9], [" ab", "      a"], True) != 0:
        return "White space in front counts as length in your answer: −4 over two letters beats −2.9 over one."
    return "✓ Right: acc takes the sums, acc_norm the sums per character."


def stub_paired_error(hits_a: Sequence[int], hits_b: Sequence[int]) -> float:
    """What the notebook starts from: the error as if other questions had been asked."""
    n, shares = len(hits_a), [sum(hits) / len(hits) for hits in (hits_a, hits_b)]
    return math.sqrt(sum(p * (1 - p) / n for p in shares))


def solution_paired_error(hits_a: Sequence[int], hits_b: Sequence[int]) -> float:
    """The standard deviation of the differences, question by question, over the root of their number."""
    differences = [a - b for a, b in zip(hits_a, hits_b, strict=True)]
    mean = sum(differences) / len(differences)
    return math.sqrt(sum((d - mean) ** 2 for d in differences)) / len(differences)


@forgiving()
def check_paired_error(answer: PairedError) -> str:
    """`✓ …` where the answer is right, or else a hint at the mistake."""
    a, b = [1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 1]  # differences 0 0 0 1 1 0 0 -1
    got, right = answer(list(a), list(b)), solution_paired_error(a, b)
    told = hint_for(
        got,
        {
            right: "",
            right * math.sqrt(8 / 7): "",  # divided by n - 1
            stub_paired_error(
                a, b
            ): "This is the error if the models had been asked different questions. Begin with the "
            "difference of each question: 1, 0 or -1.",
            right
            * math.sqrt(8): "This is the standard deviation of a difference. The error of the mean is that over √n.",
            right
            * 8
            / math.sqrt(7): "This is the standard deviation of a difference. The error of the mean is that over √n.",
            right / math.sqrt(8): "You divided by n once too often: the error of a mean is the deviation over √n.",
            right**2: "This is the variance of the mean. Take the root.",
            0.125: "This is the difference of the two accuracies. How sure is it?",
            math.sqrt(0.125 * 0.875 / 8): "A difference can be -1, 0 or 1, so p(1-p) does not hold. Take the standard "
            "deviation.",
        },
        f"For the differences 0 0 0 1 1 0 0 -1 you have {shown(got)}: take their deviation, then divide by √8.",
    )
    if told:
        return told
    if abs(answer([1, 0, 1, 0], [1, 0, 1, 0])) > 1e-9:
        return "Two models that answer alike have no difference on any question, so its error is 0."
    return "✓ Right: only questions that the models answer differently count, so the error is often smaller."
