"""`prunekit discover` on a folder: without its weights."""

import json

import pytest
import torch
from evaluation_helpers import llama
from families import FAMILIES, plan_keeping, random_units
from safetensors.torch import save_file

import prunekit as pk
from prunekit.checkpoint import load, loading
from prunekit.cli import main

NAMES = ("gpt2", "bloom", "mixtral")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def discovered(capsys, path):
    capsys.readouterr()
    assert main(["discover", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    del found["model"]
    return found


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_discovered_without_its_weights(name, cut, folder, monkeypatch, capsys):
    family, path = FAMILIES[name], folder / f"{name}_{cut}"
    model = family.model(dtype=torch.float32)
    if cut:
        groups = pk.discover(model)
        model = pk.prune(model, plan_keeping(groups, random_units(family, groups, seed=0, share=0.3)))
    pk.save(model, path)
    expected = pk.discover(load(path)[0]).to_dict()
    mapped, load_cut = [], loading.load_cut
    monkeypatch.setattr(loading, "load_cut", lambda *args, **how: mapped.append(how) or load_cut(*args, **how))
    structure = loading.load_structure(path)
    own = json.loads((path / "config.json").read_text())["model_type"] == "prunekit"
    assert mapped == [{"mapped": True}] * own and (own or all(p.is_meta for p in structure.parameters()))
    assert discovered(capsys, path) == json.loads(json.dumps(expected))


def test_a_matrix_that_is_stored_twice_is_one(folder, capsys):
    """Tied models are stored with both names by some programs."""
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(folder / "twice")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert "lm_head.weight" in weights
    save_file(weights, folder / "twice" / "model.safetensors", {"format": "pt"})
    expected = pk.discover(load(folder / "twice")[0]).to_dict()
    assert discovered(capsys, folder / "twice") == json.loads(json.dumps(expected))


def test_a_folder_of_another_class_is_loaded_first(folder, capsys):
    """Which class a configuration stands for, loading knows."""
    llama().model.save_pretrained(folder / "headless")
    assert main(["discover", str(folder / "headless")]) == 2
    assert "is a LlamaModel, no causal language model" in capsys.readouterr().err


def test_a_cut_model_that_save_pretrained_wrote_is_refused(folder, capsys):
    model = llama()
    groups = pk.discover(model)
    name = "model.layers.0.mlp:ffn_channel"
    small = pk.prune(model, plan_keeping(groups, {name: [0, 1, 2, 3]}))
    type(small).save_pretrained(small, folder / "mute")  # its own refuses
    assert main(["discover", str(folder / "mute")]) == 2
    assert "cut by prunekit and written by save_pretrained" in capsys.readouterr().err


def test_layers_without_end_are_refused_before_they_are_built(folder, capsys):
    llama().save_pretrained(folder / "tall")
    path = folder / "tall" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 10**9}))
    assert main(["discover", str(folder / "tall")]) == 2
    assert "num_hidden_layers=1,000,000,000" in capsys.readouterr().err
