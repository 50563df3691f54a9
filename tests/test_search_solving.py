"""Budgets solved: the least damage of all choices, every budget met, and measured damages as those of the cut."""

from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from other_families import EVERYONE
from test_gaps import deep
from test_importance import tiny_llama
from test_recovery import counting

import prunekit as pk
from prunekit import PrunekitError
from prunekit.calibration import mean_loss
from prunekit.pruning.planning import plan_without
from prunekit.search import (
    CostTable,
    Range,
    cache_table,
    mac_table,
    measure_damages,
    parameter_table,
    solve_budgets,
    solve_in_steps,
    weight_table,
)
from prunekit.search.solving import _solved


@pytest.fixture(scope="module")
def model():
    return tiny_llama(n_heads=4, n_kv=4)


@pytest.fixture(scope="module")
def groups(model):
    return pk.discover(model)


@pytest.fixture(scope="module")
def scores(model, groups):
    return pk.score(model, groups.of_kind("kv_head", "ffn_channel"), pk.Magnitude())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n_budgets=st.integers(1, 3))
def test_no_choice_that_meets_all_budgets_does_less_damage(seed, n_budgets):
    rng = np.random.default_rng(seed)
    rises = [np.concatenate([[0], rng.random(3).cumsum()]) for _ in range(4)]
    tables = [
        CostTable(str(k), 10.0, {str(g): np.concatenate([[0], rng.random(3).cumsum()]) for g in range(4)})
        for k in range(n_budgets)
    ]
    limits = [table.at_most(10 - float(rng.random() * 4)) for table in tables]
    costs = {b.name: [b.table.saved[str(g)] for g in range(4)] for b in limits}

    def meets(choice):
        return all(b.table.of({str(g): n for g, n in enumerate(choice)}) <= b.high + 1e-9 for b in limits)

    possible = [sum(r[i] for r, i in zip(rises, c, strict=True)) for c in product(range(4), repeat=4) if meets(c)]
    if not possible:
        with pytest.raises(PrunekitError, match="no plan meets"):
            _solved(rises, costs, limits)
        return
    found = _solved(rises, costs, limits)
    assert meets(found)
    assert sum(r[i] for r, i in zip(rises, found, strict=True)) == pytest.approx(min(possible), rel=1e-3)


def test_budgets_of_several_kinds_are_met_by_the_model_that_is_cut(model, groups, scores):
    tables = {
        "parameters": (parameter_table(groups), lambda m: sum(p.numel() for p in m.parameters())),
        "weight_bytes": (weight_table(model, groups), lambda m: 4 * sum(p.numel() for p in m.parameters())),
        "macs": (mac_table(model, groups), None),
        "cache_bytes": (table := cache_table(model, groups, context=32), None),
    }
    assert table.total == 2 * 2 * 4 * 4 * 4 * 32  # K and V, layers, KV heads, channels, bytes, tokens
    limits = [table.at_most(0.8 * table.total) for table, _ in tables.values()]
    plan = solve_budgets(groups, scores, limits)
    small = pk.prune(model, plan, measure=False)
    for name, (table, counted) in tables.items():
        measure = counted or table.measure
        assert measure(small) <= 0.8 * table.total
        assert plan.notes["costs"][name] == pytest.approx(measure(small))
    ratio = solve_budgets(groups, scores, 0.1)
    assert 0.1 <= ratio.pruning_ratio < 0.15


def test_without_damages_the_scores_are_added_up(groups, scores):
    plan = solve_budgets(groups, scores, 0.2)
    removed = sum(float(scores[name][plan.removed(name)].sum()) for name in plan.keep)
    assert plan.notes["expected_rise"] == pytest.approx(removed)
    for name in plan.keep:
        gone, left = scores[name][plan.removed(name)], scores[name][plan.keep[name]]
        assert not len(gone) or gone.max() <= left.min()


def test_measured_damages_are_those_of_the_cut_model(model, groups, scores):
    tokens = counting(8)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = measure_damages(model, groups, scores, tokens, shares=(0.5, 1.0))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    name = groups.of_kind("ffn_channel")[0].name
    order = scores[name].argsort(stable=True).tolist()
    for n in (6, 11):
        plan = plan_without(groups, {name: order[:n]}, {})
        rise = mean_loss(pk.prune(model, plan, measure=False), tokens) - mean_loss(model, tokens)
        assert found[name][n] == pytest.approx(rise, abs=1e-5)
    assert found[name][0] == 0 and len(found[name]) == 13


def test_what_does_nothing_goes_first_and_no_more_than_was_asked(groups, scores):
    model = tiny_llama(n_heads=4, n_kv=4)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    plan = solve_in_steps(model, groups, scores, 0.1, counting(8), n_steps=2, shares=(0.25, 0.5, 1.0))
    removed = {name: len(plan.removed(name)) for name in plan.keep if plan.removed(name)}
    assert set(removed) == {"model.layers.1.mlp:ffn_channel"}
    assert plan.notes["expected_rise"] < 1e-4 and 0.1 <= plan.pruning_ratio < 0.12


