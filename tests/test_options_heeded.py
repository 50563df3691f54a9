"""What was asked is done or said: options that would change nothing are refused or noted."""

import json
import logging
import re

import pytest
import torch
from evaluation_helpers import TEXT, byte_tokenizer
from test_public_reports import IDS, tiny

import prunekit as pk
from prunekit import world
from prunekit.cli import main
from prunekit.errors import PrunekitError
from prunekit.knowledge.question_spans import make_evaluation_set
from prunekit.search import measure_pairs


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def groups(model):
    return pk.discover(model)


@pytest.fixture(scope="module")
def scores(model, groups):
    return pk.score(model, groups.of_kind("kv_head", "ffn_channel"), pk.Magnitude(), None)


@pytest.mark.parametrize(
    ("ratio", "options", "said"),
    [
        (0.2, {"round_to": {"expert": 2}}, "round_to names 'expert', of which this plan takes none"),
        (0.2, {"round_to": {"kv_head": 2}, "kinds": ["ffn_channel"]}, "round_to names 'kv_head'.*ffn_channel may go"),
        (0.2, {"protect_layers": [True]}, "protect_layers\\[0\\]=True is not allowed; give an integer"),
        (0.2, {"min_units": 1000}, "cannot be met: with min_units=1000"),
        (
            {"ffn_channel": 0.2},
            {"of": "units", "kinds": ["kv_head"]},
            "names '(kv_head|ffn_channel)', and (pruning_ratio|kinds) does not",
        ),
        (
            {"ffn_channel": 0.2},
            {"of": "units", "kinds": ["kv_head", "ffn_channel"]},
            "kinds names 'kv_head', and pruning_ratio does not",
        ),
        ({}, {"of": "units"}, "pruning_ratio={} names no kind"),
    ],
)
def test_options_of_plan_that_change_nothing_are_refused(groups, scores, ratio, options, said):
    with pytest.raises(PrunekitError, match=said):
        pk.plan(groups, scores, ratio, **options)


def test_a_kind_that_min_units_keeps_whole_is_noted(groups, scores):
    found = pk.plan(groups, scores, 0.2, min_units=5)
    assert found.notes["whole"] == "kv_head: no smaller number of units for min_units=5"
    assert "whole" not in pk.plan(groups, scores, 0.2, min_units=2).notes


@pytest.mark.parametrize(
    ("earlier", "options"),
    [
        ({"pruning_ratio": 0.3}, {}),
        ({"pruning_ratio": 0.1, "kinds": ["ffn_channel"]}, {"kinds": ["kv_head"]}),
        ({"pruning_ratio": 0.2}, {"protect_layers": [0]}),
        ({"pruning_ratio": 0.5, "of": "units"}, {"of": "units"}),
    ],
    ids=["larger", "of another kind", "protected", "of units"],
)
def test_an_earlier_plan_that_cannot_be_followed_is_refused(groups, scores, earlier, options):
    after = pk.plan(groups, scores, **earlier)
    with pytest.raises(PrunekitError, match=r"after= removes \d+ units that this plan keeps, such as unit"):
        pk.plan(groups, scores, 0.2, after=after, **options)


def test_what_is_measured_and_re_fitted_needs_its_tokens(model, groups, scores):
    plan = pk.plan(groups, scores, 0.2)
    with pytest.raises(PrunekitError, match="fit='bias' says what is re-fitted on the tokens of compensate="):
        pk.prune(model, plan, fit="bias")
    for work in (
        lambda: pk.prune(model, plan, held_out=IDS, measure=False),
        lambda: pk.sparsify(model, None, "magnitude", 0.5, held_out=IDS, measure=False),
        lambda: pk.recover(model, pk.LoRA(max_steps=1), IDS, held_out=IDS, measure=False),
    ):
        with pytest.raises(PrunekitError, match="held_out= .* measure=False measures nothing"):
            work()


def test_a_length_of_windows_for_data_that_is_windows_is_refused(model):
    with pytest.raises(PrunekitError, match="seq_len=8 cuts text into windows, and the data is windows of 16 tokens"):
        pk.recover(model, pk.LoRA(max_steps=1), IDS, seq_len=8)
    assert pk.recover(model, pk.LoRA(max_steps=1), IDS, seq_len=16)


def test_settings_that_cannot_be_followed_are_said(model, caplog):
    pk.recover(model, pk.LoRA(max_steps=2, batch_size=9, warmup=50), IDS)
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "batch_size=9, but there are 3 windows: a step takes all of them",
        "warmup=50 steps, but the training has 2: the learning rate does not reach 0.003",
    ]
    with pytest.raises(PrunekitError, match="LoRA: seed=-1 is not allowed"):
        pk.LoRA(seed=-1)


