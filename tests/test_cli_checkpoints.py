"""What the shell says of the folders it writes: what is not plain, whose tokens went, what filling up costs."""

import json

import pytest
from evaluation_helpers import byte_tokenizer, dense_folder
from gguf import GGUFReader

from prunekit import discover, load
from prunekit.cli import main
from prunekit.pruning import PruningPlan


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A checkpoint folder with a tokenizer, and a text beside it."""
    return dense_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def fewer_tokens(dense):
    """Cut from it: the folder with every second token, and what the shell said."""
    model, _ = load(dense)
    size = model.config.vocab_size
    name = discover(model).of_kind("vocabulary")[0].name
    PruningPlan({name: list(range(0, size, 2))}, {name: size}, 10, 9).save(dense.parent / "plan.json")
    return dense.parent / "fewer"


@pytest.mark.parametrize("streaming", ["--streaming", "--no-streaming"])
def test_prune_says_that_tokens_have_new_numbers(streaming, dense, fewer_tokens, tmp_path, capsys):
    plan = str(fewer_tokens.parent / "plan.json")
    assert main(["prune", str(dense), "--plan", plan, streaming, "--out", str(tmp_path / "out")]) == 0
    said = "ts tokens were renumbered (plan.json lists, under keep, the old number of each new one)"
    assert f"{said}: no tokenizer is saved" in capsys.readouterr().out
    assert f"{said}. The tokenizer of the uncut model does not fit" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("command", [("evaluate",), ("recover", "--out", "OUT")])
def test_the_tokenizer_of_the_uncut_model_is_refused_beside_a_cut_vocabulary(
    command, dense, fewer_tokens, tmp_path, capsys
):
    plan, out, text = str(fewer_tokens.parent / "plan.json"), tmp_path / "out", str(dense.parent / "text.txt")
    assert main(["prune", str(dense), "--plan", plan, "--out", str(out)]) == 0
    byte_tokenizer().save_pretrained(out)
    capsys.readouterr()
    options = [option.replace("OUT", str(tmp_path / "again")) for option in command[1:]]
    assert main([command[0], str(out), "--data", text, *options]) == 2
    assert "were renumbered (plan.json lists, under keep, the old" in capsys.readouterr().err


@pytest.mark.parametrize("streaming", ["--streaming", "--no-streaming"])
def test_prune_ends_with_what_keeps_the_result_from_being_plain(streaming, dense, tmp_path, capsys):
    options = ["--pruning-ratio", "0.2", "--importance", "l1", streaming, "--ranking", "global"]
    assert main(["prune", str(dense), *options, "--out", str(tmp_path / "uneven")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    kept = PruningPlan.load(tmp_path / "uneven" / "plan.json").table().query("kind == 'ffn_channel'")
    assert last.startswith("not a plain checkpoint (")
    assert f"ffn_channel: {kept['kept'].min()} to {kept['kept'].max()} of {kept['n_units'].max()} in each layer" in last
    assert last.endswith("): loads with prunekit; prunekit export --layout padded fills them up")


def test_prune_tells_of_even_layers_only_who_did_not_ask_for_them(dense, tmp_path, capsys):
    """A ratio of parameters is met to the last one: five channels cannot be taken evenly from two layers."""
    model, _ = load(dense)
    ratio = 5 * 3 * model.config.hidden_size / model.num_parameters()
    options = ["--pruning-ratio", str(ratio), "--importance", "l1", "--kinds", "ffn_channel"]
    assert main(["prune", str(dense), *options, "--out", str(tmp_path / "a")]) == 0
    assert "loads with prunekit; --of units keeps layers even, prunekit export" in capsys.readouterr().out
    assert main(["prune", str(dense), *options, "--of", "units", "--out", str(tmp_path / "b")]) == 0
    assert "--of units" not in capsys.readouterr().out


def test_export_tells_what_filling_up_costs(dense, tmp_path, capsys):
    options = ["--pruning-ratio", "0.2", "--importance", "l1", "--ranking", "global"]
    assert main(["prune", str(dense), *options, "--out", str(tmp_path / "uneven")]) == 0
    before = sum(p.numel() for p in load(tmp_path / "uneven")[0].parameters())
    capsys.readouterr()
    assert main(["export", str(tmp_path / "uneven"), "--layout", "padded", "--out", str(tmp_path / "even")]) == 0
    after = sum(p.numel() for p in load(tmp_path / "even")[0].parameters())
    assert after > before and f"{before:,} parameters before, {after:,} after" in capsys.readouterr().out


def test_export_to_gguf_says_that_the_vocabulary_stays_outside(tmp_path, capfd):
    assert main(["export", "world", "--layout", "gguf", "--out", str(tmp_path / "out"), "--json"]) == 0
    told = capfd.readouterr()
    reason = "model.gguf holds no vocabulary: llama.cpp is not known to read a WordLevel tokenizer"
    assert told.err.startswith(f"prunekit: {reason}") and told.err.count("\n") == 1
    assert reason in (tmp_path / "out" / "README.md").read_text()
    written = sum(int(tensor.n_elements) for tensor in GGUFReader(tmp_path / "out" / "model.gguf").tensors)
    assert json.loads(told.out)["n_parameters_written"] == written
