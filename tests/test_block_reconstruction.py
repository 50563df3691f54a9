"""Block reconstruction: what can be learnt again, held-out tokens decide, the caller's model and numbers, refusals."""

import copy
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, logits, plan_keeping, random_units, relative_difference
from hypothesis import given, settings
from hypothesis import strategies as st

import prunekit as pk
from prunekit import PrunekitError, discover, load, prune, save, sparsify
from prunekit.calibration import mean_loss
from prunekit.pruning.compensation import split_windows
from prunekit.recovery import block_reconstruction
from prunekit.recovery.block_reconstruction import reconstruct

QUICK = {"steps": 8, "batch_size": 6, "learning_rate": 1e-3}


def calibration(n=24, seq=16):
    return torch.randint(0, 48, (n, seq), generator=torch.Generator().manual_seed(11))


def cut(name="llama_gqa", share=0.5, dtype=torch.float32):
    """A dense model, a plan that takes a share of its heads and channels, and what is left."""
    family = FAMILIES[name]
    model, groups = family.model(dtype=dtype), family.groups()
    plan = replace(plan_keeping(groups, random_units(family, groups, 0, share=share)), groups=groups)
    return model, plan, prune(model, plan, measure=False)


def settled(monkeypatch):
    """The loss on held-out windows says nothing of models with random weights."""
    monkeypatch.setattr(block_reconstruction, "mean_loss", lambda *_: 1.0)


def same(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


def test_what_a_double_did_is_learnt_again():
    """Half the FFN channels are doubles of the others: twice their output weights give the dense layer."""
    model = FAMILIES["llama_gqa"].model(dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[48:] = linear.weight[:48]
    groups = discover(model)
    keep = {group.name: list(range(48)) for group in groups.of_kind("ffn_channel")}
    plan = replace(plan_keeping(groups, keep), groups=groups)
    small = prune(model, plan, measure=False)
    before = relative_difference(logits(small), logits(model))
    table = reconstruct(small, model, plan, calibration(64), steps=150, batch_size=8, learning_rate=5e-3)
    assert (table["error_after"] < 0.2 * table["error_before"].iloc[0]).all()
    assert relative_difference(logits(small), logits(model)) < 0.5 * before
    assert table["module"].tolist() == ["model.layers.0", "model.layers.1"] and (table["steps"] > 0).all()
    assert small.reconstruction is table and table.attrs["loss"][1] <= table.attrs["loss"][0]


@pytest.mark.parametrize("name", [name for name in FAMILIES if "peft" not in name])
def test_every_family_comes_nearer_or_is_refused_by_name(name, monkeypatch):
    settled(monkeypatch)
    model, plan, small = cut(name, dtype=FAMILIES[name].dtype)
    before, dense = relative_difference(logits(small), logits(model)), copy.deepcopy(model.state_dict())
    try:
        table = reconstruct(small, model, plan, calibration(), **QUICK)
    except PrunekitError as error:
        assert "are not a chain" in str(error)
        return
    assert (table["error_after"] <= table["error_before"]).all() and table["steps"].max() > 0
    assert relative_difference(logits(small), logits(model)) < before
    assert same(dense, model.state_dict())


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 99), rate=st.sampled_from([1e-4, 1e-2, 1.0]))
def test_no_error_and_no_loss_on_held_out_windows_rises(seed, rate):
    model, plan, small = cut()
    _, held = split_windows(calibration())
    before = mean_loss(small, held)
    table = reconstruct(small, model, plan, calibration(), **{**QUICK, "learning_rate": rate}, seed=seed)
    assert mean_loss(small, held) <= before == table.attrs["loss"][0]
    assert (table["error_after"] <= table["error_before"]).all()
    assert ((table["steps"] == 0) == (table["error_after"] == table["error_before"])).all()


def test_the_same_seed_gives_the_same_weights_and_the_callers_numbers_stay(monkeypatch):
    settled(monkeypatch)
    model, plan, first = cut()
    model.train()
    others = [copy.deepcopy(first) for _ in range(2)]
    state = torch.get_rng_state()
    for small, seed in zip((first, *others), (3, 3, 4), strict=True):
        reconstruct(small, model, plan, calibration(), **QUICK, seed=seed)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert same(first.state_dict(), others[0].state_dict())
    assert not same(first.state_dict(), others[1].state_dict())
    assert all(p.requires_grad and p.grad is None for each in (first, model) for p in each.parameters())


