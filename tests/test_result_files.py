"""Result files that were edited: each is refused by its name, whatever stands in it."""

import json
import random
import re

import numpy as np
import pytest
from evaluation_helpers import byte_tokenizer, choice_task, llama
from safetensors import safe_open
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from search_helpers import model as small_model

import prunekit as pk
from prunekit.account import LossChange
from prunekit.errors import PrunekitError
from prunekit.importance import Scores
from prunekit.recovery import RecoveryLog
from prunekit.search import HyperparameterSpace, Metric, Range
from prunekit.sparsity import SparsityReport

BAD = ("3", "null", "not json", "[" * 2000, '"x"', "{}", "[]", "[[1]]", '{"a": 1}', "-1e9", "9" * 5000)
DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture(scope="module")
def scores(model):
    groups = pk.discover(model)
    return pk.score(model, groups, pk.Magnitude())


def refused(path, load):
    with pytest.raises(PrunekitError, match=f"no .* in .*{path.name}|{path.name}' is not JSON") as told:
        load(path)
    assert len(re.findall(r"give (a|the path of a) file", str(told.value))) == 1


def with_metadata(path, key, value):
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    bad = path.with_name("bad.safetensors")
    save_file(load_file(path), bad, metadata={**meta, key: value})
    return bad


@pytest.mark.parametrize("key", ["format", "order", "kinds", "ranking"])
@pytest.mark.parametrize("bad", BAD)
def test_edited_scores_are_refused(key, bad, scores, tmp_path):
    scores.save(tmp_path / "s.safetensors")
    if (key, bad) in {("order", "[]"), ("kinds", "{}")}:  # no group is asked for, or none has a kind
        return
    refused(with_metadata(tmp_path / "s.safetensors", key, bad), Scores.load)


@pytest.mark.parametrize("change", [lambda t: t * float("nan"), lambda t: t.int(), lambda t: t[None]])
def test_scores_that_are_no_numbers_one_a_unit_are_refused(change, scores, tmp_path):
    path = scores.save(tmp_path / "s.safetensors")
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    values = load_file(path)
    values[next(iter(values))] = change(next(iter(values.values())))
    save_file(values, path, metadata=meta)
    refused(path, Scores.load)


@pytest.fixture(scope="module")
def known(model, scores, tmp_path_factory):
    groups = pk.discover(model).of_kind("ffn_channel")
    task = choice_task(4)
    path = tmp_path_factory.mktemp("known") / "k.safetensors"
    found = pk.knowledge_distribution(model, byte_tokenizer(), groups, scores, tasks=[task], ratios=(0.5,))
    return found.save(path)


@pytest.mark.parametrize("key", ["format", "ablations", "questions", "packed", "unfinished", "fingerprint"])
@pytest.mark.parametrize("bad", BAD)
def test_an_edited_knowledge_distribution_is_refused(key, bad, known):
    assert len(pk.KnowledgeDistribution.load(known).questions) == 4
    if (key, bad) in {("unfinished", "3"), ("fingerprint", '"x"')}:
        return
    refused(with_metadata(known, key, bad), pk.KnowledgeDistribution.load)


def test_arrays_of_another_size_are_refused(known, tmp_path):
    with safe_open(known, "np") as file:
        meta = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    for name, value in {
        "hit": arrays["hit"][:, :1],
        "loss": arrays["loss"] * np.nan,
        "dense_hit": arrays["loss"],
    }.items():
        save_arrays({**arrays, name: np.ascontiguousarray(value)}, tmp_path / "k.safetensors", meta)
        refused(tmp_path / "k.safetensors", pk.KnowledgeDistribution.load)


def every_change(value, rng, n):
    """Texts in which one place of a JSON value has something else."""
    places = [[]]
    for place in places:
        inner = value
        for step in place:
            inner = inner[step]
        steps = inner if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        places += [[*place, step] for step in steps]
    wrong = (None, -1, "x", [], {}, True, float("nan"), float("inf"), 10**30, [[]], {"a": 1})
    for place in rng.sample(places[1:], min(n, len(places) - 1)):
        copied = json.loads(json.dumps(value))
        inner = copied
        for step in place[:-1]:
            inner = inner[step]
        inner[place[-1]] = rng.choice(wrong)
        yield place, json.dumps(copied)


def rows():
    return {
        "layer": 0, "matrix": "x", "method": "wanda", "n_weights": 4, "n_zeros": 2, "error": 0.1, "ffn_error": [0.1],
        "kept": 0,
    }  # fmt: skip


