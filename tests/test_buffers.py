"""Buffers that units index are cut with them: biases on the scores of experts, slopes of heads, scales of channels."""

import pytest
import torch
from families import FAMILIES, SIZED, logits, plan_keeping, relative_difference, zero_units
from other_families import PHASED, UNLISTED
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import prunekit as pk
from prunekit import Magnitude, PrunekitError
from prunekit.errors import BudgetError

GROUPED = {**SIZED, **PHASED, "n_routed_experts": 8, "n_group": 2, "topk_group": 1}


class Scaled(nn.Module):
    """An activation with a constant of its own for each channel, in a form that it is not stored in."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("scale", torch.rand(width).half())

    def forward(self, x):
        return x.relu() * (2 * self.scale.to(x.dtype))


class Sloped(nn.Module):
    """A projection of heads, to which each head's slope is added."""

    def __init__(self, inner, heads):
        super().__init__()
        self.inner, self.heads = inner, heads
        self.register_buffer("slopes", torch.rand(1, heads, 1), persistent=False)

    def forward(self, x):
        heads = self.inner(x).unflatten(-1, (self.heads, -1))
        return (heads * self.slopes).flatten(-2)


def experts(name, keep):
    model = UNLISTED[name].model(dtype=torch.float32)
    groups = pk.discover(model)
    return model, pk.prune(model, plan_keeping(groups, {g.name: keep for g in groups.of_kind("expert")}))


def biases(model):
    return [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]


def test_a_scale_of_each_channel_goes_with_its_channel():
    model = FAMILIES["llama_gqa"].model()
    for layer in model.model.layers:
        layer.mlp.act_fn = Scaled(96)
    groups = pk.discover(model)
    keep = {"model.layers.0.mlp:ffn_channel": [1, 5, 90], "model.layers.1.mlp:ffn_channel": list(range(40))}
    plan = plan_keeping(groups, keep)
    small = pk.prune(model, plan)
    assert torch.equal(small.model.layers[0].mlp.act_fn.scale, model.model.layers[0].mlp.act_fn.scale[[1, 5, 90]])
    assert relative_difference(logits(small), logits(zero_units(model, groups, plan))) < 1e-12
    assert len(model.model.layers[0].mlp.act_fn.scale) == 96
    pk.prune(model, plan, inplace=True)
    assert len(model.model.layers[0].mlp.act_fn.scale) == 3


def test_the_slope_of_each_head_goes_with_its_head():
    model = FAMILIES["llama_mha"].model()
    for layer in model.model.layers:
        layer.self_attn.v_proj = Sloped(layer.self_attn.v_proj, 8)
    groups = pk.discover(model)
    plan = plan_keeping(groups, {g.name: [0, 3, 6, 7][g.layer :] for g in groups.of_kind("kv_head")})
    small = pk.prune(model, plan)
    slopes = model.model.layers[1].self_attn.v_proj.slopes
    assert torch.equal(small.model.layers[1].self_attn.v_proj.slopes, slopes[:, [3, 6, 7]])
    assert relative_difference(logits(small), logits(zero_units(model, groups, plan))) < 1e-12


def test_a_buffer_that_two_modules_share_stays_one():
    model = FAMILIES["llama_gqa"].model()
    for layer in model.model.layers:
        layer.mlp.act_fn = Scaled(96)
        layer.mlp.act_fn.scale = model.model.layers[0].mlp.act_fn.scale
    groups = pk.discover(model)
    (channels,) = (g for g in groups if any(m.parameter.endswith("down_proj.weight") and m.dim == 1 for m in g.members))
    plan = plan_keeping(groups, {channels.name: [3, 4]})  # one channel of both layers each
    small = pk.prune(model, plan)
    assert small.model.layers[0].mlp.act_fn.scale is small.model.layers[1].mlp.act_fn.scale
    assert small.model.layers[1].mlp.up_proj.out_features == len(small.model.layers[0].mlp.act_fn.scale) == 2
    assert relative_difference(logits(small), logits(zero_units(model, groups, plan))) < 1e-12


@pytest.mark.parametrize("name", ["glm4_moe", "minimax_m2"])
def test_the_bias_of_each_expert_goes_with_it_and_the_cut_model_is_plain(name, tmp_path):
    model, small = experts(name, [0, 2, 3])
    assert [b.tolist() for b in biases(small)] == [b[[0, 2, 3]].tolist() for b in biases(model)] and biases(small)
    assert small.config.num_local_experts == 3
    pk.save(small, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", experts_implementation="eager")
    assert "prunekit" not in again.config.to_dict()
    assert torch.equal(logits(again), logits(small))


def test_experts_with_a_bias_are_cut_unevenly_and_saved(tmp_path):
    model = UNLISTED["minimax_m2"].model(dtype=torch.float32)
    groups = pk.discover(model)
    plan = plan_keeping(groups, {g.name: [0, 1, 3][: 3 - g.layer] for g in groups.of_kind("expert")})
    small = pk.prune(model, plan)
    pk.save(small, tmp_path / "own")
    again, _ = pk.load(tmp_path / "own")
    again.config._experts_implementation = "eager"
    assert torch.equal(logits(again), logits(small))
    assert [len(b) for b in biases(again)] == [3, 2]


def test_experts_that_are_chosen_in_groups_are_locked_by_name():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("glm4_moe", **GROUPED))
    groups = pk.discover(model)
    why = r"'expert'; it has .* locked: model.layers.1.mlp.* is chosen from \(topk\) in 2 groups of 4, which must stay"
    with pytest.raises(PrunekitError, match=why):
        pk.plan(groups, pk.score(model, groups, Magnitude()), 0.25, of="units", kinds=["expert"])


def test_as_many_experts_stay_as_are_chosen_for_each_token():
    model = UNLISTED["glm4_moe"].model(dtype=torch.float32)
    groups = pk.discover(model)
    (group,) = groups.of_kind("expert")
    assert (group.n_units, group.min_units) == (4, 2)
    scores = pk.score(model, groups, Magnitude())
    with pytest.raises(BudgetError, match=r"1 would be left, and 2 are chosen for each token .* ask for at most 0\.5"):
        pk.plan(groups, scores, 0.75, of="units", kinds=["expert"])
    assert len(pk.plan(groups, scores, 0.5, of="units", kinds=["expert"]).keep[group.name]) == 2
    with pytest.raises(BudgetError, match=r"or the 2 that are chosen for each token let at most 0\.5000 go"):
        pk.plan(groups, scores, 0.75, of="units", kinds=["expert"], ranking="global")
    with pytest.raises(PrunekitError, match="leaves 1 units of .* and 2 are chosen for each token"):
        pk.prune(model, plan_keeping(groups, {group.name: [3]}))
