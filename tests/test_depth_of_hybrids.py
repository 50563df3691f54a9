"""Depth where layers differ in kind: what a configuration computes of them, and what they write to the cache."""

import pytest
import torch
from families import COMMON, FAMILIES, GQA, SIZED, continued, logits, plan_keeping, relative_difference, zero_units
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from prunekit import PrunekitError, discover, load, prune, save

JAMBA = {**GQA, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1}
RECURRENT = {**COMMON, "num_hidden_layers": 4, "intermediate_size": 96, "lru_width": 64,
             "block_types": ["recurrent", "attention"]}  # fmt: skip
FALCON = {**SIZED, "mamba_d_ssm": 128, "mamba_n_heads": 16, "mamba_d_head": 8, "mamba_d_state": 8,
          "mamba_chunk_size": 8}  # fmt: skip
GEMMA = {**SIZED, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 4, "global_head_dim": 8,
         "layer_types": ["sliding_attention", "full_attention"] * 2,
         "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": COMMON["vocab_size"],
         "num_global_key_value_heads": 4}  # fmt: skip
CONVOLUTIONS = {**GQA, "block_auto_adjust_ff_dim": False, "layer_types": ["conv", "conv"]}


def built(model_type, options, attention="eager"):
    torch.manual_seed(7)
    config = AutoConfig.for_model(model_type, **options)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()


def without(model_type, options, *names):
    """The cut model and its zeroed twin."""
    model = built(model_type, options)
    groups = discover(model)
    plan = plan_keeping(groups, {name: [] for name in names})
    return prune(model, plan), zero_units(model, groups, plan)


@pytest.mark.parametrize(
    ("model_type", "options", "name"),
    [("jamba", JAMBA, "layer_types"), ("recurrent_gemma", RECURRENT, "layers_block_type")],
)
@pytest.mark.parametrize("gone", [1, 2])
def test_layers_of_another_kind_than_a_configuration_would_compute_are_refused(model_type, options, name, gone):
    model = built(model_type, options)
    said = model.config.to_dict()
    plan = plan_keeping(discover(model), {f"model.layers.{gone}:layer": []})
    with pytest.raises(PrunekitError, match=f"{name} of a .* is computed .* call layer {gone} .*; take layers from"):
        prune(model, plan, inplace=True)
    assert len(model.model.layers) == 4 and model.config.to_dict() == said


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "options"), [("jamba", JAMBA), ("recurrent_gemma", RECURRENT)])
@pytest.mark.parametrize("gone", [(3,), (0, 1), (1, 2)])
def test_layers_go_where_the_kinds_of_the_others_are_still_computed(model_type, options, gone):
    small, zeroed = without(model_type, options, *(f"model.layers.{i}:layer" for i in gone))
    assert relative_difference(logits(small), logits(zeroed)) < 1e-5
    assert relative_difference(continued(small, use_cache=True), continued(zeroed, use_cache=True)) < 1e-5


@pytest.mark.parametrize(
    ("model_type", "options", "name"),
    [
        ("falcon_h1", FALCON, "model.layers.0.mamba:block"),  # attention beside it writes there
        ("falcon_h1", FALCON, "model.layers.0.self_attn:block"),
        ("gemma4_text", GEMMA, "model.layers.2.self_attn:block"),  # it reads the keys of another
    ],
)
def test_only_blocks_that_wrote_keys_are_stood_in_for_in_the_cache(model_type, options, name):
    small, zeroed = without(model_type, options, name)
    expected = continued(zeroed, use_cache=True)
    assert expected.isfinite().all()
    assert relative_difference(continued(small, use_cache=True), expected) < 1e-5


def test_a_model_whose_cache_never_ran_is_cut_and_saved(tmp_path):
    """Its cache wants one layer of attention at least, and it never had one."""
    small, zeroed = without("lfm2", CONVOLUTIONS, "model.layers.0:layer")
    assert relative_difference(logits(small), logits(zeroed)) < 1e-5
    save(small, tmp_path / "small")
    assert torch.equal(logits(load(tmp_path / "small")[0]), logits(small))


def test_nothing_deprecated_of_a_configuration_is_read(monkeypatch):
    """Such a property says so on the screen, and the reader of a notebook takes it for a mistake of theirs."""
    for name in ("torch_dtype", "use_return_dict"):
        if hasattr(PreTrainedConfig, name):
            monkeypatch.setattr(PreTrainedConfig, name, property(lambda self: pytest.fail("read")))
    model = FAMILIES["llama_gqa"].model()
    groups = discover(model)
    (first, *_) = groups.of_kind("layer")
    small = prune(model, plan_keeping(groups, {first.name: []}))
    assert len(small.model.layers) == len(model.model.layers) - 1
