import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from evaluation_helpers import N_POSITIONS, byte_tokenizer, choice_task, gpt2, llama, partial_task, yes_no_task

from prunekit.errors import PrunekitError
from prunekit.evaluation import ZeroShotResult, zero_shot
from prunekit.evaluation.multiple_choice import encode_pair, question_spans
from prunekit.questions import Question, Task


def log_p(model, context, choice):
    """Log-likelihood of a choice after a context, one forward pass of one sequence."""
    tokenizer = byte_tokenizer(adds_bos=False)
    head, tail = [0, *tokenizer(context)["input_ids"]], tokenizer(choice)["input_ids"]
    with torch.no_grad():
        rows = model(torch.tensor([head + tail])).logits[0].double().log_softmax(-1)
    return sum(rows[len(head) + i - 1, token].item() for i, token in enumerate(tail))


def expected_row(model, question, normalize):
    contexts = question.contexts or (question.context,) * len(question.choices)
    sums = [log_p(model, *pair) for pair in zip(contexts, question.choices, strict=True)]
    lengths = [len(text) for text in question.contexts or [choice[1:] for choice in question.choices]]
    normed = [value / length for value, length in zip(sums, lengths, strict=True)]
    counted = normed if normalize else sums
    best = [values.index(max(values)) for values in (sums, normed, counted)]
    wrong = [value for i, value in enumerate(counted) if i != question.answer]
    return *(choice == question.answer for choice in best), best[2], counted[question.answer] - max(wrong)


@pytest.mark.parametrize("task", [choice_task(), choice_task(normalize=True), partial_task()], ids=str)
@pytest.mark.parametrize("build", [llama, gpt2])
def test_every_answer_is_the_likeliest_choice(build, task):
    model = build()
    rows = zero_shot(model, byte_tokenizer(), [task], batch_size=5).questions
    columns = ["correct", "correct_norm", "hit", "prediction", "margin"]
    expected = pd.DataFrame([expected_row(model, q, task.normalize) for q in task.questions], columns=columns)
    pd.testing.assert_frame_equal(rows[columns], expected, rtol=1e-4, check_dtype=False)


def test_both_scores_differ_somewhere_and_the_task_says_which_counts():
    model = llama()
    plain = zero_shot(model, byte_tokenizer(), [choice_task()]).questions
    normed = zero_shot(model, byte_tokenizer(), [choice_task(normalize=True)]).questions
    assert (plain["correct"] != plain["correct_norm"]).any()
    assert (plain["hit"] == plain["correct"]).all()
    assert (normed["hit"] == normed["correct_norm"]).all()


@pytest.mark.parametrize("batch_size", [1, 7])
def test_batches_change_nothing(batch_size):
    model, tasks = llama(), [choice_task(), partial_task(), yes_no_task()]
    whole = zero_shot(model, byte_tokenizer(), tasks, batch_size=64).questions
    parts = zero_shot(model, byte_tokenizer(), tasks, batch_size=batch_size).questions
    pd.testing.assert_frame_equal(whole, parts, rtol=1e-4)


def test_the_context_of_a_question_is_read_once():
    model, seen = llama(), []
    model.register_forward_pre_hook(lambda m, a, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True)
    task = yes_no_task(5)
    result = zero_shot(model, byte_tokenizer(), [task])
    assert result.n_computed == sum(len(question.context) + 1 for question in task.questions)
    assert result.n_tokens == 2 * result.n_computed
    assert sum(seen) == result.n_computed + 2 * 8  # whether logits are computed only where they are needed, is tried


def test_accuracies_by_task_and_by_label():
    tasks = [choice_task(), yes_no_task(), partial_task()]
    result = zero_shot(llama(), byte_tokenizer(), tasks)
    rows = result.questions
    assert len(rows) == sum(len(task.questions) for task in tasks)
    assert list(result.accuracy().index) == ["made_up", "is_it", "who"]
    by_hand = [rows[rows["task"] == task.name]["hit"].mean() for task in tasks]
    assert list(result.accuracy()) == by_hand
    assert result.mean == pytest.approx(sum(by_hand) / 3)
    domains = result.by("domain")
    assert domains.loc["fact", "n"] == 8
    share = domains.loc["script", "accuracy"]
    assert domains.loc["script", "stderr"] == pytest.approx((share * (1 - share) / domains.loc["script", "n"]) ** 0.5)
    assert set(result.by("hops").index) == {1, 2}
    assert list(result.by("tier").index) == ["rare"]
    assert result.by("task").loc["who", "chance"] == 0.5
    assert result.by("task").loc["made_up", "chance"] == pytest.approx(choice_task().chance)
    assert "52 questions" in repr(result)
    assert "<table" in result._repr_html_()


def test_a_result_survives_plain_values():
    result = zero_shot(llama(), byte_tokenizer(), {"a": choice_task(6), "b": partial_task(4)})
    again = ZeroShotResult.from_dict(result.to_dict())
    pd.testing.assert_frame_equal(again.by("hops"), result.by("hops"))
    assert again.accuracy().equals(result.accuracy())
    assert result.to_dict()["tier"][1] is None


def test_white_space_moves_from_context_to_choice():
    tokenizer = byte_tokenizer()
    assert encode_pair(tokenizer, "who? ", "me") == encode_pair(tokenizer, "who?", " me")
    span = encode_pair(tokenizer, "who?", " me")
    assert (len(span.tokens), span.start) == (8, 5)


def test_without_context_bos_or_eos_stands_in():
    assert encode_pair(byte_tokenizer(), "", "hi").tokens[0] == 0
    assert encode_pair(byte_tokenizer(bos=None), "", "hi").tokens[0] == 1
    assert encode_pair(byte_tokenizer(bos=None), "  ", "hi").n_scored == 4


