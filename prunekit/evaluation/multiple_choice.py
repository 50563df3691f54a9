"""Zero-shot multiple choice: compares the log-likelihoods of continuations."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from prunekit.checks import Count, FilePath, Model, Tokenizer, Whole, checked
from prunekit.errors import PrunekitError
from prunekit.evaluation.likelihood import Span
from prunekit.evaluation.named_tasks import Tasks, named_tasks
from prunekit.evaluation.sequence_scores import log_likelihoods
from prunekit.evaluation.zero_shot_result import ZeroShotResult
from prunekit.models import max_positions
from prunekit.questions import Question, Task


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
        data_dir: the folder from which published tasks are read, as `standard_task` says; None reads from the hub.
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
    found = named_tasks(tasks, limit=limit, data_dir=data_dir, shots=shots)
    questions = [(task, number, question) for task in found for number, question in enumerate(task.questions)]
    most = max_positions(model)
    spans = [
        question_spans(tokenizer, question, most, f"question {number} of task {task.name!r}")
        for task, number, question in questions
    ]
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
        raise PrunekitError(f"{place} has answer {question.answer} of {n_choices} choices, which count from 0")
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