def test_layers_keep_their_weights_where_the_held_out_loss_rises(monkeypatch):
    losses = iter([1.0, 1.01])
    monkeypatch.setattr(block_reconstruction, "mean_loss", lambda *_: next(losses))
    model, plan, small = cut()
    before = copy.deepcopy(small.state_dict())
    table = reconstruct(small, model, plan, calibration(), **QUICK)
    assert same(before, small.state_dict()) and table.attrs["loss"] == (1.0, 1.01)
    assert (table["steps"] == 0).all() and table["error_after"].equals(table["error_before"])


def test_weights_that_are_not_finite_are_never_kept():
    model, plan, small = cut()
    before = copy.deepcopy(small.state_dict())
    table = reconstruct(small, model, plan, calibration(), **{**QUICK, "learning_rate": 1e30})
    assert same(before, small.state_dict()) and (table["steps"] == 0).all()


def test_outputs_that_are_not_finite_are_refused_by_name(monkeypatch):
    settled(monkeypatch)
    model, plan, small = cut()
    with torch.no_grad():
        small.model.layers[1].mlp.down_proj.weight.fill_(3e38)
    with pytest.raises(PrunekitError, match="the outputs of model.layers.1 are not finite: load the model in float32"):
        reconstruct(small, model, plan, calibration(), **QUICK)


def test_an_interrupt_leaves_the_model_as_it_was(monkeypatch):
    settled(monkeypatch)
    model, plan, small = cut()
    before, train, calls = copy.deepcopy(small.state_dict()), block_reconstruction._train, []

    def interrupted(*args):
        calls.append(train(*args))
        raise KeyboardInterrupt

    monkeypatch.setattr(block_reconstruction, "_train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reconstruct(small, model, plan, calibration(), **QUICK)
    assert len(calls) == 1 and same(before, small.state_dict()) and not hasattr(small, "reconstruction")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*small.modules(), *model.modules()])


def test_uneven_layers_are_saved_and_loaded(tmp_path, monkeypatch):
    settled(monkeypatch)
    family = FAMILIES["llama_gqa"]
    model, groups = family.model(dtype=torch.float32), family.groups()
    plan = replace(plan_keeping(groups, {"model.layers.1.mlp:ffn_channel": list(range(40))}), groups=groups)
    small = prune(model, plan, measure=False)
    table = reconstruct(small, model, plan, calibration(), **QUICK)
    assert table["error_before"].iloc[0] < 1e-10 < table["error_after"].iloc[1] < table["error_before"].iloc[1]
    loaded = load(save(small, tmp_path / "out", plan=plan))[0]
    assert torch.equal(logits(loaded), logits(small))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_keep_their_precision(dtype, monkeypatch):
    settled(monkeypatch)
    model, plan, small = cut(dtype=dtype)
    before = copy.deepcopy(small.state_dict())
    table = reconstruct(small, model, plan, calibration(), **QUICK)
    assert {p.dtype for p in small.parameters()} == {dtype} and not same(before, small.state_dict())
    assert (table["error_after"] < table["error_before"]).all()


def test_what_lies_outside_the_layers_and_zeros_stay(monkeypatch):
    settled(monkeypatch)
    model, plan, small = cut("llama_tied")
    small = sparsify(small, None, "magnitude", 0.5, measure=False)
    embeddings, before = small.get_input_embeddings().weight.clone(), copy.deepcopy(small)
    reconstruct(small, model, plan, calibration(), **QUICK)
    assert torch.equal(small.get_input_embeddings().weight, embeddings)
    assert small.lm_head.weight is small.get_input_embeddings().weight
    old, new = before.model.layers[0].mlp.up_proj.weight, small.model.layers[0].mlp.up_proj.weight
    assert torch.equal(old == 0, new == 0) and not torch.equal(old, new)


