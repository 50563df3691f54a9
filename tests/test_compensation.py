"""Compensation: what can be made up for, least squares by hand, every family, the dense model untouched, refusals."""

import copy
import gc
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, logits, plan_keeping, random_units, relative_difference
from torch import nn

from prunekit import PrunekitError, PruningPlan, discover, prune
from prunekit.pruning import surgery
from prunekit.pruning.compensation import _run_once, compensate

HALF = 0.5


def calibration(n=24, seq=16):
    return torch.randint(0, 48, (n, seq), generator=torch.Generator().manual_seed(11))


def cut(family, seed=0):
    """A dense model, a plan that takes half its heads and channels, and what is left."""
    model, groups = family.model(), family.groups()
    plan = plan_keeping(groups, random_units(family, groups, seed, share=HALF))
    plan = replace(plan, groups=groups)
    return model, plan, prune(model, plan)


def test_a_channel_that_is_the_double_of_another_is_made_up_for_whole():
    family = FAMILIES["llama_biased"]
    model = family.model()
    for layer in model.model.layers:
        with torch.no_grad():
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[48:], linear.bias[48:] = linear.weight[:48], linear.bias[:48]
    groups = discover(model)
    keep = {group.name: list(range(48)) for group in groups.of_kind("ffn_channel")}
    plan = PruningPlan(keep, dict.fromkeys(keep, 96), groups.n_parameters, groups.n_parameters, groups=groups)
    small = prune(model, plan)
    assert relative_difference(logits(small), logits(model)) > 1e-2
    compensate(small, model, plan, calibration(), ridge=1e-12)
    assert relative_difference(logits(small), logits(model)) < 1e-6


def test_one_layer_by_hand():
    """The last layer that is re-fitted, from its inputs and the dense model's outputs."""
    model, plan, small = cut(FAMILIES["gpt2"])
    plain = copy.deepcopy(small)
    table = compensate(small, model, plan, calibration(), ridge=0.05)
    last = table["module"].iloc[-1]
    assert last == "transformer.h.1.mlp.c_proj"
    seen = {}
    hooks = [
        m.get_submodule(last).register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0], y)}))
        for name, m in {"dense": model, "small": small}.items()
    ]
    with torch.no_grad():
        model(calibration()), small(calibration())
    for hook in hooks:
        hook.remove()
    x = seen["small"][0].flatten(0, 1)
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    old = plain.get_submodule(last)
    start = torch.cat([old.weight, old.bias[None]])
    y = seen["dense"][1].flatten(0, 1)
    gram = x.T @ x
    damping = 0.05 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    expected = start + torch.linalg.solve(gram + damping, x.T @ (y - x @ start))
    torch.testing.assert_close(small.get_submodule(last).weight, expected[:-1])
    torch.testing.assert_close(small.get_submodule(last).bias, expected[-1])
    assert table["error_after"].iloc[-1] == pytest.approx(float((y - x @ expected).square().sum() / y.square().sum()))


EVERY = [name for name in FAMILIES if "peft" not in name]


@pytest.mark.parametrize("name", EVERY)
def test_each_layer_and_the_whole_come_nearer_in_every_family(name):
    model, plan, small = cut(FAMILIES[name])
    before, dense = relative_difference(logits(small), logits(model)), copy.deepcopy(model.state_dict())
    table = compensate(small, model, plan, calibration(96), ridge=0.01)
    assert len(table) and (table["error_after"] <= table["error_before"]).all()
    assert relative_difference(logits(small), logits(model)) < before
    assert all(torch.equal(value, dense[key]) for key, value in model.state_dict().items())


def test_nothing_changes_under_an_endless_ridge():
    model, plan, small = cut(FAMILIES["llama_gqa"])
    before = logits(small)
    compensate(small, model, plan, calibration(), ridge=1e15)
    torch.testing.assert_close(logits(small), before)


def test_hooks_go_and_training_mode_stays():
    model, plan, small = cut(FAMILIES["llama_mha"])
    small.train()
    compensate(small, model, plan, calibration())
    assert small.training and not model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*small.modules(), *model.modules()])


def test_half_precision_models_are_fitted_in_float32():
    family = FAMILIES["llama_mha"]
    model, groups = family.model(dtype=torch.bfloat16), family.groups()
    keep = random_units(family, groups, 0, share=HALF)
    plan = PruningPlan(
        keep, {n: groups[n].n_units for n in keep}, groups.n_parameters, groups.n_parameters, groups=groups
    )
    small = prune(model, plan)
    table = compensate(small, model, plan, calibration())
    assert small.dtype == torch.bfloat16 and (table["error_after"] < table["error_before"]).all()


@pytest.mark.parametrize("ridge", [0, -1, float("nan"), float("inf"), "small", True])
def test_a_ridge_that_is_none_is_refused(ridge):
    model, plan, small = cut(FAMILIES["llama_mha"])
    with pytest.raises(PrunekitError, match=r"ridge=.* is not allowed; give a number above 0"):
        compensate(small, model, plan, calibration(), ridge=ridge)


