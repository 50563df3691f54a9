"""Experts cut to widths that torch's grouped products do not take, in models that are set to use them."""

import copy
import types

import pytest
import torch
from families import GQA, LOCAL, ROUTED, logits, plan_keeping, relative_difference, zero_units
from transformers import AutoConfig, AutoModelForCausalLM

from prunekit import discover, prune

FAMILIES = {"mixtral": {**GQA, **LOCAL}, "qwen2_moe": {**GQA, **ROUTED, "shared_expert_intermediate_size": 56}}


def routed(family):
    """As transformers builds it: in float32, its experts by grouped products."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family])).eval()
    assert model.config._experts_implementation == "grouped_mm"
    return model


def channels(groups, n_units):
    """The channels of every expert of the first layer, as many of each group as told."""
    found = [
        g for g in groups.of_kind("ffn_channel") if g.layer == 0 and any("experts." in m.parameter for m in g.members)
    ]
    return {g.name: list(range(n_units)) for g in found if not any("shared" in m.parameter for m in g.members)}


@pytest.mark.slow
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize(("n_units", "implementation"), [(33, "eager"), (32, "grouped_mm")])
@pytest.mark.parametrize("family", FAMILIES)
def test_cut_experts_run_as_the_model_is_set(family, n_units, implementation, inplace):
    model = routed(family)
    groups, other = discover(model), AutoModelForCausalLM.from_config(model.config)
    plan = plan_keeping(groups, channels(groups, n_units))
    zeroed = zero_units(copy.deepcopy(model), groups, plan)
    small = prune(model, plan, inplace=inplace)
    assert plan.keep and small.config._experts_implementation == implementation
    assert other.config._experts_implementation == "grouped_mm" == zeroed.config._experts_implementation
    assert relative_difference(logits(small), logits(zeroed)) < 1e-5


def test_what_a_model_is_told_otherwise_stays():
    model = routed("mixtral")
    model.set_experts_implementation("batched_mm")
    groups = discover(model)
    small = prune(model, plan_keeping(groups, channels(groups, 33)))
    assert small.config._experts_implementation == "batched_mm" and logits(small).isfinite().all()


def by_number(self, hidden_states, top_k_index, top_k_weights):
    """Experts as Nemotron-H runs them: the number of each is read out before its matrices are looked up."""
    result = torch.zeros_like(hidden_states)
    mask = torch.nn.functional.one_hot(top_k_index, num_classes=self.num_experts).permute(2, 1, 0)
    for hit in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero().squeeze(-1):
        expert = hit.item()
        place, token = torch.where(mask[expert])
        gate, up = torch.nn.functional.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, -1)
        outputs = torch.nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
        result.index_add_(0, token, outputs * top_k_weights[token, place, None])
    return result


def test_experts_whose_numbers_are_read_out_are_found_and_cut():
    model, plain = routed("mixtral"), routed("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.forward = types.MethodType(by_number, layer.mlp.experts)
    groups = discover(model)
    plan = plan_keeping(groups, {g.name: [0, 2, 3] for g in groups.of_kind("expert")})
    assert len(plan.keep) == 2
    plain.config._experts_implementation = "eager"
    assert relative_difference(logits(prune(model, plan)), logits(prune(plain, plan))) < 1e-5
