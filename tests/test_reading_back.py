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