def test_what_an_earlier_plan_removed_stays_gone(model, groups, scores):
    first = solve_budgets(groups, {name: -values for name, values in scores.items()}, 0.1)
    then = solve_budgets(groups, scores, 0.3, after=first)
    assert all(set(first.removed(name)) <= set(then.removed(name)) for name in first.keep)
    damages = measure_damages(model, groups, scores, counting(8), around=first)
    assert all(damages[name][len(first.removed(name))] == 0 for name in first.keep)


def test_the_expected_rise_counts_what_an_earlier_plan_took_and_what_goes_beyond_all_shares(model, groups, scores):
    dear = {name: -values for name, values in scores.items()}
    first = solve_budgets(groups, dear, 0.1)
    then = solve_budgets(groups, {n: v.requires_grad_() for n, v in scores.items()}, 0.3, after=first)
    removed = sum(float(scores[name][then.removed(name)].sum()) for name in then.keep)
    assert then.notes["expected_rise"] == pytest.approx(removed)
    found = measure_damages(model, groups, scores, counting(8), shares=(0.125,))
    whole = measure_damages(model, groups, scores, counting(8), shares=(0.125, 1.0))
    assert all(np.array_equal(found[name], whole[name]) for name in scores)


def test_a_budget_that_is_met_exactly_takes_no_more(model, groups):
    heads = pk.score(model, groups.of_kind("kv_head"), pk.Magnitude())
    table = cache_table(model, groups, context=32)
    plan = solve_budgets(groups, heads, [table.at_most(0.75 * table.total)])
    assert (
        sum(len(plan.removed(name)) for name in plan.keep) == 2
        and plan.notes["costs"]["cache_bytes"] == 0.75 * table.total
    )


def test_a_single_kv_head_stays_and_models_without_a_cache_are_refused():
    model = tiny_llama(n_heads=4, n_kv=1)
    groups = pk.discover(model)
    channels = pk.score(model, groups.of_kind("ffn_channel"), pk.Magnitude())
    assert solve_budgets(
        groups, channels, [mac_table(model, groups).at_most(0.9 * mac_table(model, groups).total)]
    ).keep
    mamba = EVERYONE["mamba"].model()
    with pytest.raises(PrunekitError, match="a MambaForCausalLM keeps no keys and values; give another budget"):
        cache_table(mamba, pk.discover(mamba), context=8, kinds=("layer",))


