"""What files and names say is shown as text: no HTML, no heading, no control sequence comes of it."""

import json
from dataclasses import replace

import pytest
from evaluation_helpers import llama

import prunekit as pk
from prunekit.account import LossChange
from prunekit.checkpoint.cards import markdown_table, model_card
from prunekit.cli import main
from prunekit.escaping import in_code, in_fence, in_markdown, printable
from prunekit.importance import Scores
from prunekit.search.pairs import Pairs
from prunekit.sparsity import SparsityReport

SCRIPT = "<script>alert(1)</script>"
WILD = f"a\n\n# heading {SCRIPT} <img src=x onerror=alert(1)> `code` | \x1b[31mred"


@pytest.fixture(scope="module")
def planned():
    model = llama()
    groups = pk.discover(model)
    scores = pk.score(model, groups, pk.Magnitude())
    return model, scores, pk.plan(groups, scores, 0.2)


def test_text_is_shown_as_text_in_markdown():
    assert in_markdown(WILD).count("\n") == 0 and "<" not in in_markdown(WILD) and "\x1b" not in in_markdown(WILD)
    assert in_code("a`b\nc") == "`a'b c`" and in_fence("a\n```\n# b") == "```\na\n'''\n# b\n```"
    assert markdown_table([("a",), ("x | y\nz",)]).splitlines()[2] == "| x \\| y z |"
    assert in_markdown("kv_head: 3 of 8 (½)") == "kv_head: 3 of 8 (½)"


def test_a_terminal_is_not_controlled():
    assert printable("a\x1b[2Jb\u202ec\td\ne") == "a\\x1b[2Jb\\u202ec\td\ne"
    assert printable("ä – 猫") == "ä – 猫"


def test_values_show_what_files_say_as_text(planned):
    _, scores, plan = planned
    noted = replace(plan, notes={"whole": SCRIPT})
    labelled = Scores(scores, label=SCRIPT, kinds=scores.kinds)
    pairs = Pairs(None, pk.compare({"a": pk.Report()}).assign(**{SCRIPT: 1.0}), SCRIPT)
    report = SparsityReport(SCRIPT, SCRIPT, (), {SCRIPT: SCRIPT}, (SCRIPT,))
    for value in (noted, labelled, pairs):
        assert SCRIPT in repr(value) and SCRIPT not in value._repr_html_() and "&lt;script&gt;" in value._repr_html_()
    assert SCRIPT in repr(report)


def test_the_card_shows_what_files_say_as_text(planned):
    model, _, plan = planned
    row = {
        "layer": 0, "matrix": "x", "method": WILD, "n_weights": 4, "n_zeros": 2, "error": 0.1, "ffn_error": None,
        "kept": None,
    }  # fmt: skip
    zeros = SparsityReport(WILD, WILD, (row,), {}, (WILD,))
    model.loss_change = LossChange("prune", 1.0, 2.0, 4, WILD)
    report = pk.Report()
    card = model_card(model, "plain", replace(plan, notes={"whole": WILD, WILD: WILD}), report, zeros, [], [])
    del model.loss_change
    assert "\n# heading" not in card and "<script" not in card and "<img" not in card and "\x1b" not in card
    assert "# heading" in card


def test_commands_print_names_as_text(planned, tmp_path, capsys):
    model, _, plan = planned
    folder = tmp_path / "a\x1b[31mb`<img src=x>"
    pk.save(model, folder)
    assert main(["discover", str(folder)]) == 0 and "\x1b" not in capsys.readouterr().out
    assert main(["discover", f"{folder}/gone"]) == 2 and "\x1b" not in capsys.readouterr().err
    plan.save(tmp_path / "plan.json")
    out = tmp_path / "out"
    assert main(["prune", str(folder), "--plan", str(tmp_path / "plan.json"), "--out", str(out), "--json"]) == 0
    assert "<img" not in (out / "README.md").read_text() and "\x1b" not in (out / "README.md").read_text()
    assert json.loads(capsys.readouterr().out)["out"] == str(out)