def test_models_and_tokens_that_do_not_belong_are_refused():
    model, plan, small = cut(FAMILIES["llama_mha"])
    with pytest.raises(PrunekitError, match="token ids"):
        compensate(small, model, plan, calibration() + 100)
    with pytest.raises(PrunekitError, match="carries no groups"):
        compensate(small, model, PruningPlan.from_json(plan.to_json()), calibration())
    with pytest.raises(PrunekitError, match="leave out inplace=True"):
        prune(model, plan, inplace=True, compensate=calibration())
    with pytest.raises(PrunekitError, match="a calibration set is an integer tensor"):
        prune(model, plan, compensate="texts")


def test_prune_compensates_what_a_layer_drop_leaves_too():
    """As the drop first and then the rest; where nothing lost inputs, nothing is re-fitted."""
    family = FAMILIES["llama_gqa"]
    model, groups = family.model(), family.groups()
    calib, channels = calibration(), "model.layers.1.mlp:ffn_channel"
    only_layer = plan_keeping(groups, {"model.layers.0:layer": []})
    both = plan_keeping(groups, {"model.layers.0:layer": [], channels: list(range(40))})
    dropped = prune(model, only_layer)
    assert torch.equal(logits(prune(model, only_layer, compensate=calib)), logits(dropped))
    rest = discover(dropped)
    plan = plan_keeping(rest, {channels.replace("1", "0"): list(range(40))})
    plan = replace(plan, groups=rest)
    expected = prune(dropped, plan, compensate=calib)
    assert torch.equal(logits(prune(model, both, compensate=calib)), logits(expected))
    assert not torch.equal(logits(prune(model, both)), logits(expected))


def test_whole_layers_are_refused_where_their_places_cannot_be_told():
    family = FAMILIES["llama_gqa"]
    model, groups = family.model(), family.groups()
    keep = {"model.layers.0:layer": [], "model.layers.1.mlp:ffn_channel": list(range(40))}
    plan = replace(plan_keeping(groups, keep), groups=groups)
    small = prune(model, plan)
    with pytest.raises(PrunekitError, match="take whole layers and blocks out first, then cut and compensate what is"):
        compensate(small, model, plan, calibration())


def test_tied_embeddings_are_left_alone():
    """Under a cut of the residual stream the head reads fewer inputs, but its weight is the embeddings' too."""
    family = FAMILIES["llama_tied"]
    model, groups = family.model(), family.groups()
    name = groups.of_kind("hidden")[0].name
    plan = replace(plan_keeping(groups, {name: list(range(48))}), groups=groups)
    small = prune(model, plan)
    embeddings = small.get_input_embeddings().weight.clone()
    table = compensate(small, model, plan, calibration())
    assert "model.layers.0.mlp.gate_proj" in set(table["module"])
    assert torch.equal(small.get_input_embeddings().weight, embeddings)
    assert small.lm_head.weight is small.get_input_embeddings().weight


def test_what_goes_wrong_in_the_fit_is_said_once_and_outside_the_cut(monkeypatch):
    """The cut itself is made again where it fails on the trace that the plan carries; the fit is not."""
    family = FAMILIES["llama_gqa"]
    model = family.model()
    groups = discover(model)
    plan = replace(plan_keeping(groups, {"model.layers.1.mlp:ffn_channel": list(range(40))}), groups=groups)
    collected = []

    def fails(*_args):
        collected.append(gc.isenabled())
        raise PrunekitError("no fit")

    monkeypatch.setattr(surgery, "refit", fails)
    with pytest.raises(PrunekitError, match="no fit"):
        prune(model, plan, compensate=calibration())
    assert collected == [True]


def test_a_layer_that_reads_zeros_stays_as_it_is():
    model, _, _ = cut(FAMILIES["llama_mha"])
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    groups = discover(model)
    plan = replace(plan_keeping(groups, {"model.layers.0.mlp:ffn_channel": list(range(40))}), groups=groups)
    small = prune(model, plan)
    weight = small.model.layers[0].mlp.down_proj.weight.clone()
    compensate(small, model, plan, calibration())
    assert torch.equal(small.model.layers[0].mlp.down_proj.weight, weight)


class Reading(nn.Module):
    """Layers that read tokens late, once, twice, in part and never."""

    def __init__(self):
        super().__init__()
        for name in ("late", "once", "twice", "part", "never"):
            setattr(self, name, nn.Linear(4, 4))

    def forward(self, input_ids, use_cache):
        x = input_ids[..., None].float().expand(*input_ids.shape, 4)
        return self.late(self.twice(self.twice(self.once(input=x))) + self.part(x[:, :1]))


def test_only_layers_that_read_each_token_once_may_be_fitted():
    model = Reading()
    assert _run_once(model, ["late", "once", "twice", "part", "never"], calibration()) == ["once", "late"]
    assert not any(module._forward_pre_hooks for module in model.modules())
