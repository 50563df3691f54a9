"""`prunekit discover` on a folder: without the weights where that says the same, with them where it must."""

import json

import pytest
import torch
from evaluation_helpers import llama
from families import FAMILIES, plan_keeping, random_units

import prunekit as pk
from prunekit.checkpoint import load
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


def never(*args, **options):
    raise AssertionError("weights were loaded")


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
    monkeypatch.setattr("prunekit.checkpoint.loading.load", never)
    assert discovered(capsys, path) == json.loads(json.dumps(expected))


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
