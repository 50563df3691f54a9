"""Zero-shot multiple choice: which continuation does the model find likeliest?"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from prunekit.errors import PrunekitError
from prunekit.evaluation.likelihood import Span, max_positions
from prunekit.evaluation.scoring import log_likelihoods
from prunekit.evaluation.zero_shot_result import ZeroShotResult
from prunekit.questions import Question, Task


def zero_shot(
    model: nn.Module, tokenizer: Any, tasks: Mapping[str, Task] | Iterable[Task], *, batch_size: int = 32
) -> ZeroShotResult:
    """Answers multiple-choice questions by log-likelihood, as lm-evaluation-harness does.

    `correct` (its `acc`) takes the choice of the largest summed log-likelihood; `correct_norm` (its `acc_norm`)
    divides that by the length of the choice first. Each task says by `normalize` which one counts.

    Args:
        model: a causal language model of `transformers`.
        tokenizer: the model's own tokenizer; BOS comes first where it adds one itself.
        tasks: the tasks, or name → task.
        batch_size: contexts a forward pass; it does not change the result.

    Returns:
        A `ZeroShotResult` with one row a question.

    Raises:
        PrunekitError: there is no task or question, two tasks share a name, a question is malformed or does not
            fit into the model's context, or the model's log-likelihoods are not finite.

    Source: lm-evaluation-harness 0.4, `api/task.py` and `models/huggingface.py`. Length is counted in characters
    without the separating white space, as there (its `acc_bytes` counts bytes; both agree on ASCII). Contexts
    that are too long are an error here, where it cuts them on the left.
    """
    tasks = named_tasks(tasks)
    questions = [(task, number, question) for task in tasks for number, question in enumerate(task.questions)]
    limit = max_positions(model)
    spans = [
        span
        for task, number, question in questions
        for span in question_spans(tokenizer, question, limit, f"question {number} of task {task.name!r}")
    ]
    sums = log_likelihoods(model, spans, batch_size=batch_size, progress="zero-shot").sums
    scores = sums.split([len(question.choices) for _, _, question in questions])
    rows = [judge(*asked, score) for asked, score in zip(questions, scores, strict=True)]
    return ZeroShotResult(pd.DataFrame(rows))


def named_tasks(tasks: Mapping[str, Task] | Iterable[Task]) -> list[Task]:
    """The tasks as a list, each with a name of its own and at least one question."""
    found = list(tasks.values() if isinstance(tasks, Mapping) else tasks)
    other = next((task for task in found if not isinstance(task, Task)), None)
    if isinstance(tasks, str) or other is not None:
        raise PrunekitError(f"{other!r:.60} is no task; give Tasks, such as prunekit.world.tasks()['arc_easy']")
    names = [task.name for task in found]
    if not found or not all(task.questions for task in found):
        empty = [task.name for task in found if not task.questions]
        raise PrunekitError(f"no question to ask in {empty or 'an empty set of tasks'}; give at least one a task")
    if len(set(names)) < len(names):
        raise PrunekitError(f"two tasks share a name in {names}; the report could not tell them apart")
    return found


def question_spans(tokenizer: Any, question: Question, limit: int | None, place: str) -> list[Span]:
    """One span a choice: the tokens of context and choice, of which the choice's are scored."""
    check_question(question, place)
    contexts = question.contexts or (question.context,) * len(question.choices)
    spans = [encode_pair(tokenizer, *pair) for pair in zip(contexts, question.choices, strict=True)]
    longest = max(len(span.tokens) for span in spans)
    if limit is not None and longest - 1 > limit:
        raise PrunekitError(
            f"{place} takes {longest - 1} tokens, but this model takes at most {limit}; shorten its context"
        )
    return spans


def check_question(question: Question, place: str) -> None:
    """Refuses a question that cannot be scored."""
    n_choices = len(question.choices)
    if n_choices < 2 or not 0 <= question.answer < n_choices:
        raise PrunekitError(f"{place} has answer {question.answer} of {n_choices} choices; at least 2, counted from 0")
    if question.contexts is not None and len(question.contexts) != n_choices:
        raise PrunekitError(f"{place} has {len(question.contexts)} contexts for {n_choices} choices; give one each")
    if not all(choice.strip() for choice in question.choices):
        raise PrunekitError(f"{place} has an empty choice, which has no likelihood; write it out")


def encode_pair(tokenizer: Any, context: str, choice: str) -> Span:
    """Tokens of context and choice together, split where the context alone would end.

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
    """Characters by which each choice's log-likelihood is divided, float64 (n_choices,).

    Where the choices differ on the left, those are the contexts' lengths, as in lm-evaluation-harness.
    """
    texts: Sequence[str] = question.contexts or [choice.lstrip() for choice in question.choices]
    return torch.tensor([max(len(text), 1) for text in texts], dtype=torch.float64)


def judge(task: Task, number: int, question: Question, sums: Tensor) -> dict[str, Any]:
    """One row of the result, from the choices' summed log-likelihoods in nats, (n_choices,)."""
    gold = question.answer
    normed = sums / choice_lengths(question)
    counted = normed if task.normalize else sums
    best, best_norm = int(sums.argmax()), int(normed.argmax())
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
        "margin": float(counted[gold] - others.max()),
        "chance": 1 / len(question.choices),
    }
