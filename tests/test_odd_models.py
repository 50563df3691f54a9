"""Models that are no plain checkpoint of a language model: what is taken, and what is refused with the next step."""

import json

import pytest
import torch
from families import FAMILIES, logits
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import prunekit as pk
from prunekit import PrunekitError

QUANTIZED = {
    "mxfp4": r"is quantized \(mxfp4\).* quantization_config=Mxfp4Config\(dequantize=True\)\), then prunekit.save",
    "fp8": r"is quantized \(fp8\).* quantization_config=FineGrainedFP8Config\(dequantize=True\)",
    "bitsandbytes": r"is quantized \(bitsandbytes\).*\.dequantize\(\), then prunekit.save",
    "awq": r"is quantized \(awq\).* give the checkpoint it was made from",
}
TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 96, "vocab_size": 64}  # fmt: skip


@pytest.mark.parametrize("method", QUANTIZED)
def test_quantized_weights_are_refused_with_what_dequantizes_them(tmp_path, method):
    FAMILIES["llama_gqa"].model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    with pytest.raises(PrunekitError, match=QUANTIZED[method]):
        pk.load(tmp_path)


def test_offloaded_weights_are_refused_by_the_module(tmp_path):
    FAMILIES["llama_gqa"].model().save_pretrained(tmp_path / "m")
    names = [name for name, _ in FAMILIES["llama_gqa"].model().named_children()]
    places = {f"model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb", "layers.0")} | {
        "lm_head": "cpu"
    }
    places["model.layers.1"] = "disk"
    assert "model" in names
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", device_map=places, offload_folder=tmp_path / "off")
    with pytest.raises(PrunekitError, match=r"weights of model.layers.1.* are offloaded \(device_map\)"):
        pk.discover(model)


def test_the_language_model_of_a_model_of_pictures_and_text_is_loaded(tmp_path):
    config = AutoConfig.for_model("qwen3_5")
    for part in (config.text_config, config.vision_config):
        for name, value in {**TEXT, "depth": 1, "num_heads": 4, "out_hidden_size": 64}.items():
            if hasattr(part, name):
                setattr(part, name, value)
    config.text_config.layer_types = ["full_attention"] * 2
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    model, _ = pk.load(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model) is type(expected) and torch.equal(logits(model), logits(expected))


def test_another_kind_of_model_is_refused_by_its_name(tmp_path):
    FAMILIES["llama_gqa"].model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForSequenceClassification"]}))
    with pytest.raises(PrunekitError, match="LlamaForSequenceClassification, no causal language model; give one that"):
        pk.load(tmp_path)


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_code_that_a_configuration_names_is_not_fetched(tmp_path, field):
    FAMILIES["llama_gqa"].model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: "somebody/kernel"}))
    with pytest.raises(PrunekitError, match=f"has {field}='somebody/kernel', code of a repository"):
        pk.load(tmp_path)
    within = {"text_config": {"model_type": "prunekit", field: "somebody/kernel"}}  # only a whole checkpoint is ours
    (tmp_path / "config.json").write_text(json.dumps({**config, **within}))
    with pytest.raises(PrunekitError, match=f"has {field}='somebody/kernel', code of a repository"):
        pk.load(tmp_path)
