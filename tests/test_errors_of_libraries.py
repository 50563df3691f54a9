"""Errors of other libraries: prunekit's own sentence, the library's own words in the traceback behind it."""

import ast
import gzip
import json
import re
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from test_public_reports import tiny

import prunekit as pk
from prunekit.checkpoint.config_checks import check_config
from prunekit.cli import TRACEBACK, main
from prunekit.errors import PrunekitError, reason

PACKAGE = Path(pk.__file__).parent


def caught(work):
    with pytest.raises(Exception) as found:
        work()
    return found.value


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (lambda: json.loads('{"a": 1,\n "b"'), "no JSON from line 2, column 5 on"),
        (lambda: b"\xe9".decode(), "it is not written in UTF-8"),
        (lambda: gzip.decompress(b"PK"), "it is cut short or damaged"),
        (lambda: gzip.decompress(gzip.compress(b"a" * 99)[:-9]), "it is cut short or damaged"),
        (lambda: zlib.decompress(b"x"), "it is cut short or damaged"),
        (lambda: open("/nowhere/at/all"), "No such file or directory"),  # noqa: SIM115, PTH123
        (lambda: _raise(ConnectionError("HTTPSConnectionPool")), "the network or the hub does not answer"),
        (lambda: {}["width"], "'width' was not found"),
        (lambda: safe_open(__file__, "pt"), "it is no safetensors file, or cut short"),
        (lambda: torch.ones(2) @ torch.ones(3), "RuntimeError, see the traceback"),
    ],
)
def test_reasons_are_words_of_our_own(work, said):
    assert reason(caught(work)) == said
    assert reason(PrunekitError("its own words")) == "its own words"


def pasted(module):
    """Lines on which a caught error is written into an f-string as it is, where it may be another library's."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    found = []
    for handler in ast.walk(tree):
        if not isinstance(handler, ast.ExceptHandler) or handler.name != "error":
            continue
        ours = handler.type is not None and ast.unparse(handler.type) == "PrunekitError"
        for value in ast.walk(handler):
            text = ast.unparse(value.value) if isinstance(value, ast.FormattedValue) else ""
            if not ours and re.fullmatch(r"error|str\(error\).*|first_line\(error\).*", text):
                found.append(f"{module.relative_to(PACKAGE)}:{value.lineno}: {text}")
    return found


def test_no_sentence_of_ours_ends_in_words_of_others():
    found = [line for module in sorted(PACKAGE.rglob("*.py")) for line in pasted(module)]
    allowed = {
        "checkpoint/loading.py",  # a PrunekitError, beside whose kinds others are caught
        "text.py",  # the words of the chat template, which its author wrote for users
        "checks.py",  # Python's own words for arguments that a function does not take
    }
    assert not [line for line in found if line.split(":")[0] not in allowed]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": None}, "config.json has no model_type"),
        ({"model_type": "gemma9"}, "no release of transformers here knows 'gemma9'"),
        ({"model_type": "mine", "auto_map": {"AutoConfig": "a.B"}}, r"'mine' is code that comes with it.*trust_remote"),
        ({"intermediate_size": -8}, "intermediate_size=-8 in its config.json is no integer of 0 or more"),
        ({"num_attention_heads": "many"}, "num_attention_heads='many' in its config.json"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers=2.5 in its config.json"),
    ],
)
def test_configurations_that_no_model_has_are_refused_by_field(tmp_path, config, said):
    tiny().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    told = json.loads(path.read_text()) | config
    path.write_text(json.dumps({name: value for name, value in told.items() if value is not None}))
    with pytest.raises(PrunekitError, match=said):
        pk.load(tmp_path)


def test_what_is_not_known_keeps_its_traceback(tmp_path, capsys, monkeypatch):
    """In Python as the cause; in the shell behind one line that says how to see it."""
    tiny().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    error = caught(lambda: pk.load(tmp_path / "model"))
    assert isinstance(error, PrunekitError) and "cannot load the tokenizer of" in str(error)
    assert error.__cause__ is not None and not isinstance(error.__cause__, SafetensorError)
    assert "traceback" in str(error) or "was not found" in str(error)
    assert main(["discover", str(tmp_path / "model")]) in (0, 2)
    capsys.readouterr()
    options = ["--importance", "l2", "--pruning-ratio", "0.2", "--out", str(tmp_path / "out")]
    assert main(["prune", str(tmp_path / "model"), *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.endswith(f"({TRACEBACK}=1 shows the error behind this)")
    monkeypatch.setenv(TRACEBACK, "1")
    assert main(["prune", str(tmp_path / "model"), *options]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_number_that_is_no_count_may_be_a_float():
    check_config("here", {"model_type": "minimax", "full_attn_alpha_factor": 3.56}, False)
    with pytest.raises(PrunekitError, match="num_hidden_layers=3.56"):
        check_config("here", {"model_type": "minimax", "num_hidden_layers": 3.56}, False)
