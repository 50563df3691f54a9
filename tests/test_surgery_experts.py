"""Experts cut to widths that torch's grouped products do not take, in models that are set to use them."""

import copy

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
