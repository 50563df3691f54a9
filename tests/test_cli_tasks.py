"""`prunekit evaluate --tasks`: published tasks and texts from a folder, and the harness's own where it is installed."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
from evaluation_helpers import byte_tokenizer, llama
from shared import shared_path

import prunekit as pk
from prunekit.cli import main
from prunekit.evaluation import harness


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "dense"
    llama(max_position_embeddings=2048).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def test_tasks_and_a_text_by_name(dense, capsys):
    data = shared_path("data")
    options = ("--data-dir", str(data), "--limit", "3", "--tasks", "piqa,mmlu_virology")
    assert main(["evaluate", dense, *options, "--shots", "0"]) == 0
    captured = capsys.readouterr()
    assert "piqa" in captured.out and "mmlu_virology" in captured.out and "perplexity" not in captured.out
    assert re.search(r"piqa +0\.\d+ ± 0\.\d{3}", captured.out)
    assert "6 questions" in captured.out and "no zero_shot" not in captured.err
    assert main(["evaluate", dense, *options, "--metrics", "zero_shot", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["dense"]) >= {"piqa", "mmlu_virology"}


def test_a_text_by_name_is_read_from_the_folder(dense, tmp_path, capsys):
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb" / "ptb.test.txt").write_text("a b c d e f " * 30)
    options = ("--data", "ptb", "--data-dir", str(tmp_path), "--metrics", "perplexity", "--window", "32", "--json")
    assert main(["evaluate", dense, *options]) == 0
    assert json.loads(capsys.readouterr().out)["dense"]["protocol"]["n_tokens"] > 300


REFUSED = {
    "no such task": (("--tasks", "bollq"), "'bollq': no task of prunekit's own.*pip install 'prunekit\\[harness\\]'"),
    "misspelt, with a folder": (("--tasks", "piqua", "--data-dir", "."), r"'piqua': .*did you mean 'piqa'\?"),
    "no such file": (("--tasks", "boolq", "--data-dir", "."), r"boolq: no file boolq.validation\.jsonl"),
    "no limit": (("--tasks", "boolq", "--limit", "0"), "limit=0.*a limit is at least 1"),
    "nothing to read": ((), "has no default text; give --data with a text file, --tasks"),
    "nothing to ask": (("--metrics", "zero_shot"), "give tasks=, such as.*boolq.*--tasks"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_one_line(dense, options, message, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", dense, *options]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


def test_other_names_are_the_harnesss(dense, capsys, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs pip install 'prunekit[harness]'")
    asked = []

    def run(model, tokenizer, tasks, *, limit, shots):
        asked.append((tuple(tasks), limit, shots))
        metrics = {"exact_match": 0.25, "exact_match_stderr": 0.1, "name": "gsm8k", "sample_len": 5}
        return harness.HarnessResult({"gsm8k": metrics})

    monkeypatch.setattr(harness, "run_harness", run)
    monkeypatch.setattr(harness, "make_manager", lambda lm_eval, path, names: None)  # its index takes long to read
    assert main(["evaluate", dense, "--tasks", "gsm8k", "--limit", "5"]) == 0
    out = capsys.readouterr().out
    assert asked == [(("gsm8k",), 5, None)] and "gsm8k exact_match" in out and "0.25" in out and "stderr" not in out


def test_an_unknown_task_is_refused_before_a_model_is_loaded(capsys, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs pip install 'prunekit[harness]'")
    monkeypatch.setattr(harness, "_default_tasks", lambda: SimpleNamespace(all_tasks=["gsm8k"]))
    monkeypatch.setattr(pk, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    assert main(["evaluate", "nowhere", "--tasks", "gsm8k,piqua"]) == 2
    assert re.search(r"no task 'piqua' .*did you mean 'piqa'", capsys.readouterr().err)
