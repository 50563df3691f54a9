"""Files that come from others: nothing is read from elsewhere, nothing runs for long, and nothing is left out."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import same_cut
from evaluation_helpers import byte_tokenizer, gpt2, llama
from families import FAMILIES
from safetensors.torch import load_file, save_file
from test_broken_checkpoints import INDEX, UP, WEIGHTS, base, config, edit, index, link, stages, tensors, text
from torch import nn

import prunekit as pk
from prunekit.checkpoint.loading import load_structure
from prunekit.cli import main
from prunekit.errors import PrunekitError
from prunekit.files import LARGEST, check_regular, read_json


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Sound folders: plain ones of several families, a sharded one and one of an uneven cut."""
    root = tmp_path_factory.mktemp("others")
    pk.save(llama(num_hidden_layers=4), root / "plain", tokenizer=byte_tokenizer())
    pk.save(llama(), root / "sharded", max_shard_size="20KB")
    pk.save(gpt2(), root / "gpt2")
    pk.save(same_cut("llama_gqa", True), root / "cut")
    for family in ("gemma3", "mixtral"):
        FAMILIES[family].model().save_pretrained(root / family)
    for folder in root.iterdir():
        pk.load(folder)
    return root


def nested(name, **changes):
    def change(folder):
        whole = json.loads((folder / "config.json").read_text())
        edit(folder / "config.json", {name: {**whole.get(name, {}), **changes}})

    return change


def pipe(name):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def beside(name, content):
    return lambda folder: (folder / name).write_text(json.dumps(content))


def integers(part):
    def change(weights):
        name = next(name for name in weights if part in name)
        weights[name] = (weights[name] * 100).int()

    return tensors(change)


def biased(folder):
    """Biases are stored that the configuration does not mention."""
    weights = load_file(folder / WEIGHTS)
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def every_cut_again(n):
    return stages(lambda old: [*old, *[{name: list(range(len(units))) for name, units in old[0].items()}] * n])


WRONG = {
    "weights named elsewhere": ("plain", config(transformers_weights="../x.safetensors"), ["transformers_weights"]),
    "weights named in a part": ("gemma3", nested("text_config", transformers_weights="x"), ["transformers_weights"]),
    "weights named of a cut": ("cut", config(transformers_weights="x.safetensors"), ["transformers_weights"]),
    "an index of a pickle": ("sharded", index(lambda m: m.update({UP: "../x.bin"})), [INDEX, "'../x.bin'"]),
    "an adapter beside": ("plain", beside("adapter_config.json", {"base_model_name_or_path": "x"}), ["an adapter"]),
    "a pipe for a configuration": ("plain", pipe("config.json"), ["config.json", "a pipe or a device"]),
    "a pipe for a tokenizer": ("plain", pipe("tokenizer_config.json"), ["tokenizer_config.json", "a pipe"]),
    "a pipe for weights": ("plain", pipe(WEIGHTS), [WEIGHTS, "a pipe"]),
    "a device for a configuration": ("plain", link("config.json", "/dev/zero"), ["config.json", "a pipe or a device"]),
    "architectures that are a number": ("plain", config(architectures=-1), ["architectures=-1", "a list of texts"]),
    "a model type that is a list": ("plain", config(model_type=[]), ["model_type=[]", "a text"]),
    "a million layers in a part": ("gemma3", nested("text_config", num_hidden_layers=10**6), ["num_hidden_layers"]),
    "a billion decoder layers": ("plain", config(decoder_layers=10**9), ["decoder_layers=1,000,000,000"]),
    "layers by another name": ("gpt2", config(n_layer=10**6), ["n_layer=1,000,000"]),
    "positions without end": ("gpt2", config(n_positions=10**9), ["n_positions=1,000,000,000"]),
    "layers below 0 in a base": ("cut", base(num_hidden_layers=-3), ["num_hidden_layers=-3"]),
    "experts without end": ("mixtral", config(num_local_experts=10**9), ["config.json"]),
    "400 cuts": ("cut", every_cut_again(400), ["401 cuts", "100"]),
    "fewer layers than stored": ("plain", config(num_hidden_layers=1), ["model.layers.1", "too few layers"]),
    "no layers": ("plain", config(num_hidden_layers=0), ["model.layers.0", "too few layers"]),
    "layers below 0": ("plain", config(num_hidden_layers=-3), ["num_hidden_layers=-3"]),
    "biases left out": ("plain", biased, ["q_proj.bias", "no place"]),
    "two matrices tied": ("plain", config(tie_word_embeddings=True), ["tie_word_embeddings", "two different"]),
    "whole numbers in an expert": ("mixtral", integers("experts.0.w1"), ["stored as I32"]),
    "a cache of no kind": (
        "cut",
        beside("generation_config.json", {"cache_implementation": "x", "num_beams": "y"}),
        ["generation_config.json"],
    ),
    "a report nested too deep": ("plain", text("sparsity.json", b"[" * 100_000), ["sparsity.json"]),
    "a plan that is a pipe": ("plain", pipe("sparsity.json"), ["sparsity.json", "a pipe"]),
}

# Discovery reads no values, and nothing that stands beside.
OF_VALUES = {"two matrices tied", "whole numbers in an expert", "a cache of no kind", *list(WRONG)[-2:]}


def copied(source, target):
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("name", WRONG)
def test_files_from_others_are_refused_by_name_and_soon(name, others, tmp_path):
    source, change, words = WRONG[name]
    folder = copied(others / source, tmp_path / "copy")
    change(folder)
    began = time.monotonic()
    for read in (pk.load,) if name in OF_VALUES else (pk.load, load_structure):
        with pytest.raises(PrunekitError) as refused:
            read(folder)
        assert all(word in str(refused.value) for word in words), str(refused.value)
    assert time.monotonic() - began < 30


def test_a_stream_refuses_the_same(others, tmp_path):
    folder = copied(others / "plain", tmp_path / "copy")
    edit(folder / "config.json", {"num_hidden_layers": 10**9})
    with pytest.raises(PrunekitError, match="num_hidden_layers=1,000,000,000"):
        pk.prune_checkpoint(folder, tmp_path / "out", pk.Magnitude(), 0.2)


def test_what_others_leave_out_of_a_model_of_pictures_is_no_fault(others, tmp_path):
    folder = copied(others / "plain", tmp_path / "copy")
    weights = load_file(folder / WEIGHTS)
    weights["vision_tower.layers.9.weight"] = torch.ones(2)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    model, _ = pk.load(folder)
    assert isinstance(model, nn.Module)


def test_files_are_read_to_a_size_and_json_to_a_depth(tmp_path):
    for content, words in ((b"[" * 10**6, "is not JSON"), (b"9" * 10**4, "is not JSON"), (b"\xff", "as text")):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(PrunekitError, match=rf"x.json.* {words}"):
            read_json(tmp_path / "x.json", "save")
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(PrunekitError, match=f"large.json.*{LARGEST:,} are read at most; give the path"):
        read_json(tmp_path / "large.json", "save")
    with pytest.raises(PrunekitError, match="cannot read.*File name too long"):
        check_regular(Path("x" * 400))


def test_commands_refuse_names_that_no_file_can_have(capsys):
    for name in ("x" * 400, "x\0y", "~nobody/x"):
        assert main(["discover", name]) == 2
        assert "Traceback" not in capsys.readouterr().err
