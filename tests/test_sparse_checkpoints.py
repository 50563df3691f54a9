"""Sparse models on disk: what is saved is what is loaded, and what is told is true."""

import json

import pytest
import torch
from evaluation_helpers import dense_folder
from families import FAMILIES, logits, plan_keeping
from safetensors.torch import load_file
from test_importance import tiny_llama
from test_keeping_zeros import keeps, sparse, told, zeros_of
from test_recovery import QUICK, counting
from transformers import AutoModelForCausalLM

import prunekit as pk
from prunekit import PrunekitError, export, load, recover, save, sparsify
from prunekit.cli import main
from prunekit.sparsity import SparsityReport


def cut_sparse(how=0.5):
    """A model with one head left and channels that differ by layer, so that it needs prunekit's layout; with zeros."""
    model = FAMILIES["llama_gqa"].model(dtype=torch.float32)
    groups = pk.discover(model)
    keep = {g.name: list(range(g.n_units // (2 + 2 * g.layer))) for g in groups.of_kind("ffn_channel")}
    return sparsify(pk.prune(model, plan_keeping(groups, keep)), None, "magnitude", how)


def fill(model, n=3):
    """Put ones where zeros are."""
    name, weight = next(iter(told(model).items()))
    with torch.no_grad():
        weight[tuple((weight == 0).nonzero()[:n].T)] = 1.0
    return name


@pytest.mark.parametrize(("name", "how"), [("llama", 0.5), ("conv1d", "2:4"), ("experts", 0.5), ("cut", "2:4")])
def test_a_sparse_model_is_saved_and_loaded_as_it_is(name, how, tmp_path):
    model = cut_sparse(how) if name == "cut" else sparse(name, how)
    zeros = zeros_of(model)
    again, _ = load(save(model, tmp_path / "out"))
    assert torch.equal(logits(again), logits(model)) and keeps(again, zeros)
    assert again.sparsity_report == model.sparsity_report
    assert all(torch.equal(found, zeros[name]) for name, found in zeros_of(again).items())
    kind = json.loads((tmp_path / "out" / "config.json").read_text())["model_type"]
    assert (kind == "prunekit") == (name == "cut")
    twice, _ = load(save(again, tmp_path / "twice"))
    assert twice.sparsity_report == model.sparsity_report


def test_the_folder_is_ordinary(tmp_path):
    model = sparse()
    folder = save(model, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(plain.eval()), logits(model)) and not hasattr(plain, "sparsity_report")
    stored = load_file(folder / "model.safetensors")
    dense = save(tiny_llama(), tmp_path / "dense")
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder, dense)]
    assert sizes[0] == sizes[1] and all(stored[name].eq(0).any() for name in told(model))
    assert SparsityReport.from_json((folder / "sparsity.json").read_text()) == model.sparsity_report
    assert not (dense / "sparsity.json").exists() and "## Zeros" not in (dense / "README.md").read_text()
    assert not hasattr(load(dense)[0], "sparsity_report")


def test_the_card_says_what_was_done_and_what_it_is_good_for(tmp_path):
    model = sparsify(tiny_llama(), counting(), "sparsegpt", 0.5)
    card = (save(model, tmp_path / "out") / "README.md").read_text()
    section = card.split("## Zeros")[1].split("## Load")[0]
    assert repr(model.sparsity_report) in section
    for layer, row in model.sparsity_report.by_layer().iterrows():
        assert f"| {layer} | {row['sparsity']:.2%} | {row['error']:.4f} |" in section
    for said in ("numbers like any other", "make nothing faster", "no smaller", "2:4", "capability 8.0",
                 "measure", "No other pattern is faster"):  # fmt: skip
        assert said in section
    unmeasured = (save(sparse(), tmp_path / "other") / "README.md").read_text()
    assert "| 0 | 50.52% | not measured |" in unmeasured


def test_remarks_stand_in_the_card(tmp_path):
    recovered = recover(sparse(), QUICK, counting())
    card = (save(recovered, tmp_path / "out") / "README.md").read_text()
    assert "- the model was trained after it was sparsified; the output errors and the loss are older" in card
    assert load(tmp_path / "out")[0].sparsity_report == recovered.sparsity_report


def test_zeros_that_were_filled_are_told(tmp_path):
    model = sparse()
    before = model.sparsity_report
    name = fill(model)
    folder = save(model, tmp_path / "out")
    said = f"3 zeros of 1 matrices ({name}, …) were filled after sparsification"
    told_now = SparsityReport.from_json((folder / "sparsity.json").read_text())
    assert said in (folder / "README.md").read_text() and any(said in remark for remark in told_now.remarks)
    was, now = ({row["matrix"]: row["n_zeros"] for row in report.rows} for report in (before, told_now))
    assert now == {**was, name: was[name] - 3}
    assert model.sparsity_report == before  # saving changes no model
    again, _ = load(folder)
    assert again.sparsity_report == told_now
    save(again, tmp_path / "twice")
    assert (tmp_path / "twice" / "sparsity.json").read_text() == (folder / "sparsity.json").read_text()


def test_a_report_does_not_outlive_its_matrices(tmp_path):
    model = sparse()
    groups = pk.discover(model)
    keep = {g.name: list(range(g.n_units // 2)) for g in groups.of_kind("ffn_channel")}
    small = pk.prune(model, plan_keeping(groups, keep))
    small.sparsity_report = model.sparsity_report  # as a copied attribute would be
    folder = save(small, tmp_path / "out")
    assert not (folder / "sparsity.json").exists() and "## Zeros" not in (folder / "README.md").read_text()
    assert not hasattr(load(folder)[0], "sparsity_report")


def test_exports_tell_of_zeros_where_the_matrices_are_the_same(tmp_path):
    model = sparse()
    plain = export(model, tmp_path / "plain", layout="plain")
    assert SparsityReport.from_json((plain / "sparsity.json").read_text()) == model.sparsity_report
    padded = export(cut_sparse(), tmp_path / "padded", layout="padded")
    assert not (padded / "sparsity.json").exists()


def first_row(**changes):
    return lambda told: told["rows"][0].update(changes)


TEXTS = {"no JSON": lambda text: text[:-20], "no text": lambda text: "\ud800", "no object": lambda text: "[1, 2]",
         "too deep": lambda text: "[" * 100_000}  # fmt: skip
BROKEN = {
    "a key lacks": lambda told: told.pop("remarks"),
    "no rows": lambda told: told.update(rows=[]),
    "rows of text": lambda told: told.update(rows="abc"),
    "a row of text": lambda told: told.update(rows=["abc"]),
    "a field lacks": lambda told: told["rows"][0].pop("error"),
    "a number as text": first_row(n_zeros="3"),
    "a truth value": first_row(n_zeros=True),
    "a matrix as number": first_row(matrix=3),
    "another matrix": first_row(matrix="model.layers.7.mlp.up_proj.weight"),
    "an expert of a matrix": first_row(matrix="model.layers.0.self_attn.q_proj.weight[0]"),
    "another size": first_row(n_weights=12),
    "remarks as numbers": lambda told: told.update(remarks=[1]),
    "left as list": lambda told: told.update(left=["x"]),
    "a method as list": lambda told: told.update(method=[]),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_broken_report_is_refused_by_name(broken, tmp_path):
    path = save(sparse(), tmp_path / "out") / "sparsity.json"
    content = json.loads(path.read_text())
    broken(content)
    path.write_text(json.dumps(content))
    with pytest.raises(PrunekitError, match=r"sparsity\.json' does not describe this model's zeros .*delete it"):
        load(tmp_path / "out")


def test_a_file_that_holds_no_report_is_refused_by_name(tmp_path):
    path = save(sparse(), tmp_path / "out") / "sparsity.json"
    text = path.read_text()
    for broken in TEXTS.values():
        path.write_bytes(broken(text).encode(errors="surrogatepass"))
        with pytest.raises(PrunekitError, match=r"sparsity\.json' does not describe this model's zeros"):
            load(tmp_path / "out")
    path.unlink()
    path.mkdir()
    with pytest.raises(PrunekitError, match=r"sparsity\.json' does not describe"):
        load(tmp_path / "out")
    path.rmdir()
    assert not hasattr(load(tmp_path / "out")[0], "sparsity_report")


def test_the_name_is_taken_only_where_there_is_a_report(tmp_path):
    with pytest.raises(PrunekitError, match=r"'sparsity\.json' is a part of the checkpoint"):
        save(sparse(), tmp_path / "out", files={"sparsity.json": "mine"})
    assert not (tmp_path / "out").exists()


def test_the_shell_recovers_a_sparse_folder_and_keeps_its_zeros(tmp_path, capsys):
    dense = dense_folder(tmp_path)
    model, tokenizer = load(dense)
    model = sparsify(model, None, "magnitude", 0.5)
    save(model, tmp_path / "sparse", tokenizer=tokenizer)
    (tmp_path / "text.txt").write_text("a quick brown fox jumps over the lazy dog. " * 40)
    given = ["recover", str(tmp_path / "sparse"), "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")]
    assert main([*given, "--max-steps", "3", "--seq-len", "32"]) == 0
    again, _ = load(tmp_path / "out")
    assert keeps(again, zeros_of(model)) and again.sparsity_report.rows == model.sparsity_report.rows
    changed = [n for n, p in again.named_parameters() if not p.equal(dict(model.named_parameters())[n])]
    card = (tmp_path / "out" / "README.md").read_text()
    assert changed and "## Zeros" in card and "## Recovered" in card
