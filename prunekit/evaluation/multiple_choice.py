"""Zero-shot multiple choice: compares the log-likelihoods of continuations, and holds the results."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from prunekit.checks import Count, FilePath, Model, Part, Tokenizer, Whole, check_value, checked
from prunekit.errors import PrunekitError
from prunekit.escaping import html_paragraph
from prunekit.evaluation.likelihood import Span
from prunekit.evaluation.sequence_scores import log_likelihoods
from prunekit.evaluation.standard_tasks import Tasks, named_tasks
from prunekit.models import max_positions
from prunekit.questions import Question, Task

GROUPS = ("task", "form", "domain", "tier", "hops")
_COLUMNS: dict[str, Any] = {
    "task": str, "question": Whole, "gold": Whole, "prediction": int, "correct": bool, "correct_norm": bool,
    "hit": bool, "margin": float | None, "chance": Part, "log_likelihoods": list[float],
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class ZeroShotResult:
    """Zero-shot results: one row per question, and accuracies.

    Attributes:
        questions: columns task, form, question (its number in the task), domain, tier, hops, gold and prediction
            (numbers of choices), correct (`acc`), correct_norm (`acc_norm`), hit (the one of the two that
            counts for the task), margin (log-likelihood of the right choice less that of the best wrong one,
            in nats, or nats a character where the task normalises; NaN where there is but one), chance,
            log_likelihoods (a list, one a choice, in nats), n_cut (tokens that were cut off the context on the left,
            since the model does not take so many). The prediction is -1 where a single choice was not the likeliest.
        n_computed: positions that the model was run on, including padding and the test of packing.
        n_tokens: positions of all choices with their contexts, had each been read alone.
    """

    questions: pd.DataFrame
    n_computed: int = 0
    n_tokens: int = 0

    def by(self, column: str) -> pd.DataFrame:
        """Accuracy by task, form, domain, tier or number of hops.

        Args:
            column: one of `"task" "form" "domain" "tier" "hops"`; questions that have no such label are left out.

        Returns:
            Index `column`; columns n (questions), accuracy, stderr (binomial), acc, acc_norm, chance, all in [0, 1].

        Raises:
            PrunekitError: there is no such column.
        """
        if column not in GROUPS:
            raise PrunekitError(f"no accuracy by {column!r}; group by one of {', '.join(map(repr, GROUPS))}")
        table = self.questions.groupby(column, sort=False).agg(
            n=("hit", "size"), accuracy=("hit", "mean"),
            acc=("correct", "mean"), acc_norm=("correct_norm", "mean"), chance=("chance", "mean"),
        )  # fmt: skip
        spread = (table["accuracy"] * (1 - table["accuracy"]) / table["n"]) ** 0.5
        table.insert(2, "stderr", spread)
        return table

    def accuracy(self) -> pd.Series:
        """Accuracy of each task, in [0, 1], in the tasks' order."""
        return self.by("task")["accuracy"]

    @property
    def mean(self) -> float:
        """Unweighted mean of the tasks' accuracies, as the papers' tables have it."""
        return float(self.accuracy().mean())

    def perplexities(self) -> pd.Series:
        """Perplexity of the word to be written, of each task whose questions have a single choice (LAMBADA).

        exp of the mean negative log-likelihood a word, whatever number of tokens it has, as lm-evaluation-harness has
        it.
        """
        single = self.questions[self.questions["chance"] == 0]
        sums = single["log_likelihoods"].map(lambda values: values[0]).astype(float)
        return np.exp(-sums.groupby(single["task"], sort=False).mean()).rename("perplexity")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: column → list, and the two numbers of positions."""
        plain = self.questions.astype(object).where(self.questions.notna(), None)
        columns = {str(name): plain[name].tolist() for name in plain}
        return columns | {"n_computed": self.n_computed, "n_tokens": self.n_tokens}

    @classmethod
    def from_dict(cls, columns: dict[str, Any]) -> "ZeroShotResult":
        """The result from the form of `to_dict`.

        Raises:
            PrunekitError: a column that is missing, or has values that cannot be.
        """
        columns = dict(columns)
        numbers = {name: columns.pop(name, 0) for name in ("n_computed", "n_tokens")}
        for name, kind in _COLUMNS.items():
            if name not in columns:
                raise PrunekitError(f"zero_shot has no column {name!r}")
            check_value(f"zero_shot[{name!r}]", columns[name], list[kind])  # type: ignore[valid-type]
        for name, value in numbers.items():
            check_value(name, value, Whole)
        return cls(pd.DataFrame(columns), **numbers)

    def __repr__(self) -> str:
        return f"ZeroShotResult({self.summary})"

    @property
    def summary(self) -> str:
        """Mean accuracy, how many tasks and questions, how many tokens were run, and what was cut, in one line."""
        n_tasks = self.questions["task"].nunique()
        run = f"; {self.n_computed:,} tokens run for {self.n_tokens:,}" if self.n_computed else ""
        n_cut = int((self.questions["n_cut"] > 0).sum()) if "n_cut" in self.questions else 0
        cut = f"; {n_cut:,} contexts cut on the left to fit the model" if n_cut else ""
        return f"{self.mean:.1%} over {n_tasks} tasks, {len(self.questions):,} questions{run}{cut}"

    def _repr_html_(self) -> str:
        return f"{html_paragraph(self)}{self.by('task').to_html(float_format='{:.3f}'.format)}"


@checked
def zero_shot(
    model: Model,
    tokenizer: Tokenizer,
    tasks: Tasks,
    *,
    limit: Count | None = None,
    data_dir: FilePath | None = None,
    shots: Whole = 0,
    batch_size: Count = 16,
) -> ZeroShotResult:
    """Answers multiple-choice questions by log-likelihood, as lm-evaluation-harness does.

    `correct` (its `acc`) takes the choice of the largest summed log-likelihood; `correct_norm` (its `acc_norm`)
    divides that by the length of the choice first. Each task says by `normalize` which one counts.

    Args:
        model: a causal language model of `transformers`.
        tokenizer: the model's own tokenizer; BOS comes first where it adds one itself.
        tasks: names of published tasks (`"boolq" "piqa" "hellaswag" "winogrande" "arc_easy" "arc_challenge"
            "openbookqa" "mmlu" "mmlu_anatomy" "lambada"`), tasks of your own, or both; or name → task.
        limit: the first so many questions of each task; None asks all.
        data_dir: the folder from which published tasks are read, as `standard_task` says; by default from the hub.
        shots: answered examples in front of each question of a published task.
        batch_size: rows of about 128 tokens a forward pass; it does not change the result.

    Returns:
        A `ZeroShotResult` with one row per question.

    Raises:
        PrunekitError: there is no task or question, two tasks share a name, a question is malformed or its choice
            alone does not fit into the model's context, a data set cannot be read, or the model's log-likelihoods are
            not finite.

    Source: lm-evaluation-harness 0.4, `api/task.py` and `models/huggingface.py`. Length is counted in characters
    without the separating space, as there (its `acc_bytes` counts bytes; both agree on ASCII). Contexts that are too
    long are cut on the left, as there; `n_cut` of the result says of how many tokens.
    """
    questions, spans = task_spans(model, tokenizer, named_tasks(tasks, limit=limit, data_dir=data_dir, shots=shots))
    said = log_likelihoods(
        model, [span for several in spans for span in several], batch_size=batch_size, progress="zero-shot"
    )
    sizes = [len(several) for several in spans]
    answers = zip(questions, said.sums.split(sizes), said.greedy.split(sizes), spans, strict=True)
    rows = [
        judge(*asked, sums, bool(greedy[asked[2].answer])) | {"n_cut": max(span.n_cut for span in several)}
        for asked, sums, greedy, several in answers
    ]
    return ZeroShotResult(pd.DataFrame(rows), said.n_computed, said.n_tokens)


Asked = tuple[Task, int, Question]  # a question with its task and its number there


def task_spans(model: Any, tokenizer: Any, tasks: Sequence[Task]) -> tuple[list[Asked], list[list[Span]]]:
    """All questions of some tasks, and one span per choice of each; raises what `question_spans` raises."""
    asked = [(task, number, question) for task in tasks for number, question in enumerate(task.questions)]
    most = max_positions(model)
    spans = [
        question_spans(tokenizer, question, most, f"question {number} of task {task.name!r}")
        for task, number, question in asked
    ]
    return asked, spans


def question_spans(tokenizer: Any, question: Question, limit: int | None, place: str) -> list[Span]:
    """One span per choice: tokens of context and choice, of which the choice is scored.

    Args:
        tokenizer: the model's own.
        question: the question.
        limit: tokens that the model takes; contexts are cut on the left to fit. None takes any number.
        place: the question's, for messages.

    Raises:
        PrunekitError: the question is malformed, or a choice alone has more tokens than the model takes.
    """
    check_question(question, place)
    contexts = question.contexts or (question.context,) * len(question.choices)
    spans = [encode_pair(tokenizer, *pair) for pair in zip(contexts, question.choices, strict=True)]
    longest = max(span.n_scored for span in spans)
    if limit is not None and longest > limit:
        raise PrunekitError(
            f"a choice of {place} has {longest} tokens, but this model takes at most {limit}; shorten it"
        )
    return spans if limit is None else [cut_left(span, limit) for span in spans]


def cut_left(span: Span, limit: int) -> Span:
    """The span shortened to its last `limit` input tokens; the last token is only scored.

    Source: lm-evaluation-harness, `HFLM._loglikelihood_tokens`.
    """
    n_cut = max(len(span.tokens) - 1 - limit, 0)
    return Span(span.tokens[n_cut:], span.start - n_cut, n_cut)


def check_question(question: Question, place: str) -> None:
    """Raises an error for a question that cannot be scored."""
    n_choices = len(question.choices)
    if not 0 <= question.answer < n_choices:
        raise PrunekitError(f"{place} has answer {question.answer} of {n_choices} choices; count choices from 0")
    if question.contexts is not None and len(question.contexts) != n_choices:
        raise PrunekitError(f"{place} has {len(question.contexts)} contexts for {n_choices} choices; give one each")
    if not all(choice.strip() for choice in question.choices):
        raise PrunekitError(f"{place} has an empty choice, which has no likelihood; write it out")


def encode_pair(tokenizer: Any, context: str, choice: str) -> Span:
    """Tokens of context and choice together, split at the length of the context's own tokens.

    White space at the end of the context moves to the choice, where tokenizers expect it.

    Source: lm-evaluation-harness, `TemplateLM._encode_pair`; without a context, BOS (or EOS) stands for it.
    """
    bare = context.rstrip()
    choice = context[len(bare) :] + choice
    special = not (tokenizer.bos_token and bare.startswith(tokenizer.bos_token))
    head = encode(tokenizer, bare, special) if bare else []
    if not head:
        prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if prefix is None:
            raise PrunekitError("a question without context needs a tokenizer with a BOS or EOS token; give a context")
        return Span((prefix, *encode(tokenizer, choice, special=False)), 1)
    whole = encode(tokenizer, bare + choice, special)
    if len(whole) <= len(head):
        raise PrunekitError(f"the choice {choice!r} adds no token to {bare[-40:]!r}; this tokenizer cannot score it")
    return Span(tuple(whole), len(head))


def encode(tokenizer: Any, text: str, special: bool) -> list[int]:
    """Token ids, with the markers that the tokenizer itself adds where `special`."""
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def choice_lengths(question: Question) -> Tensor:
    """Characters by which each choice's log-likelihood is divided, float64 (n_choices,), the separating space left out.

    Where the choices differ on the left, those are the contexts' lengths, as in lm-evaluation-harness.
    """
    texts: Sequence[str] = question.contexts or [choice[choice[:1].isspace() :] for choice in question.choices]
    return torch.tensor([max(len(text), 1) for text in texts], dtype=torch.float64)


def judge(task: Task, number: int, question: Question, sums: Tensor, greedy: bool = False) -> dict[str, Any]:
    """One row of the result.

    Args:
        task: the question's.
        number: of the question in it.
        question: the question.
        sums: the choices' log-likelihoods in nats, (n_choices,).
        greedy: whether greedy decoding writes the right choice: what counts where there is but one.
    """
    gold = question.answer
    normed = sums / choice_lengths(question)
    counted = normed if task.normalize else sums
    best, best_norm = (int(sums.argmax()), int(normed.argmax())) if len(sums) > 1 else (int(greedy) - 1,) * 2
    others = torch.cat([counted[:gold], counted[gold + 1 :]])
    return {
        "task": task.name,
        "form": task.form,
        "question": number,
        "domain": question.domain,
        "tier": question.tier,
        "hops": question.hops,
        "gold": gold,
        "prediction": best_norm if task.normalize else best,
        "correct": best == gold,
        "correct_norm": best_norm == gold,
        "hit": (best_norm if task.normalize else best) == gold,
        "margin": float(counted[gold] - others.max()) if len(others) else float("nan"),
        "chance": question.chance,
        "log_likelihoods": sums.tolist(),
    }
