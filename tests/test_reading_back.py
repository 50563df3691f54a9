"""What is written is read back and held against the model before it is moved into place."""

import json

import pytest
import torch
from checkpoint_helpers import same_cut
from evaluation_helpers import llama
from families import LOCAL, SIZED, logits, plan_keeping
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config

import prunekit as pk
from prunekit.checkpoint import mapped_weights


def unpacked(folder):
    """A model of which the experts were packed into four bits in its folder, as those of gpt-oss are on the hub."""
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt_oss", **{**SIZED, **LOCAL, "intermediate_size": 64})
    )
    model.save_pretrained(folder)
    packed = {}
    for name, value in load_file(folder / "model.safetensors").items():
        packed[name] = value.to(torch.bfloat16)
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, width, rows = packed.pop(name).shape
            packed[f"{name}_blocks"] = torch.randint(0, 256, (experts, rows, width // 32, 16), dtype=torch.uint8)
            packed[f"{name}_scales"] = torch.full((experts, rows, width // 32), 120, dtype=torch.uint8)
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    how = Mxfp4Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=how)


@pytest.mark.parametrize("write", [pk.save, pk.export])
def test_experts_that_were_unpacked_on_loading_are_saved_whole(write, tmp_path):
    """`transformers` packs them again for the file, loses their scales, and does not read that."""
    model = unpacked(tmp_path / "packed")
    groups = pk.discover(model)
    small = pk.prune(model, plan_keeping(groups, {g.name: [0, 1, 3] for g in groups.of_kind("expert")}))
    write(small, tmp_path / "out")
    again = pk.load(tmp_path / "out")[0]
    for one in (small, again):
        one.config._experts_implementation = "eager"
    assert again.config.num_local_experts == 3 and torch.equal(logits(again), logits(small))


def spoilt(tensors, how):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = {"value": tensors[name] + 1, "shape": tensors[name][:-1].clone(), "dtype": tensors[name].half()}[
        how
    ]
    return tensors


@pytest.mark.parametrize("how", ["value", "shape", "dtype"])
@pytest.mark.parametrize("form", ["plain", "own"])
def test_what_does_not_read_back_is_not_left_there(form, how, tmp_path, monkeypatch):
    model = llama() if form == "plain" else same_cut("llama_gqa", True)
    if form == "plain":
        write = type(model).save_pretrained

        def wrong(folder, **options):
            write(model, folder, state_dict=spoilt(model.state_dict(), how), **options)

        monkeypatch.setattr(model, "save_pretrained", wrong)
    else:
        from prunekit.checkpoint import saving

        right = saving.save_torch_state_dict
        monkeypatch.setattr(saving, "save_torch_state_dict", lambda s, *a, **k: right(spoilt(s, how), *a, **k))
    with pytest.raises(pk.PrunekitError, match=r"layers\.1\.mlp\.up_proj\.weight is not read back as it was"):
        pk.save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_shard_that_does_not_read_back_is_not_moved_into_place(tmp_path, monkeypatch):
    """Where a checkpoint is streamed, each file is read back as it is written; the same call then goes on."""
    llama().save_pretrained(tmp_path / "in")
    right, name = mapped_weights.save_file, "model.layers.1.mlp.down_proj.weight"

    def wrong(tensors, path, **options):
        right({n: t + 1 if n == name else t for n, t in tensors.items()}, path, **options)

    monkeypatch.setattr(mapped_weights, "save_file", wrong)
    with pytest.raises(pk.PrunekitError, match=r"layers\.1\.mlp\.down_proj\.weight is not read back as it was"):
        pk.prune_checkpoint(tmp_path / "in", tmp_path / "out", pk.Magnitude(), 0.2, max_shard_size="30KB")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    plan = pk.prune_checkpoint(tmp_path / "in", tmp_path / "out", pk.Magnitude(), 0.2, max_shard_size="30KB")
    small = pk.prune(pk.load(tmp_path / "in")[0], plan)
    assert torch.equal(logits(pk.load(tmp_path / "out")[0]), logits(small))


def test_a_shard_that_is_missing_is_noticed(tmp_path, monkeypatch):
    llama().save_pretrained(tmp_path / "in")
    right = mapped_weights._write_shard
    monkeypatch.setattr(mapped_weights, "_write_shard", lambda tensors, path: right(dict([*tensors.items()][1:]), path))
    with pytest.raises(pk.PrunekitError, match="is not read back as it was"):
        pk.prune_checkpoint(tmp_path / "in", tmp_path / "out", pk.Magnitude(), 0.2)
    assert not (tmp_path / "out").exists()


def test_an_export_that_transformers_writes_wrongly_is_not_left_there(tmp_path, monkeypatch):
    model = same_cut("llama_gqa", True)
    write = type(model).save_pretrained

    def wrong(self, folder, **options):
        write(self, folder, state_dict=spoilt(self.state_dict(), "value"), **options)

    monkeypatch.setattr(type(model), "save_pretrained", wrong)
    with pytest.raises(pk.PrunekitError, match=r"layers\.1\.mlp\.up_proj\.weight is not read back as it was"):
        pk.export(model, tmp_path / "out", layout="padded")
    assert not list(tmp_path.iterdir())
