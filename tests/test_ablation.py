"""Ablation: what ablation does and undoes, scores in units of loss, what each needs."""

import copy

import pytest
import torch
from families import FAMILIES, plan_keeping, zero_units
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit import (
    Ablation,
    Magnitude,
    PrunekitError,
    Random,
    Reconstruction,
    Taylor,
    calibration_set,
    discover,
    load,
    plan,
    prune,
    score,
)
from prunekit.calibration import mean_loss
from prunekit.gradients import gather_gradients
from prunekit.importance import Scores, ablated
from prunekit.importance.ablation import scaled_to_loss

CALIB = torch.randint(0, 48, (8, 12), generator=torch.Generator().manual_seed(3))
CUT = ("kv_head", "ffn_channel")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "bloom", "mixtral", "phi3"])
def test_an_ablated_unit_is_one_that_was_cut(name):
    family = FAMILIES[name]
    model, groups = family.model(), family.groups()
    before = copy.deepcopy(model.state_dict())
    for group in groups.of_kind(*CUT)[:2]:
        keep = list(range(1, group.n_units))
        small = prune(model, plan_keeping(groups, {group.name: keep}))
        with ablated(model, group, [0]):
            assert mean_loss(model, CALIB) == pytest.approx(mean_loss(small, CALIB), rel=1e-6)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weights_come_back_whatever_happens():
    family = FAMILIES["llama_gqa"]
    model, group = family.model(), family.groups().of_kind("kv_head")[0]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt), ablated(model, group, range(group.n_units)):
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_ablation_is_the_loss_without_each_unit():
    family = FAMILIES["llama_gqa"]
    model, groups = family.model(), family.groups()
    heads = groups.of_kind("kv_head")
    found = score(model, heads, Ablation(), CALIB)
    for group in heads:
        for unit in range(group.n_units):
            keep = [u for u in range(group.n_units) if u != unit]
            without = zero_units(copy.deepcopy(model), groups, plan_keeping(groups, {group.name: keep}))
            assert float(found[group.name][unit]) == pytest.approx(
                mean_loss(without, CALIB) - mean_loss(model, CALIB), abs=1e-9
            )


@settings(max_examples=4, deadline=None)
@given(
    name=st.sampled_from(["llama_mha", "opt", "bloom"]), importance=st.sampled_from([Magnitude(), Random(), Taylor()])
)
def test_scaled_scores_add_up_to_what_the_loss_rises_by(name, importance):
    family = FAMILIES[name]
    model, groups = family.model(), family.groups()
    plain, scaled = (score(model, groups.of_kind(*CUT), importance, CALIB, normalize=n) for n in (None, "loss"))
    for group in groups.of_kind(*CUT):
        before, after = plain[group.name], scaled[group.name]
        assert torch.equal(before.argsort(stable=True), after.argsort(stable=True))
        with ablated(model, group, range(group.n_units)):
            without = mean_loss(model, CALIB)
        assert float(after.sum()) == pytest.approx(max(without - mean_loss(model, CALIB), 0), rel=1e-3, abs=1e-7)
    assert scaled.label == f"{importance.label}, scaled to the loss"


@pytest.mark.slow
def test_what_costs_nothing_in_part_is_not_taken_for_nothing_as_a_whole():
    """Half of the first layer's channels of the world can go for free, and the layer cannot."""
    model, tokenizer = load("world")
    calib = calibration_set("world", tokenizer, n_samples=4, seq_len=64)
    groups = discover(model)
    channels = groups.of_kind("ffn_channel")
    scores = score(model, channels, Reconstruction(), calib, normalize="loss")
    low = scores[channels[0].name].argsort()[:256].tolist()
    dense = mean_loss(model, calib)
    with ablated(model, channels[0], low):
        assert mean_loss(model, calib) < 1.05 * dense
    assert float(scores[channels[0].name].sum()) > 1
    made = plan(groups, scores, 0.4, ranking="global", kinds=["ffn_channel"])
    assert mean_loss(prune(model, made), calib) < 1.3 * mean_loss(model, calib)


@pytest.mark.slow
def test_a_layer_that_does_nothing_gives_its_channels_once_scores_are_scaled():
    """Random scores alone cannot know it; what the loss says can."""
    model, tokenizer = load("world")
    calib = calibration_set("world", tokenizer, n_samples=4, seq_len=64)
    kept = []
    for _ in range(2):
        groups = discover(model)
        scores = score(model, groups.of_kind("ffn_channel"), Random(), calib, normalize="loss")
        made = plan(groups, scores, 0.3, ranking="global", kinds=["ffn_channel"])
        kept.append(made.table().set_index("layer")["kept"])
        with torch.no_grad():
            model.model.layers[7].mlp.down_proj.weight.mul_(1e-5)
    assert kept[1][7] < kept[0][7] / 4


def test_what_cannot_be_is_refused():
    family = FAMILIES["llama_gqa"]
    model, groups = family.model(), family.groups()
    heads = groups.of_kind("kv_head")
    with pytest.raises(PrunekitError, match="normalize='size' is unknown; allowed: None, 'loss'"):
        score(model, heads, Magnitude(), CALIB, normalize="size")
    with pytest.raises(PrunekitError, match="Ablation.. measures the loss already; leave out normalize"):
        score(model, heads, Ablation(), CALIB, normalize="loss")
    with pytest.raises(PrunekitError, match="'model.layers.0:layer' is one unit"):
        score(model, groups.of_kind("layer"), Magnitude(), CALIB, normalize="loss")
    negative = Scores({heads[0].name: torch.tensor([1.0, -1.0])}, label="odd", kinds={heads[0].name: "kv_head"})
    with pytest.raises(PrunekitError, match="odd scores of .* go below 0 and cannot be scaled"):
        scaled_to_loss(model, heads[:1], negative, CALIB)
    with pytest.raises(PrunekitError, match="normalize='loss' reads tokens, not None"):
        score(model, heads, Magnitude(), normalize="loss")
    names = [member.parameter for member in heads[0].members]
    with pytest.raises(PrunekitError, match=r"ablation reads tokens, not Gradients\("):
        score(model, heads[:1], Ablation(), gather_gradients(model, CALIB, names))
    with pytest.raises(PrunekitError, match="needs a calibration set"):
        score(model, heads, Ablation())