@pytest.mark.parametrize("number", [0, 1])
def test_the_layer_that_is_left_learns_what_a_dropped_one_did(number, monkeypatch):
    settled(monkeypatch)
    family = FAMILIES["llama_gqa"]
    model, groups = family.model(dtype=torch.float32), family.groups()
    plan = replace(plan_keeping(groups, {f"model.layers.{number}:layer": []}), groups=groups)
    small = prune(model, plan, measure=False)
    before = relative_difference(logits(small), logits(model))
    table = reconstruct(small, model, plan, calibration(), **QUICK)
    assert len(table) == 1 and relative_difference(logits(small), logits(model)) < before


def test_a_block_that_went_is_made_up_for_by_the_rest_of_its_layer(monkeypatch):
    settled(monkeypatch)
    family = FAMILIES["llama_gqa"]
    model, groups = family.model(dtype=torch.float32), family.groups()
    plan = replace(plan_keeping(groups, {"model.layers.0.mlp:block": []}), groups=groups)
    small = prune(model, plan, measure=False)
    table = reconstruct(small, model, plan, calibration(), **QUICK)
    assert len(table) == 2 and table["error_after"].iloc[0] < table["error_before"].iloc[0]


def test_plans_and_models_that_do_not_belong_are_refused():
    model, plan, small = cut()
    with pytest.raises(PrunekitError, match=r"the order is reconstruct\(small, model, plan, calib\)"):
        reconstruct(model, small, plan, calibration())
    with pytest.raises(PrunekitError, match="small is model itself; give what prune"):
        reconstruct(model, model, plan, calibration())
    with pytest.raises(PrunekitError, match="plan={} is not allowed; give a PruningPlan"):
        reconstruct(small, model, {}, calibration())
    with pytest.raises(PrunekitError, match="calib is a single window, and one has to be held out; give two or more"):
        reconstruct(small, model, plan, calibration(1))
    with pytest.raises(PrunekitError, match="token ids"):
        reconstruct(small, model, plan, calibration() + 100)
    dropped = prune(model, replace(plan_keeping(plan.groups, {"model.layers.0:layer": []}), groups=plan.groups))
    with pytest.raises(PrunekitError, match="the cut model has 1 layers, and the plan leaves 2; give what prune"):
        reconstruct(dropped, model, plan, calibration())


@pytest.mark.parametrize("option", ["steps", "learning_rate", "batch_size"])
def test_options_that_train_nothing_are_refused(option):
    model, plan, small = cut()
    with pytest.raises(PrunekitError, match=f"{option}=0 is not allowed"):
        reconstruct(small, model, plan, calibration(), **{option: 0})


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("vocabulary", "the plan removes tokens, but calib has the old"), ("hidden", "the plan removes hidden channels")],
)
def test_cuts_of_tokens_and_of_the_residual_stream_are_refused(kind, reason):
    family = FAMILIES["llama_gqa"]
    model, groups = family.model(), family.groups()
    plan = replace(plan_keeping(groups, {groups.of_kind(kind)[0].name: list(range(40))}), groups=groups)
    small = prune(model, plan, measure=False)
    with pytest.raises(PrunekitError, match=reason):
        reconstruct(small, model, plan, calibration() % 40)


def test_layers_that_are_not_a_chain_are_refused(monkeypatch):
    monkeypatch.setattr(block_reconstruction.Layerwise, "of", lambda *_: None)
    model, plan, small = cut()
    with pytest.raises(PrunekitError, match=r"the layers of this LlamaForCausalLM are not a chain.*use compensate"):
        reconstruct(small, model, plan, calibration())


def test_adapters_and_weights_that_are_not_finite_are_refused():
    model, plan, small = cut()
    with torch.no_grad():
        small.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(PrunekitError, match="up_proj.weight has NaN or infinite weights"):
        reconstruct(small, model, plan, calibration())
    family = FAMILIES["llama_peft"]
    with pytest.raises(PrunekitError, match=r"the model has adapters; call merge_and_unload\(\) on it first"):
        reconstruct(family.model(), family.model(), plan, calibration())


def test_it_is_a_public_name():
    assert pk.reconstruct is reconstruct
