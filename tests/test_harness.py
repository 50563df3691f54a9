import sys
from dataclasses import replace

import pytest
import yaml
from evaluation_helpers import byte_tokenizer, choice_task, llama, partial_task, yes_no_task
from shared import real_model

from prunekit import load, world
from prunekit.errors import PrunekitError
from prunekit.evaluation import measure_perplexity, perplexity, zero_shot
from prunekit.evaluation.harness import run_harness
from prunekit.questions import Question, Task
from prunekit.text import leading_bos

TASKS = [choice_task(16), choice_task(16, normalize=True, name="normed"), partial_task(10), yes_no_task(8)]


@pytest.fixture(scope="module")
def both():
    pytest.importorskip("lm_eval", reason="needs pip install 'prunekit[harness]'")
    model, tokenizer = llama(), byte_tokenizer()
    return zero_shot(model, tokenizer, TASKS), run_harness(model, tokenizer, TASKS)


def test_both_answer_each_question_alike(both):
    ours, theirs = both[0].questions, both[1].questions
    for column in ("task", "question", "gold", "correct", "correct_norm"):
        assert list(ours[column]) == list(theirs[column]), column
    assert 0 < ours["correct"].mean() < 1
    assert (ours["correct"] != ours["correct_norm"]).any()


def test_both_find_the_same_likelihoods(both):
    ours, theirs = both[0].questions, both[1].questions
    for (_, mine), (_, other) in zip(ours.iterrows(), theirs.iterrows(), strict=True):
        if mine["task"] == "normed":
            continue
        wrong = [value for choice, value in enumerate(other["log_likelihoods"]) if choice != mine["gold"]]
        assert mine["prediction"] == other["prediction"]
        assert mine["margin"] == pytest.approx(other["log_likelihoods"][mine["gold"]] - max(wrong), abs=1e-3)


def test_the_accuracies_are_those_the_harness_reports(both):
    table = both[0].by("task")
    for task in ("made_up", "normed", "who", "is_it"):
        assert both[1].metrics[task]["acc"] == pytest.approx(table.loc[task, "acc"])
        assert both[1].metrics[task]["acc_norm"] == pytest.approx(table.loc[task, "acc_norm"])
    assert "made_up" in repr(both[1])


def test_tasks_of_ones_own_run_beside_ours(tmp_path):
    pytest.importorskip("lm_eval", reason="needs pip install 'prunekit[harness]'")
    (tmp_path / "mine.jsonl").write_text('{"question": "who?", "options": ["me", "you"], "label": 1}\n')
    config = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "mine.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "question",
        "doc_to_choice": "options",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    found = run_harness(llama(), byte_tokenizer(), ["mine", yes_no_task(4)], include_path=tmp_path, limit=3)
    assert list(found.questions["task"].value_counts().loc[["is_it", "mine"]]) == [3, 1]
    assert found.questions.set_index("task").loc["mine", "correct_norm"] is None
    with pytest.raises(PrunekitError, match="no task 'other'"):
        run_harness(llama(), byte_tokenizer(), ["other"], include_path=tmp_path)


def test_without_the_harness_the_way_to_get_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(PrunekitError, match=r"pip install 'prunekit\[harness\]'"):
        run_harness(llama(), byte_tokenizer(), TASKS)


def test_what_its_form_cannot_say_is_refused():
    pytest.importorskip("lm_eval", reason="needs pip install 'prunekit[harness]'")
    question = Question("who?", (" me", " you"), 0, "script")
    mixed = Task("mixed", "piqa", (question, replace(question, choices=("me", "you"))))
    with pytest.raises(PrunekitError, match="mixes separators"):
        run_harness(llama(), byte_tokenizer(), [mixed])
    with pytest.raises(PrunekitError, match="no task to run"):
        run_harness(llama(), byte_tokenizer(), [])


STORIES = [
    "Once there was a little dog named Tim. He ran in the park.",
    "Water boils at 100 degrees Celsius at sea level.",
]


def check_rolling(model, tokenizer, documents):
    """The harness's rolling log-likelihood of documents that fit one window is ours, document by document.

    `add_bos_token=False`: the harness puts its prefix token first, and a tokenizer that adds BOS would add a second.
    """
    pytest.importorskip("lm_eval", reason="needs pip install 'prunekit[harness]'")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, add_bos_token=False)
    asked = [Instance("loglikelihood_rolling", {}, (document,), 0) for document in documents]
    ours = measure_perplexity(model, tokenizer, documents, protocol="documents", bos=True)
    assert lm.prefix_token_id == tokenizer.bos_token_id
    assert -ours.nll == pytest.approx(sum(lm.loglikelihood_rolling(asked, disable_tqdm=True)), rel=1e-5)
    return ours


def test_rolling_perplexity_of_documents_is_ours():
    model, tokenizer = load("world")
    ours = check_rolling(model, tokenizer, world.documents(5, split="validation"))
    assert ours.value == perplexity(model, tokenizer, world.documents(5, split="validation"), protocol="documents")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "adds_bos"), [("smollm2", False), ("gemma", True)])
def test_rolling_perplexity_of_real_models_is_ours(name, adds_bos):
    model, tokenizer = real_model(name)
    check_rolling(model, tokenizer, STORIES)
    assert (leading_bos(tokenizer) is not None) == adds_bos