def texts(model):
    report = pk.evaluate(model, byte_tokenizer(), ["perplexity", "zero_shot", "cost"], text="the sea. " * 40,
                         tasks=[choice_task(3)])  # fmt: skip
    loss = LossChange("recover", 1.0, 2.0, 4, "tokens")
    groups, sparse = pk.discover(model), SparsityReport("wanda", "50%", (rows(),), {"a": "b"}, ("c",), loss)
    return {
        "report": (report.to_json(), pk.Report.from_json),
        "sparsity": (sparse.to_json(), SparsityReport.from_json),
        "recovery": (json.dumps(RecoveryLog((1.0,), (0.1,), 4, 4, "LoRA()", loss).to_dict()), None),
        "plan": (pk.plan(groups, pk.score(model, groups, pk.Magnitude()), 0.2).to_json(), pk.PruningPlan.from_json),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["report", "sparsity", "recovery", "plan"])
def test_changed_json_is_refused_or_shown(kind, model, tmp_path):
    """Whatever one place holds, there is a PrunekitError, or a value that can be shown."""
    text, parse = texts(model)[kind]
    path = tmp_path / "x.json"
    n_refused = 0
    for place, wrong in every_change(json.loads(text), random.Random(0), 150):
        path.write_text(wrong)
        try:
            found = parse(wrong) if parse else RecoveryLog.load(path)
            repr(found), getattr(found, "_repr_html_", str)(), found.table()
        except PrunekitError:
            n_refused += 1
        except Exception as error:
            raise AssertionError(f"{kind}: {place}: {wrong[:200]}") from error
    assert n_refused > 10


def test_a_plan_that_names_very_many_units_is_shown_and_refused(model):
    """Without a list of those that go, for which there is no memory."""
    plan = pk.PruningPlan({"a.mlp:ffn_channel": [0]}, {"a.mlp:ffn_channel": 10**12}, 10, 5)
    assert "1 of 1 groups are cut" in repr(plan) and plan.cut_kinds == {"ffn_channel"} and not plan.takes_tokens
    with pytest.raises(PrunekitError, match="the plan is for another model: it has 1000000000000 units"):
        pk.prune(model, plan)


@pytest.mark.parametrize("load", [pk.Report.load, SparsityReport.load, RecoveryLog.load, pk.PruningPlan.load])
@pytest.mark.parametrize("content", [DEEP.encode(), b"\xff\xfe{}", b"[]", b"{}", b'{"rows": [1]}', b"9" * 10_000])
def test_files_that_are_no_results_are_refused(load, content, tmp_path):
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(PrunekitError):
        load(tmp_path / "r.json")
    with pytest.raises(PrunekitError, match="gone.json"):
        load(tmp_path / "gone.json")


def as_it_is(model, point):
    return model


def first(model, tokenizer):
    return 3.0


def journal_of(folder, n=3):
    space = HyperparameterSpace({"a": Range(0.0, 1.0)}, build=as_it_is)
    metric = Metric("figure", first, log=True)
    return pk.measure_pairs(space, small_model(), None, n, metric=metric, folder=folder)


EDITS = {
    "a figure that the metric cannot give": (r'("figure"): ?3.0', r"\1: -1000000000.0"),
    "a figure and its value": (r"\b3\.0\b", "-1.0"),
    "another value": (r'"values": ?\[3.0\]', '"values": [2.0]'),
    "no figure": (r'"figure": ?3.0', '"other": 3.0'),
    "a figure that is a word": (r'("figure"): ?3.0', r'\1: "low"'),
    "a candidate outside": (r'("a"): ?0\.\d+', r"\1: 7.5"),
    "all of it twice": (r"(?s)\A(.*)\Z", r"\1\1"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_journal_is_refused(name, tmp_path):
    assert len(journal_of(tmp_path)) == 3 and len(journal_of(tmp_path)) == 3
    journal = tmp_path / "journal.log"
    text = journal.read_text()
    journal.write_text(re.sub(*EDITS[name], text))
    if name == "a candidate outside" and journal.read_text() == text:
        journal.write_text(re.sub(r'("param_value_internal"|"param_value"): ?0\.\d+', r"\1: 7.5", text))
    assert journal.read_text() != text
    with pytest.raises(PrunekitError, match="journal.log"):
        journal_of(tmp_path, 4)
