import sys
import types

import pandas as pd
import pytest
from evaluation_helpers import TEXT, byte_tokenizer, choice_task, llama, partial_task

from prunekit.errors import PrunekitError
from prunekit.evaluation import Report, compare, compare_accuracy, evaluate, measure_perplexity

TASKS = {"made_up": choice_task(6), "who": partial_task(4)}


@pytest.fixture(scope="module")
def report():
    return evaluate(llama(), byte_tokenizer(), text=TEXT, tasks=TASKS, cost_options={"seq_len": 32, "repeats": 2})


def test_a_report_has_all_headline_figures(report):
    assert list(report.headline()) == [
        *("perplexity", "made_up", "who", "mean_accuracy"),
        *("parameters", "macs", "weight_bytes", "peak_bytes", "prefill_ms", "decode_ms"),
    ]
    assert report["perplexity"] == measure_perplexity(llama(), byte_tokenizer(), TEXT).value
    assert report["mean_accuracy"] == pytest.approx((report["made_up"] + report["who"]) / 2)
    assert report["parameters"] == sum(p.numel() for p in llama().parameters())
    assert report.cost.seq_len == 32


def test_a_report_prints_its_protocol(report):
    table = report.table()
    assert list(table["metric"]) == list(report.headline())
    for shown in (repr(report), report._repr_html_()):
        assert "non-overlapping windows of 96" in shown
        assert "chance 0.500, 4 questions" in shown
        assert "1 × 32 tokens" in shown
    assert repr(Report())


def test_a_report_is_saved_and_loaded_whole(report, tmp_path):
    path = report.save(tmp_path / "new" / "report.json")
    again = Report.load(path)
    assert again.headline() == report.headline()
    assert again.to_json() == report.to_json()
    assert (again.perplexity, again.cost) == (report.perplexity, report.cost)
    pd.testing.assert_frame_equal(again.zero_shot.by("domain"), report.zero_shot.by("domain"))
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]


def test_only_what_is_asked_for_is_measured():
    report = evaluate(
        llama(), byte_tokenizer(), "perplexity", text=TEXT, perplexity_options={"window": 40, "stride": 20}
    )
    assert list(report.headline()) == ["perplexity"]
    assert (report.perplexity.window, report.perplexity.stride) == (40, 20)
    assert Report.from_json(report.to_json()).headline() == report.headline()


def test_reports_stand_side_by_side(report):
    cut = evaluate(llama(seed=1, intermediate_size=20), byte_tokenizer(), ["cost", "zero_shot"], tasks=[choice_task(6)])
    table = compare({"cut": cut, "dense": report})
    assert list(table.index) == ["cut", "dense"]
    assert set(table.columns) == set(report.headline())
    assert list(table.columns)[-6:] == list(report.headline())[-6:]
    assert table.loc["dense", "perplexity"] == report["perplexity"]
    assert pd.isna(table.loc["cut", "perplexity"])
    assert table.loc["cut", "parameters"] < table.loc["dense", "parameters"]


def test_accuracies_stand_side_by_side(report):
    table = compare_accuracy({"a": report, "b": report}, by="domain")
    assert list(table.columns) == ["model", "domain", "n", "accuracy", "stderr", "acc", "acc_norm", "chance"]
    assert len(table) == 2 * report.zero_shot.questions["domain"].nunique()


@pytest.fixture()
def world(monkeypatch):
    """A stand-in for the embedded world, whose tokenizer is any that says so."""
    module = types.ModuleType("prunekit.world")
    module.is_world_tokenizer = lambda tokenizer: getattr(tokenizer, "of_the_world", False)
    module.validation_text = lambda: TEXT
    module.tasks = lambda: TASKS
    monkeypatch.setitem(sys.modules, "prunekit.world", module)


def test_the_worlds_tokenizer_brings_text_and_tasks(world):
    tokenizer = byte_tokenizer()
    tokenizer.of_the_world = True
    report = evaluate(llama(), tokenizer, ("perplexity", "zero_shot"))
    assert list(report.headline()) == ["perplexity", "made_up", "who", "mean_accuracy"]
    assert report["perplexity"] == measure_perplexity(llama(), tokenizer, "world").value


@pytest.mark.parametrize(("metric", "argument"), [("perplexity", "text"), ("zero_shot", "tasks")])
def test_another_tokenizer_needs_them_given(world, metric, argument):
    with pytest.raises(PrunekitError, match=f"give {argument}="):
        evaluate(llama(), byte_tokenizer(), [metric])


@pytest.mark.parametrize("metrics", ["accuracy", ("cost", "bleu"), ()])
def test_unknown_metrics_are_refused(metrics):
    with pytest.raises(PrunekitError, match="'perplexity', 'zero_shot', 'cost'"):
        evaluate(llama(), byte_tokenizer(), metrics)


def test_bad_reports_are_refused(report, tmp_path):
    with pytest.raises(PrunekitError, match="no 'bleu'; it has perplexity"):
        report["bleu"]
    with pytest.raises(PrunekitError, match="No such file"):
        Report.load(tmp_path / "missing.json")
    for text in ("[]", "{}", "nonsense", '{"format": "prunekit report 0"}', '{"format": "prunekit report 1", "x": 1}'):
        with pytest.raises(PrunekitError, match="not a prunekit report"):
            Report.from_json(text)
    with pytest.raises(PrunekitError, match="no report to compare"):
        compare({})
    with pytest.raises(PrunekitError, match="x: no zero-shot answers"):
        compare_accuracy({"x": Report()})