def test_bos_is_not_doubled_where_the_context_has_it():
    assert encode_pair(byte_tokenizer(), "<s>who?", " me") == encode_pair(byte_tokenizer(), "who?", " me")


class Forgetful:
    """A tokenizer that drops all but the first letter."""

    bos_token, bos_token_id, eos_token_id = None, None, None

    def __call__(self, text, add_special_tokens, verbose):
        return {"input_ids": [2] if text else []}


QUESTION = Question("who?", (" me", " you"), 0, "script")
REFUSED = {
    "no task": ([], "no question"),
    "no question": ([Task("empty", "boolq", ())], "no question to ask in .'empty'"),
    "same name": ([choice_task(), choice_task()], "share a name"),
    "answer": ([Task("t", "piqa", (replace(QUESTION, answer=2),))], "question 0 of task 't' has answer 2 of 2"),
    "no choice": ([Task("t", "piqa", (replace(QUESTION, choices=()),))], "answer 0 of 0 choices"),
    "no task of that name": (["bollq"], "no task 'bollq'; there are boolq, piqa"),
    "no task but a number": ([3], "=3 is not allowed; give an object of class Task, or a text"),
    "contexts": ([Task("t", "piqa", (replace(QUESTION, contexts=("a",)),))], "1 contexts for 2 choices"),
    "empty choice": (
        [Task("t", "piqa", (QUESTION, replace(QUESTION, choices=(" ", " x"))))],
        "question 1.*empty choice",
    ),
    "too long": (
        [Task("t", "piqa", (replace(QUESTION, choices=("x" * (N_POSITIONS + 1), " me")),))],
        f"choice of question 0 of task 't' has 97 tokens.*at most {N_POSITIONS}",
    ),
}


@pytest.mark.parametrize(("tasks", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_questions_are_refused(tasks, message):
    with pytest.raises(PrunekitError, match=message):
        zero_shot(llama(), byte_tokenizer(), tasks)


def test_a_question_may_fill_the_context_exactly():
    full = replace(QUESTION, context="x" * (N_POSITIONS - 4), choices=(" me", " it"))
    assert len(zero_shot(llama(), byte_tokenizer(), [Task("t", "piqa", (full,))]).questions) == 1


def test_a_longer_context_is_cut_on_the_left_and_the_result_says_so():
    long = replace(QUESTION, context="y" * 28 + "x" * (N_POSITIONS - 2), choices=(" me", " it"))
    short = replace(QUESTION, context="x" * (N_POSITIONS - 2), choices=(" me", " it"))
    model = llama()
    result = zero_shot(model, byte_tokenizer(), [Task("t", "piqa", (long, QUESTION))])
    assert result.questions["n_cut"].tolist() == [29, 0]  # BOS and the first letters
    alone = zero_shot(model, byte_tokenizer(adds_bos=False), [Task("t", "piqa", (short,))])
    (cut, _), (whole, _) = (
        question_spans(tokenizer, question, N_POSITIONS, "")
        for tokenizer, question in ((byte_tokenizer(), long), (byte_tokenizer(adds_bos=False), short))
    )
    assert (cut.tokens, cut.start) == (whole.tokens, whole.start)
    assert "1 contexts cut on the left" in repr(result) and "cut" not in repr(alone)


def test_a_single_choice_is_hit_where_it_is_what_greedy_decoding_writes():
    model, tokenizer = llama(), byte_tokenizer()
    letters = "abcdefghijklmnopqrstuvwxyz"
    with torch.no_grad():
        best = {c: int(model(**tokenizer(c, return_tensors="pt")).logits[0, -1].argmax()) for c in letters}
    written = {c: tokenizer.decode([token]) for c, token in best.items()}
    context, word = next((c, word) for c, word in written.items() if word.isalnum() and word.isascii())
    questions = (Question(context, (word,), 0, "word"), Question(context, (word + "x",), 0, "word"))
    asked = Task("last", "lambada", questions)
    result = zero_shot(model, tokenizer, [asked])
    assert result.questions["hit"].tolist() == [True, False]
    assert result.questions["prediction"].tolist() == [0, -1] and result.questions["chance"].tolist() == [0, 0]
    sums = [log_p(model, context, choice) for choice in (word, word + "x")]
    assert result.perplexities()["last"] == pytest.approx(math.exp(-sum(sums) / 2), rel=1e-4)
    assert ZeroShotResult.from_dict(result.to_dict()).perplexities().equals(result.perplexities())


def test_a_limit_takes_the_first_questions_of_each_task():
    result = zero_shot(llama(), byte_tokenizer(), [choice_task(), partial_task()], limit=3)
    assert list(result.questions["question"]) == [0, 1, 2] * 2
    with pytest.raises(PrunekitError, match="limit=0 is not allowed"):
        zero_shot(llama(), byte_tokenizer(), [choice_task()], limit=0)


def test_tokenizers_that_cannot_score_are_refused():
    with pytest.raises(PrunekitError, match="adds no token"):
        encode_pair(Forgetful(), "who?", " me")
    with pytest.raises(PrunekitError, match="BOS or EOS"):
        encode_pair(Forgetful(), "", "me")


def test_nan_weights_are_named():
    model = llama()
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(PrunekitError, match=r"model\.norm\.weight"):
        zero_shot(model, byte_tokenizer(), [choice_task(2)])


def test_unknown_grouping_is_refused():
    with pytest.raises(PrunekitError, match="'colour'.*'domain'"):
        zero_shot(llama(), byte_tokenizer(), [choice_task(2)]).by("colour")
