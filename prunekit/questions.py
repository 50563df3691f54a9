"""Multiple-choice questions and tasks as plain values."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A multiple-choice question, scored by log-likelihood.

    Each choice is scored as `log p(choice | context)`. Where the choices differ on the left instead
    (WinoGrande's partial scoring), `contexts` has one context a choice and all `choices` are equal. A single choice
    (LAMBADA's last word) is right where each of its tokens is the likeliest one, as greedy decoding would write it.

    Attributes:
        context: the text all choices continue; `""` where `contexts` is given.
        choices: the continuations, each with the white space that separates it from its context.
        answer: index of the right choice.
        domain: the kind of knowledge, such as `"fact"` or `"arithmetic"`.
        tier: frequency of the fact in training, `"common"` or `"rare"`; None where none is planted.
        hops: number of facts to be combined; None if the question is not about facts.
        contexts: one context a choice, or None.
    """

    context: str
    choices: tuple[str, ...]
    answer: int
    domain: str
    tier: str | None = None
    hops: int | None = None
    contexts: tuple[str, ...] | None = None

    @property
    def chance(self) -> float:
        """Probability that a guess is right, in [0, 1]; 0 where the answer has to be written."""
        return 1 / len(self.choices) if len(self.choices) > 1 else 0.0


@dataclass(frozen=True)
class Task:
    """A named set of questions.

    Attributes:
        name: name in reports.
        form: the published task whose form it takes, such as `"boolq"`.
        questions: at least one.
        normalize: score per character of the choice (lm-evaluation-harness's `acc_norm`) where True, the
            plain sum of log-likelihoods (`acc`) where False.
    """

    name: str
    form: str
    questions: tuple[Question, ...]
    normalize: bool = False

    @property
    def chance(self) -> float:
        """Expected accuracy of a guess, in [0, 1]."""
        return sum(question.chance for question in self.questions) / len(self.questions)
