import sys

import pytest
import yaml
from evaluation_helpers import TEXT, byte_tokenizer, choice_task, llama, partial_task, yes_no_task
from harness_tasks import PREFIX, differences, run, write_tasks

from prunekit.errors import PrunekitError
from prunekit.evaluation import measure_perplexity, perplexity, zero_shot
from prunekit.evaluation.harness import run_harness

TASKS = [choice_task(16), choice_task(16, normalize=True, name="normed"), partial_task(10), yes_no_task(8)]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    pytest.importorskip("lm_eval", reason="needs pip install 'prunekit[harness]'")
    model, tokenizer, folder = llama(), byte_tokenizer(), tmp_path_factory.mktemp("tasks")
    return zero_shot(model, tokenizer, TASKS), run(model, tokenizer, folder, write_tasks(folder, TASKS), batch_size=32)


def test_both_answer_each_question_alike_with_the_same_likelihoods(both):
    ours = both[0].questions
    wrong, furthest = differences(*both)
    assert not wrong and furthest < 1e-3
    assert 0 < ours["correct"].mean() < 1
    assert (ours["correct"] != ours["correct_norm"]).any()


def test_the_accuracies_are_those_the_harness_reports(both):
    table = both[0].by("task")
    for task in table.index:
        told = both[1]["results"][PREFIX + task]
        assert told["acc,none"] == pytest.approx(table.loc[task, "acc"])
        assert told["acc_norm,none"] == pytest.approx(table.loc[task, "acc_norm"])


def test_tasks_of_its_form_are_run_by_name(tmp_path):
    pytest.importorskip("lm_eval", reason="needs pip install 'prunekit[harness]'")
    (tmp_path / "mine.jsonl").write_text('{"question": "who?", "options": ["me", "you"], "label": 1}\n' * 4)
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
    found = run_harness(llama(), byte_tokenizer(), ["mine"], include_path=tmp_path, limit=3)
    assert found.metrics["mine"]["sample_len"] == 3 and found.headline()["mine"].keys() == {"acc"}
    assert "mine" in repr(found)
    with pytest.raises(PrunekitError, match="no task 'other'"):
        run_harness(llama(), byte_tokenizer(), ["other"], include_path=tmp_path)
    with pytest.raises(PrunekitError, match="no task to run"):
        run_harness(llama(), byte_tokenizer(), [])
    for tasks in ({"piqa": ["a question"]}, "piqa", [3]):
        with pytest.raises(PrunekitError, match=r"a list of names .* zero_shot"):
            run_harness(llama(), byte_tokenizer(), tasks)


def test_without_the_harness_the_way_to_get_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(PrunekitError, match=r"pip install 'prunekit\[harness\]'"):
        run_harness(llama(), byte_tokenizer(), ["gsm8k"])


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


@pytest.mark.parametrize("adds_bos", [False, True])
def test_rolling_perplexity_of_documents_is_ours(adds_bos):
    model, tokenizer = llama(), byte_tokenizer(adds_bos)
    documents = [TEXT[:40], TEXT[41:95].strip()]
    ours = check_rolling(model, tokenizer, documents)
    if adds_bos:
        assert ours.value == perplexity(model, tokenizer, documents, protocol="documents")