def test_no_zeros_are_remarked(model):
    with pytest.warns(UserWarning, match="0% sets no weight of these matrices to zero"):
        assert pk.sparsify(model, None, "magnitude", 0.0).sparsity_report.remarks


def test_data_of_a_metric_that_is_not_measured_is_refused(model):
    space = pk.HyperparameterSpace({"a": pk.search.Range(0.0, 1.0)}, lambda model, point: model)
    with pytest.raises(PrunekitError, match="text= is only used by the metric 'perplexity'"):
        measure_pairs(space, model, byte_tokenizer(), 1, metric="accuracy", text=TEXT)
    with pytest.raises(PrunekitError, match="tasks= is only used by the metric 'accuracy'"):
        measure_pairs(space, model, byte_tokenizer(), 1, text=TEXT, tasks=world.tasks())
    with pytest.raises(PrunekitError, match="start has 2 candidates, and 1 are measured"):
        measure_pairs(space, model, byte_tokenizer(), 1, text=TEXT, start=[{"a": 0.1}, {"a": 0.2}])
    with pytest.raises(PrunekitError, match="source='here' is where worker processes load the model, and n_jobs=1"):
        measure_pairs(space, model, byte_tokenizer(), 1, text=TEXT, source="here")
    with pytest.raises(PrunekitError, match="limit= is of tasks, and only text is given"):
        make_evaluation_set(model, byte_tokenizer(), None, TEXT, limit=3)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    pk.save(model, place / "dense", tokenizer=byte_tokenizer())
    (place / "text.txt").write_text(TEXT * 4)
    return place


L2 = ("--importance", "l2")
RATIO = ("--pruning-ratio", "0.2")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("prune", "DENSE", "--pruning-ratio", "0", *L2), "--pruning-ratio 0 removes nothing"),
        (("prune", "DENSE", "--plan", "PLAN"), "a plan that removes nothing"),
        (("prune", "DENSE", *RATIO, *L2, "--n-samples", "3"), "--n-samples says how windows .* none is read here"),
        (("prune", "DENSE", *RATIO, *L2, "--seed", "3"), "--seed says how windows"),
        (("sparsify", "DENSE", "--method", "magnitude", "--sparsity", "0"), "nothing would be set to zero"),
        (("sparsify", "DENSE", "--method", "magnitude", "--pattern", "4:4"), "nothing would be set to zero"),
        (
            ("sparsify", "DENSE", "--method", "magnitude", "--sparsity", "0.5", "--seq-len", "9"),
            "--seq-len says how windows",
        ),
        (
            ("recipe", "llm-pruner", "DENSE", "--pruning-ratio", "0", "--calibration", "TEXT"),
            "llm-pruner would remove nothing",
        ),
        (("recipe", "sparsellm", "DENSE", "--sparsity", "0", "--calibration", "TEXT"), "would remove nothing"),
        (("knowledge", "DENSE", "--text", "a=TEXT", *L2, "--seed", "3"), "--seed says how windows"),
        (("knowledge", "DENSE", "--text", "a=TEXT", *L2, "--limit", "3"), "limit= is of tasks"),
    ],
)
def test_the_shell_ends_with_2_where_nothing_would_be_done(folder, model, tmp_path, capsys, command, said):
    groups = pk.discover(model)
    everything = {g.name: torch.arange(float(g.n_units)) for g in groups}
    pk.plan(groups, everything, 0.0).save(tmp_path / "plan.json")
    places = {"DENSE": folder / "dense", "TEXT": folder / "text.txt", "PLAN": tmp_path / "plan.json"}
    given = [str(places.get(part, part)).replace("a=TEXT", f"a={places['TEXT']}") for part in command]
    assert main([*given, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert re.search(said, told), told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--limit", "3"), "--limit is of named tasks, and none is given"),
        (("--shots", "3"), "--shots is of named tasks"),
        (("--data-dir", "."), "--data-dir is of named tasks and texts"),
        (("--metrics", "cost", "--window", "16"), "--window is of perplexity, which is not measured"),
    ],
)
def test_options_of_evaluate_that_nothing_reads_are_refused(folder, capsys, options, said):
    assert main(["evaluate", str(folder / "dense"), "--data", str(folder / "text.txt"), *options]) == 2
    assert said in capsys.readouterr().err


def test_a_calibration_text_that_streaming_does_not_read_is_said(folder, tmp_path, capsys):
    given = ["--streaming", *L2, "--calibration", str(folder / "text.txt"), "--out", str(tmp_path / "out")]
    assert main(["prune", str(folder / "dense"), *RATIO, *given]) == 0
    assert "--calibration is not read: nothing is scored on it" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "plan.json").read_text())
