"""Models that are no plain checkpoint of a language model: what is taken, and what is refused with the next step."""

import json
from importlib.metadata import version

import pytest
import torch
from evaluation_helpers import byte_tokenizer, choice_task, llama
from families import FAMILIES, logits, plan_keeping
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)

import prunekit as pk
from prunekit import PrunekitError
from prunekit.checkpoint import loading
from prunekit.models import empty_model
from prunekit.search import HyperparameterSpace, Metric, Range

QUANTIZED = {
    "mxfp4": r"is quantized \(mxfp4\).* quantization_config=Mxfp4Config\(dequantize=True\)\), then prunekit.save",
    "fp8": r"is quantized \(fp8\).* quantization_config=FineGrainedFP8Config\(dequantize=True\)",
    "bitsandbytes": r"is quantized \(bitsandbytes\).*\.dequantize\(\), then prunekit.save",
    "compressed-tensors": r"is quantized .* quantization_config=CompressedTensorsConfig\(dequantize=True\)",
    "awq": r"is quantized \(awq\).* give the checkpoint it was made from",
    "gptq": r"is quantized \(gptq\).* give the checkpoint it was made from",
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


@pytest.mark.parametrize("places", [{"": "disk"}, {"model": "cpu", "lm_head": "disk"}], ids=["all", "the head"])
def test_offloaded_weights_are_evaluated_as_in_memory(places, tmp_path):
    """accelerate brings them when their module runs; only weights that nothing brings are refused."""
    llama(num_hidden_layers=3).save_pretrained(tmp_path / "m")
    here = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    if "" in places and Version(version("accelerate")) < Version("1.15"):
        pytest.skip("accelerate before 1.15 refuses to offload a whole model")
    away = AutoModelForCausalLM.from_pretrained(tmp_path / "m", device_map=places, offload_folder=tmp_path / "off")
    assert any(p.is_meta for p in away.parameters())
    options = {"text": "the sea. " * 40, "tasks": [choice_task(6)], "perplexity_options": {"window": 32}}
    reports = [pk.evaluate(m, byte_tokenizer(), ["perplexity", "zero_shot"], **options) for m in (here, away)]
    assert reports[0].to_json() == reports[1].to_json()
    table = pk.generations({"here": here, "away": away}, byte_tokenizer(), ["the cat"], max_new_tokens=4).table
    assert table["here"].equals(table["away"].rename("here"))
    bare = AutoModelForCausalLM.from_config(here.config).to("meta")
    with pytest.raises(PrunekitError, match="load the weights first"):
        pk.perplexity(bare, byte_tokenizer(), "the sea. " * 40)


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


TOWERS = {
    "qwen2_5_vl": {
        "text_config": {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3],
                                                    "rope_theta": 1e4}},
        "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4,
                          "out_hidden_size": 64},
        "image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63,
    },
    "llava": {
        "text_config": {**TEXT, "model_type": "llama"}, "image_token_index": 60,
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48,
                          "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 14, "image_size": 28},
    },
    "gemma3": {
        "text_config": {**TEXT, "model_type": "gemma3_text", "sliding_window": 8}, "image_token_index": 60,
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48,
                          "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 14, "image_size": 28},
        "mm_tokens_per_image": 4, "boi_token_index": 61, "eoi_token_index": 62,
    },
}  # fmt: skip


def towers(name):
    """A model of pictures and text with as many layers for the one as for the other."""
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **TOWERS[name])).eval()


