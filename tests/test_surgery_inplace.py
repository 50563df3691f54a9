"""Cuts in place: the model stays the object that others hold, and nobody else's model is touched."""

import copy
import threading

import pytest
import torch
from families import COMMON, logits, plan_keeping, relative_difference, zero_units
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from prunekit import PrunekitError, discover, prune
from prunekit.pruning import surgery

LAYERS = {"model.layers.0:layer": [], "model.layers.2.self_attn:block": []}
CHANNELS = {"model.layers.1.mlp:ffn_channel": list(range(0, 96, 3))}


def deep(config=None):
    torch.manual_seed(7)
    config = config or LlamaConfig(**COMMON | {"num_hidden_layers": 3}, intermediate_size=96)
    return LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize("keep", [CHANNELS, LAYERS, LAYERS | CHANNELS])
def test_another_model_with_the_same_configuration_is_not_marked(keep):
    model = deep()
    other = deep(model.config)
    said, expected = copy.deepcopy(other.config.to_dict()), logits(other)
    prune(model, plan_keeping(discover(model), keep), inplace=True)
    assert other.config.to_dict() == said and not hasattr(other.config, "prunekit")
    assert torch.equal(logits(other), expected)


@pytest.mark.parametrize("keep", [CHANNELS, LAYERS])
def test_modules_that_shared_a_configuration_share_it_still(keep):
    model = deep()
    prune(model, plan_keeping(discover(model), keep), inplace=True)
    assert model.model.config is model.config and model.model.rotary_emb.config is model.config


@pytest.mark.parametrize("keep", [LAYERS, LAYERS | CHANNELS])
def test_a_model_that_loses_layers_in_place_keeps_what_others_hold(keep):
    model = deep()
    groups, twin = discover(model), copy.deepcopy(model)
    plan = plan_keeping(groups, keep)
    seen, held, layers, stays = [], model.model, model.model.layers, model.model.layers[1]
    model.model.norm.register_forward_hook(lambda *_: seen.append(1))
    optimizer = torch.optim.SGD([stays.self_attn.q_proj.weight], lr=1.0)
    assert prune(model, plan, inplace=True) is model
    assert model.model is held and held.layers is layers and layers[0] is stays and len(layers) == 2
    assert relative_difference(logits(model), logits(zero_units(twin, groups, plan))) < 1e-12 and seen
    assert optimizer.param_groups[0]["params"][0] is model.model.layers[0].self_attn.q_proj.weight
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1] and model.config.num_hidden_layers == 2
    assert len(model.config.prunekit["stages"]) == (2 if CHANNELS.items() <= keep.items() else 1)


def test_nothing_is_changed_where_the_second_half_of_a_plan_fails(monkeypatch):
    """Layers could go, the channels beside them could not."""
    model = deep()
    plan = plan_keeping(discover(model), LAYERS | CHANNELS)
    before, names = logits(model), [name for name, _ in model.named_modules()]

    def fails(*_args, **_options):
        raise PrunekitError("not proved")

    monkeypatch.setattr(surgery, "verify", fails)  # of the channels; that of the layers stands in `trials`
    with pytest.raises(PrunekitError, match="not proved"):
        prune(model, plan, inplace=True)
    assert [name for name, _ in model.named_modules()] == names and torch.equal(logits(model), before)
    assert not hasattr(model.config, "prunekit") and model.config.num_hidden_layers == 3


class Locked(nn.Module):
    """Holds what cannot be copied."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp, self.lock = mlp, threading.Lock()

    def forward(self, x):
        return self.mlp(x)


@pytest.mark.parametrize("keep", [CHANNELS, LAYERS])
def test_a_model_that_cannot_be_copied_is_named(keep):
    model = deep()
    plan = plan_keeping(discover(model), keep)
    model.model.layers[1].mlp.act_fn = Locked(nn.SiLU())
    with pytest.raises(PrunekitError, match=r"LlamaForCausalLM cannot be copied, .*TypeError.*; take out of it"):
        prune(model, plan, inplace=True)
