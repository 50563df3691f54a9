"""Fluctuation and reconstruction importance: against what they stand for, worked out another way, and refusals."""

import pytest
import torch
from families import FAMILIES, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit import Fluctuation, PrunekitError, Reconstruction, discover, plan, prune, score
from prunekit.importance import IMPORTANCES
from prunekit.importance import input_statistics as room
from prunekit.importance.activation import _moments, _variance
from prunekit.importance.reconstruction import greedy_costs
from prunekit.pruning.compensation import compensate


def inputs_of(model, name):
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(tokens())
    hook.remove()
    return seen[0]


def test_fluctuation_is_variance_times_squared_columns():
    model = FAMILIES["llama_gqa"].model()
    found = score(model, discover(model), Fluctuation(), tokens())
    x, down = inputs_of(model, "model.layers.1.mlp.down_proj"), model.model.layers[1].mlp.down_proj.weight.detach()
    torch.testing.assert_close(found["model.layers.1.mlp:ffn_channel"], x.var(0) * down.square().sum(0))
    x, out = inputs_of(model, "model.layers.0.self_attn.o_proj"), model.model.layers[0].self_attn.o_proj.weight.detach()
    torch.testing.assert_close(
        found["model.layers.0.self_attn:query_head"], (x.var(0) * out.square().sum(0)).view(8, 8).sum(1)
    )


def test_fluctuation_of_a_layer_that_holds_its_weight_the_other_way_round():
    model = FAMILIES["gpt2"].model()
    found = score(model, discover(model), Fluctuation(), tokens())["transformer.h.1.mlp:ffn_channel"]
    x, weight = inputs_of(model, "transformer.h.1.mlp.c_proj"), model.transformer.h[1].mlp.c_proj.weight.detach()
    torch.testing.assert_close(found, x.var(0) * weight.square().sum(1))


def refitted_error(x, weight, kept, ridge):
    """‖Y − X_S W‖² + λ‖W − W_S‖² at its smallest, as a part of ‖Y‖²; what goes counts with its weights."""
    damping = ridge * x.square().sum(0).mean()
    gram = x.T @ x + damping * torch.eye(x.shape[1], dtype=x.dtype)
    fitted = torch.zeros_like(weight)
    fitted[kept] = torch.linalg.solve(gram[kept][:, kept], (gram @ weight)[kept])
    change = fitted - weight
    return float((change * (gram @ change)).sum() / (x @ weight).square().sum())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), width=st.integers(1, 3), ridge=st.floats(1e-3, 1.0))
def test_costs_are_those_of_refitting_from_the_start(seed, width, ridge):
    """Each step takes the unit whose loss, everything re-fitted, is the smallest; costs are the differences."""
    g = torch.Generator().manual_seed(seed)
    n_units, n_out = 5, 4
    x = torch.randn(40, n_units * width, generator=g, dtype=torch.float64) @ torch.randn(
        n_units * width, n_units * width, generator=g, dtype=torch.float64
    )
    weight = torch.randn(n_units * width, n_out, generator=g, dtype=torch.float64)
    units = torch.randperm(n_units * width, generator=g).view(n_units, width)
    found = greedy_costs(x.T @ x, weight, units, ridge)
    left, error, highest = list(range(n_units)), 0.0, 0.0
    while left:
        tried = {
            unit: refitted_error(x, weight, units[[u for u in left if u != unit]].flatten(), ridge) for unit in left
        }
        unit = min(tried, key=tried.get)
        highest = max(highest, tried[unit] - error)
        assert float(found[unit]) == pytest.approx(highest, rel=1e-6, abs=1e-10)
        error = tried[unit]
        left.remove(unit)


def test_the_order_of_the_choice_is_the_order_of_the_scores(monkeypatch):
    model = FAMILIES["llama_gqa"].model()
    groups = discover(model).of_kind("kv_head", "ffn_channel")
    found = score(model, groups, Reconstruction(), tokens())
    monkeypatch.setattr(room, "ROOM", 1)  # one layer at a time
    assert all(
        torch.equal(value, found[name]) for name, value in score(model, groups, Reconstruction(), tokens()).items()
    )
    x = inputs_of(model, "model.layers.0.self_attn.o_proj")
    weight = model.model.layers[0].self_attn.o_proj.weight.detach().T
    expected = greedy_costs(x.T @ x, weight, torch.arange(64).view(4, 16), 0.01)
    torch.testing.assert_close(found["model.layers.0.self_attn:kv_head"], expected.float())


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "opt", "gpt_neox", "falcon_new", "bloom"])
def test_a_plan_by_reconstruction_leaves_less_error_than_one_at_random(name):
    family = FAMILIES[name]
    model, groups = family.model(), family.groups()
    calib = torch.randint(0, 48, (64, 16), generator=torch.Generator().manual_seed(5))
    chosen = groups.of_kind("ffn_channel")
    errors = {}
    for importance in (Reconstruction(), IMPORTANCES["random"](seed=1)):
        scores = score(model, chosen, importance, calib)
        choice = plan(groups, scores, 0.5, of="units", kinds=["ffn_channel"])
        small = prune(model, choice)
        errors[importance.label] = compensate(small, model, choice, calib, ridge=0.01)["error_after"].iloc[0]
    best, other = errors.values()
    assert best < other


def test_what_cannot_be_scored_is_refused():
    model = FAMILIES["llama_gqa"].model()
    groups = discover(model)
    with pytest.raises(PrunekitError, match=r"has \d+ consumer layers, and Reconstruction\(\) needs one"):
        score(model, groups.of_kind("hidden"), Reconstruction(), tokens())
    with pytest.raises(PrunekitError, match="reads tokens, not"):
        Reconstruction().unit_scores(model, groups.of_kind("ffn_channel"), "tokens")
    with pytest.raises(PrunekitError, match="reads tokens, not"):
        Fluctuation().unit_scores(model, groups.of_kind("ffn_channel"), "tokens")
    for ridge in (0, -1.0, float("nan"), "x", True):
        with pytest.raises(PrunekitError, match=r"ridge=.* is not allowed"):
            Reconstruction(ridge=ridge)


def test_inputs_that_are_all_zero_or_lost_to_rounding():
    weight, units = torch.ones(6, 2, dtype=torch.float64), torch.arange(6).view(3, 2)
    for ridge in (1e-12, 0.01, 1e300):
        assert greedy_costs(torch.zeros(6, 6, dtype=torch.float64), weight, units, ridge).isfinite().all()
    with pytest.raises(PrunekitError, match=r"ridge=1e-30 is too small .* try 0.01"):
        greedy_costs(torch.ones(6, 6, dtype=torch.float64), weight, units, 1e-30)


def test_one_token_does_not_fluctuate():
    assert torch.equal(_variance(_moments(torch.tensor([[1.0, -3.0]]))), torch.zeros(2, dtype=torch.float64))