@pytest.mark.parametrize("kind", ["ffn_channel", "kv_head", "layer"])
@pytest.mark.parametrize("name", TOWERS)
def test_a_model_of_pictures_and_text_is_cut_in_its_language_model(name, kind, tmp_path):
    """Whether AutoModelForCausalLM builds the whole, as of Gemma 3, or nothing."""
    towers(name).save_pretrained(tmp_path / "in")
    model, _ = pk.load(tmp_path / "in")
    groups = pk.discover(model)
    chosen = groups.of_kind(kind)
    keep = {chosen[0].name: []} if kind == "layer" else {g.name: list(range(g.n_units // 2)) for g in chosen}
    small = pk.prune(model, plan_keeping(groups, keep))
    pk.save(small, tmp_path / "out")
    again, _ = pk.load(tmp_path / "out")
    assert type(again) is type(small) and torch.equal(logits(again), logits(small))
    assert again.config.vision_config.to_dict() == model.config.vision_config.to_dict()
    loader = "AutoModelForCausalLM" if name == "gemma3" else "AutoModelForImageTextToText"
    assert kind == "kv_head" or f"import {loader}" in (tmp_path / "out" / "README.md").read_text()
    if name == "llava":
        ids = torch.tensor([[1, 60, 60, 60, 60, 5]])
        seen = [m(ids, pixel_values=torch.ones(1, 3, 28, 28)).logits for m in (small, again)]
        assert torch.equal(*seen)


def test_what_a_tower_may_write_to_is_locked(tmp_path):
    model = towers("llava")
    with pytest.raises(PrunekitError, match=r"'hidden'; .* locked: .* model.vision_tower.* may write into it"):
        pk.discover(model).check_kinds(["hidden"])


def test_a_model_of_pictures_and_text_is_streamed(tmp_path):
    """What prepares its pictures travels along, as with `save`."""
    towers("qwen2_5_vl").save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "preprocessor_config.json").write_text('{"patch_size": 14}')
    plan = pk.prune_checkpoint(tmp_path / "in", tmp_path / "out", pk.Magnitude(), 0.1)
    again, small = pk.load(tmp_path / "out")[0], pk.prune(pk.load(tmp_path / "in")[0], plan)
    assert torch.equal(logits(again), logits(small))
    pk.save(small, tmp_path / "saved")
    for name in ("out", "saved"):
        assert (tmp_path / name / "preprocessor_config.json").read_text() == '{"patch_size": 14}'


@pytest.mark.parametrize("beside", [True, False])
def test_an_adapter_is_named_and_merged_where_asked(beside, tmp_path):
    model = FAMILIES["llama_gqa"].model(dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    folder = tmp_path / ("base" if beside else "adapter")
    adapted.save_pretrained(folder)
    where = "beside the weights of a model" if beside else "only"
    for use in (pk.load, lambda f: pk.prune_checkpoint(f, tmp_path / "out", pk.Magnitude(), 0.1)):
        with pytest.raises(PrunekitError, match=rf"holds an adapter {where}; merge it .*merge_adapter=True\)"):
            use(folder)
    merged, _ = pk.load(folder, merge_adapter=True)
    assert torch.allclose(logits(merged), logits(adapted.eval()), atol=1e-5)
    assert not torch.allclose(logits(merged), logits(model), atol=1e-5)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    pk.save(merged, tmp_path / "saved")
    assert torch.equal(logits(pk.load(tmp_path / "saved")[0]), logits(merged))


def test_an_adapter_that_is_not_there_or_has_no_base_is_refused(tmp_path):
    FAMILIES["llama_gqa"].model().save_pretrained(tmp_path / "in")
    with pytest.raises(PrunekitError, match=r"no folder with an adapter .* leave out merge_adapter=True"):
        pk.load(tmp_path / "in", merge_adapter=True)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(PrunekitError, match=r"names no base model; write its folder or hub id into"):
        pk.load(tmp_path, merge_adapter=True)
    (tmp_path / "in" / "adapter_config.json").write_text("{}")
    with pytest.raises(PrunekitError, match=r"does not fit LlamaForCausalLM, loaded as its base"):
        pk.load(tmp_path / "in", merge_adapter=True)


@pytest.mark.parametrize("where", ["text_config", "compression_config"])
def test_weights_that_another_field_calls_quantized_are_refused(where, tmp_path):
    FAMILIES["llama_gqa"].model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    said = (
        {"quant_method": "fp8"} if where == "compression_config" else {"quantization_config": {"quant_method": "fp8"}}
    )
    (tmp_path / "config.json").write_text(json.dumps({**config, where: said}))
    with pytest.raises(PrunekitError, match=r"is quantized \(fp8\)"):
        pk.load(tmp_path)


def test_a_head_that_is_no_language_model_is_refused_in_memory_and_on_disk(tmp_path):
    model = AutoModelForSequenceClassification.from_config(FAMILIES["llama_gqa"].model().config)
    model.save_pretrained(tmp_path / "in")
    for use in (
        lambda: pk.load(tmp_path / "in"), lambda: pk.discover(model), lambda: pk.save(model, tmp_path / "out"),
        lambda: pk.prune_checkpoint(tmp_path / "in", tmp_path / "out", pk.Magnitude(), 0.1),
    ):  # fmt: skip
        with pytest.raises(PrunekitError, match="a LlamaForSequenceClassification,? .*no causal language model"):
            use()
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_head_is_not_saved_where_it_would_not_load(tmp_path):
    with pytest.raises(PrunekitError, match="a LlamaModel is no causal language model, and prunekit.load would refuse"):
        pk.save(FAMILIES["llama_gqa"].model().model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "taken"), [("LlamaForRewardModel", False), ("LLaMAForCausalLM", True)])
def test_a_class_that_transformers_does_not_have_is_taken_if_its_name_says_a_language_model(name, taken, tmp_path):
    FAMILIES["llama_gqa"].model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": [name]}))
    if taken:
        assert pk.load(tmp_path)
        return
    with pytest.raises(PrunekitError, match="LlamaForRewardModel, which transformers does not have; .* architectures"):
        pk.load(tmp_path)


def test_weights_that_are_not_in_memory_are_refused_by_whatever_reads_them(tmp_path):
    """Without another library's words, and with the next step."""
    FAMILIES["llama_gqa"].model(dtype=torch.float32).save_pretrained(tmp_path / "m")
    config = AutoConfig.from_pretrained(tmp_path / "m")
    calib, space = torch.arange(32).view(2, 16), HyperparameterSpace({"a": Range(0.0, 1.0)}, lambda model, _: model)
    spread = {"model": "disk", "lm_head": "cpu"}
    away = AutoModelForCausalLM.from_pretrained(tmp_path / "m", device_map=spread, offload_folder=tmp_path / "off")
    for model, why in ((empty_model(config), "load the weights first"), (away, "is offloaded .* without device_map")):
        groups = pk.discover(empty_model(config))
        for use in (
            lambda model, groups: pk.score(model, groups, pk.Magnitude()),
            lambda model, groups: pk.score(model, groups, pk.Activation(), calib),
            lambda model, groups: pk.recover(model, pk.LoRA(r=2), calib),
            lambda model, groups: pk.evaluate(model, None, ["cost"]),
            lambda model, groups: pk.sparsify(model, calib, "magnitude", 0.5),
            lambda model, groups: pk.save(model, tmp_path / "out"),
            lambda model, groups: pk.measure_pairs(space, model, None, 1, metric=Metric("one", lambda *_: 1.0)),
        ):
            with pytest.raises(PrunekitError, match=why):
                use(model, groups)
    plan = plan_keeping(groups, {groups.of_kind("ffn_channel")[0].name: [0, 1]})
    with pytest.raises(PrunekitError, match="load the weights first"):
        pk.prune(empty_model(config), plan, compensate=calib)


def test_a_tokenizer_for_which_a_package_is_missing_does_not_keep_a_model_from_being_cut(tmp_path, monkeypatch):
    """SentencePiece files alone need two packages; they are copied as they are."""
    monkeypatch.setattr(loading, "is_installed", lambda package: False)
    FAMILIES["llama_gqa"].model(dtype=torch.float32).save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "tokenizer.model").write_bytes(b"pieces")
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    with pytest.warns(UserWarning, match="is a SentencePiece file.* pip install sentencepiece protobuf"):
        model, tokenizer = pk.load(tmp_path / "in")
    assert tokenizer is None
    with pytest.warns(UserWarning, match="SentencePiece"):
        pk.save(model, tmp_path / "out")
        pk.prune_checkpoint(tmp_path / "in", tmp_path / "streamed", pk.Magnitude(), 0.1)
    for name in ("out", "streamed"):
        assert (tmp_path / name / "tokenizer.model").read_bytes() == b"pieces"
    monkeypatch.setattr(loading, "is_installed", lambda package: True)
    with pytest.raises(PrunekitError, match="cannot load the tokenizer of .* restore its files"):
        pk.load(tmp_path / "in")


def test_a_package_that_a_model_needs_is_asked_for(tmp_path, monkeypatch):
    FAMILIES["llama_gqa"].model().save_pretrained(tmp_path)

    def needs(*_args, **_options):
        raise ImportError("\nTimmWrapperModel requires the timm library")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", needs)
    with pytest.raises(PrunekitError, match="needs a package that is not installed; install what the traceback names"):
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