def test_damages_of_a_mixture_are_those_of_its_logits():
    model = EVERYONE["mixtral"].model(dtype=torch.float32)
    model.config.output_router_logits = True
    groups = pk.discover(model)
    heads = pk.score(model, groups.of_kind("kv_head"), pk.Magnitude())
    tokens = counting(4) % 40
    found = measure_damages(model, groups, heads, tokens, shares=(0.5,))
    model.config.output_router_logits = False
    again = measure_damages(model, groups, heads, tokens, shares=(0.5,))
    assert all(np.allclose(found[name], again[name], atol=1e-6) for name in heads)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_with_whole_layers_no_choice_that_meets_the_budget_does_less_damage(seed):
    """Groups 0 and 1 lie in layer 4, groups 2 and 3 in layer 5; one layer stays."""
    rng = np.random.default_rng(seed)
    rises = [np.concatenate([[0], rng.random(2).cumsum()]) for _ in range(4)] + [np.array([0, 2.5]) for _ in range(2)]
    saved = [np.concatenate([[0], rng.random(2).cumsum()]) for _ in range(4)]
    saved += [np.array([0, saved[0][-1] + saved[1][-1] + 0.5]), np.array([0, saved[2][-1] + saved[3][-1] + 0.5])]
    table = CostTable("cost", 10.0, {str(g): each for g, each in enumerate(saved)})
    limit = table.at_most(10 - float(rng.random() * 6))
    inside, stay = [(0, 4), (1, 4), (2, 5), (3, 5)], [[4, 5]]

    def counted(choice):
        """None where a layer is gone, whatever else was chosen there."""
        return [None if g < 4 and choice[4 + g // 2] else i for g, i in enumerate(choice)]

    def total(values, choice):
        return sum(v[i] for v, i in zip(values, choice, strict=True) if i is not None)

    choices = [counted((*c, a, b)) for c in product(range(3), repeat=4) for a, b in ((0, 0), (0, 1), (1, 0))]
    possible = [total(rises, c) for c in choices if 10 - total(saved, c) <= limit.high + 1e-9]
    if not possible:
        least = 10 - max(total(saved, c) for c in choices)
        with pytest.raises(PrunekitError, match=f"at best each alone can reach cost {least:,.6g};"):
            _solved(rises, {"cost": saved}, [limit], inside, stay)
        return
    found = _solved(rises, {"cost": saved}, [limit], inside, stay)
    assert found == counted([0 if i is None else i for i in found]) and 10 - total(saved, found) <= limit.high + 1e-9
    assert total(rises, found) == pytest.approx(min(possible), rel=1e-3)


@pytest.mark.parametrize("kind", ["layer", "block"])
def test_depth_and_width_share_a_budget(kind):
    model = deep(n_layers=4)
    groups = pk.discover(model)
    kinds = ("kv_head", "ffn_channel", kind)
    scores = pk.score(model, groups.of_kind(*kinds), pk.Magnitude())
    with torch.no_grad():  # one layer that does nothing, and one whose FFN does not
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        for number in (1, 2):
            model.model.layers[number].mlp.down_proj.weight.zero_()
    tables = [parameter_table(groups), mac_table(model, groups, kinds=kinds)]
    limits = [table.at_most(0.6 * table.total) for table in tables]
    plan = solve_in_steps(model, groups, scores, limits, counting(8), n_steps=2, shares=(0.5, 1.0))
    assert ("model.layers.1" if kind == "layer" else "model.layers.1.self_attn") in plan.removed_parts
    widths = [name for name, units in plan.keep.items() if 0 < len(units) < plan.n_units[name]]
    assert widths and not [name for name in widths if name.startswith(tuple(f"{path}." for path in plan.removed_parts))]
    small = pk.prune(model, plan, measure=False)
    assert sum(p.numel() for p in small.parameters()) == plan.n_parameters_kept <= 0.6 * tables[0].total
    assert tables[1].measure(small) <= 0.6 * tables[1].total
    assert plan.notes["costs"]["macs"] == pytest.approx(tables[1].measure(small))


def test_a_layer_that_went_before_stays_gone_and_one_stays():
    model = deep(n_layers=3)
    groups = pk.discover(model)
    scores = {**pk.score(model, groups.of_kind("ffn_channel", "layer"), pk.Magnitude())}
    layers = [g.name for g in groups.of_kind("layer")]
    first = plan_without(groups, {layers[1]: [0]}, {})
    dear = {name: values * (1000 if name in layers else 1) for name, values in scores.items()}
    then = solve_budgets(groups, dear, first.pruning_ratio + 0.05, after=first)
    assert then.removed_layers == ["model.layers.1"] and not then.cut_groups("hidden")
    assert not [name for name in then.cut_groups("ffn_channel") if name.startswith("model.layers.1.")]
    damages = measure_damages(model, groups, scores, counting(8), around=first)
    assert not damages["model.layers.1.mlp:ffn_channel"].any() and not damages[layers[1]].any()
    cheap = {name: values * (1e-6 if name in layers else 1) for name, values in scores.items()}
    most = solve_budgets(groups, cheap, plan_without(groups, {n: [0] for n in layers[:2]}, {}).pruning_ratio)
    assert len(most.removed_layers) == 2


def test_what_cannot_be_is_refused_by_name(model, groups, scores):
    table = parameter_table(groups)
    with pytest.raises(
        PrunekitError, match="no plan meets parameters ≤ 10 of .*: at best each alone can reach parameters"
    ):
        solve_budgets(groups, scores, [table.at_most(10)])
    for solve in (solve_budgets, partial(solve_in_steps, model, calib=counting(8))):
        with pytest.raises(PrunekitError, match="a budget with a Range is for a search"):
            solve(groups=groups, scores=scores, budgets=[table.at_most(Range(1000.0, 2000.0))])
    with pytest.raises(PrunekitError, match="scores have 'x', which is no group of this model"):
        solve_budgets(groups, {"x": torch.ones(2)}, 0.1)
    with pytest.raises(PrunekitError, match="is inexact, or a single unit"):
        solve_budgets(groups, {g.name: torch.ones(g.n_units) for g in groups.of_kind("hidden")}, 0.1)
    name = next(iter(scores))
    with pytest.raises(PrunekitError, match=rf"damages of {name!r} have shape \(2,\); give 5 finite numbers"):
        solve_budgets(groups, scores, 0.1, damages={name: [0.0, 1.0]})
    with pytest.raises(PrunekitError, match=r"shares=\(2.0,\) is not allowed"):
        measure_damages(model, groups, scores, counting(8), shares=(2.0,))
    hidden = groups.of_kind("hidden")[0]
    other = pk.plan(groups, {hidden.name: torch.ones(hidden.n_units)}, 0.1875, kinds=("hidden",))
    with pytest.raises(PrunekitError, match=r"the earlier plan cuts '.*hidden', which has no scores"):
        solve_budgets(groups, scores, 0.3, after=other)
