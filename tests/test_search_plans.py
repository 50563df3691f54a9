"""The space of plans: every point meets its budget, and is what it says when it is cut."""

import numpy as np
import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit import Magnitude, PlanSpace, PrunekitError, plan, score
from prunekit.pruning import compensation
from prunekit.pruning.budgets import TOLERANCE
from prunekit.search import Choice, CostTable, Range, known_points, parameter_table

NAMES = ["llama_gqa", "gpt2", "opt", "bloom", "qwen2_moe"]
GROUPS = FAMILIES["llama_gqa"].groups()


def random_scores(groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.rand(group.n_units, generator=generator) for group in groups}


TABLE = parameter_table(GROUPS)
SCORES = {"one": random_scores(GROUPS, 1), "two": random_scores(GROUPS, 2)}


def sampled(space, n=10, seed=0):
    return space.sample(n, np.random.default_rng(seed))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_family_has_points_that_cost_what_they_say_when_they_are_cut(name):
    family = FAMILIES[name]
    model, groups = family.model(), family.groups()
    space = PlanSpace(groups, {"random": random_scores(groups)}, 0.1)
    for point in sampled(space, 4):
        build, data = space.job(point)
        cost = space.costs(point)["parameters"]
        assert sum(p.numel() for p in build(model, data).parameters()) == cost
        assert 0.9 - TOLERANCE <= cost / groups.n_parameters <= 0.9


@given(ratio=st.floats(0.02, 0.3), seed=st.integers(0, 1000), whole=st.integers(0, 1), ranged=st.booleans())
@settings(max_examples=30, deadline=None)
def test_every_sample_meets_its_budget(ratio, seed, whole, ranged):
    space = PlanSpace(GROUPS, SCORES, ratio, layer_range=ranged, whole_layers=whole)
    rng = np.random.default_rng(seed)
    points = space.sample(5, rng)
    points += [p for p in (space.fitted(space.mutated(point, rng)) for point in points) if p is not None]
    for point in points:
        assert space.check(point)
        kept = space.plan(point).n_parameters_kept
        assert kept == space.costs(point)["parameters"]
        limit = (1 - ratio) * GROUPS.n_parameters
        gone = [layer for layer in (0, 1) if whole and point[f"layer.{layer}"]]
        assert kept <= limit * (1 + 1e-9)
        if not gone:  # a layer may weigh more than what is to go
            assert limit - kept <= TOLERANCE * GROUPS.n_parameters


def test_a_fitted_point_stays_as_it_is():
    space = PlanSpace(GROUPS, SCORES, 0.2)
    points = sampled(space, 30)
    assert [space.fitted(point) for point in points] == points


def test_two_budgets_are_met_at_once():
    heads = {g.name: np.arange(g.n_units + 1.0) for g in GROUPS.of_kind("kv_head")}
    channels = {g.name: np.zeros(g.n_units + 1) for g in GROUPS.of_kind("ffn_channel")}
    table = CostTable("heads", 8.0, heads | channels)
    space = PlanSpace(GROUPS, SCORES, [parameter_table(GROUPS).at_most(0.85 * GROUPS.n_parameters), table.at_most(6)])
    for point in sampled(space):
        costs = space.costs(point)
        assert costs["heads"] <= 6 and costs["parameters"] <= 0.85 * GROUPS.n_parameters


def test_a_range_of_ratios_makes_a_knob_of_the_budget():
    space = PlanSpace(GROUPS, SCORES, Range(0.1, 0.3))
    assert space.goals == ["parameters"]
    for point in sampled(space, 30):
        kept = space.plan(point).n_parameters_kept
        assert 0 <= point["parameters"] - kept <= TOLERANCE * GROUPS.n_parameters
        assert 0.7 * GROUPS.n_parameters <= point["parameters"] <= 0.9 * GROUPS.n_parameters


def test_the_layer_range_leaves_other_layers_whole():
    space = PlanSpace(GROUPS, SCORES, 0.1)
    for point in sampled(space, 20):
        for name, group in space.units.items():
            if not point["first_layer"] <= group.layer <= point["last_layer"]:
                assert point[name] == 0 and not space.plan(point).removed(group.name)


def test_units_go_by_the_importance_that_a_point_names():
    space = PlanSpace(GROUPS, SCORES, 0.2)
    for point in sampled(space):
        made, scores = space.plan(point), SCORES[point["importance"]]
        for group in space.units.values():
            gone = made.removed(group.name)
            assert gone == sorted(scores[group.name].argsort(stable=True)[: len(gone)].tolist())


def test_whole_layers_go_and_are_no_more_than_allowed():
    model = FAMILIES["llama_gqa"].model()
    space = PlanSpace(GROUPS, SCORES, 0.4, whole_layers=1)
    points = [point for point in sampled(space, 20) if point["layer.0"] or point["layer.1"]]
    assert points and not any(point["layer.0"] and point["layer.1"] for point in points)
    build, data = space.job(points[0])
    small = build(model, data)
    assert len(small.model.layers) == 1
    assert sum(p.numel() for p in small.parameters()) == space.costs(points[0])["parameters"]


def test_compensation_is_a_knob_and_is_carried_out(monkeypatch):
    monkeypatch.setattr(compensation, "mean_loss", lambda *_: 1.0)  # random tokens say nothing of the loss
    model = FAMILIES["llama_gqa"].model(dtype=torch.float32)
    calib = torch.randint(48, (96, 16), generator=torch.Generator().manual_seed(0))
    space = PlanSpace(GROUPS, {"one": SCORES["one"]}, 0.2, compensate=calib)
    (point,) = sampled(space, 1)
    refit, plain = ({**point, "compensate": wanted} for wanted in (True, False))
    cut, refitted = (build(model, data) for build, data in map(space.job, (plain, refit)))
    assert torch.equal(cut.model.layers[0].mlp.gate_proj.weight, refitted.model.layers[0].mlp.gate_proj.weight)
    assert not torch.equal(cut.model.layers[0].mlp.down_proj.weight, refitted.model.layers[0].mlp.down_proj.weight)


def test_narrowed_limits_are_kept_and_tell_in_what_they_cannot():
    space = PlanSpace(GROUPS, SCORES, 0.2).narrowed({"kv_head.0": Range(0.5, 0.75), "importance": Choice(("two",))})
    for point in sampled(space, 10):
        assert 0.5 <= point["kv_head.0"] <= 0.75 or point["first_layer"] > 0
        assert point["importance"] == "two" and space.check(point) == point and space.plan(point)
    stays = PlanSpace(GROUPS, SCORES, 0.2, whole_layers=1).narrowed({"layer.1": Choice((False,))})
    assert not any(point["layer.1"] for point in sampled(stays, 30))
    tight = {name: Range(0.0, 0.15) for name in space.units}
    with pytest.raises(PrunekitError, match="cannot be met"):
        PlanSpace(GROUPS, SCORES, 0.35).narrowed(tight)
    with pytest.raises(PrunekitError, match="limits name 'ffn.9'"):
        PlanSpace(GROUPS, SCORES, 0.2).narrowed({"ffn.9": Range(0, 0.5)})


@pytest.mark.parametrize("ranking", ["local", "global"])
def test_the_point_of_a_plan_cuts_as_much_of_each_group(ranking):
    chosen = plan(GROUPS, SCORES["two"], 0.2, ranking=ranking)
    space = PlanSpace(GROUPS, SCORES, 0.2)
    again = space.plan(space.point_of(chosen, "two"))
    for name in chosen.keep:
        assert abs(len(chosen.keep[name]) - len(again.keep[name])) <= 1
    assert again.notes["importance"] == "two"


@pytest.mark.parametrize("budgets", [0.25, Range(0.2, 0.3)])
def test_what_is_known_without_a_search_is_in_the_space(budgets):
    space = PlanSpace(GROUPS, SCORES, budgets)
    points = known_points(space)
    assert len(points) == 4 and all(space.check(point) for point in points)
    even = [point[name] for point in points[:1] for name in space.units]
    assert max(even) - min(even) <= 0.25  # four heads a layer


def test_the_same_seed_gives_the_same_plan():
    one, other = (PlanSpace(GROUPS, SCORES, 0.2) for _ in range(2))
    assert [one.plan(p).keep for p in sampled(one, seed=5)] == [other.plan(p).keep for p in sampled(other, seed=5)]


def test_what_makes_a_space_another_shows_in_its_description():
    space = PlanSpace(GROUPS, SCORES, 0.2)
    assert space.described() == PlanSpace(GROUPS, SCORES, 0.2).described()
    others = [
        PlanSpace(GROUPS, SCORES, 0.21),
        PlanSpace(GROUPS, {**SCORES, "two": random_scores(GROUPS, 3)}, 0.2),
        PlanSpace(GROUPS, SCORES, 0.2, min_units=2),
        PlanSpace(GROUPS, SCORES, 0.2, whole_layers=1),
        PlanSpace(GROUPS, SCORES, 0.2, compensate=torch.ones(1, 4, dtype=torch.long)),
    ]
    assert all(other.described() != space.described() for other in others)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budgets": 0.97}, r"parameters ≤ .* cannot be met: pruning reaches"),
        ({"budgets": 1.2}, r"budgets=1.2; give a pruning ratio in \[0, 1\)"),
        ({"budgets": "half"}, "budgets='half'"),
        ({"budgets": []}, r"budgets=\[\]"),
        ({"importances": {}}, "give label → scores"),
        ({"importances": {"one": {}}}, "scores have no entry for"),
        ({"importances": SCORES["one"]}, r"importances\[.*\]=tensor.* is not allowed; give a dictionary"),
        ({"importances": {"one": Magnitude()}}, r"importances\['one'\]=Magnitude.* is not allowed; give a dictionary"),
        ({"kinds": ("rank",)}, "no exact group .* lies in a layer; this model has block, ffn_channel"),
        ({"kinds": "ffn_channel"}, "kinds='ffn_channel' is not allowed; give a list"),
        ({"min_units": 1000}, "more than min_units=1000 units"),
        ({"layer_range": "no"}, "layer_range='no'"),
        ({"compensate": True}, "compensate=True is not allowed; give a dense tensor"),
        ({"budgets": 0}, "the dense model costs no more than that already"),
        ({"budgets": Range(0.2, 0.97)}, "cannot be met"),
        ({"budgets": [TABLE.at_most(50_000), TABLE.at_most(40_000)]}, "two budgets are on 'parameters'"),
        ({"limits": {"kv_head.0": 0.5}}, r"limits\['kv_head.0'\]=0.5 is not allowed; give .*Range"),
        ({"limits": {"kv_head.0": Range(0.9, 1.0)}}, "give a Range within"),
        ({"limits": {"importance": Choice(("one", "three"))}}, "importance cannot be limited to"),
        ({"min_units": 0}, "min_units=0"),
        ({"whole_layers": -1}, "whole_layers=-1"),
        ({"groups": 3}, "groups=3 is not allowed; give .*Groups"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options, says):
    given = {"groups": GROUPS, "importances": SCORES, "budgets": 0.2} | options
    with pytest.raises(PrunekitError, match=says):
        PlanSpace(**given)


def test_a_budget_names_what_can_be_met():
    with pytest.raises(PrunekitError) as refusal:
        PlanSpace(GROUPS, SCORES, 0.97)
    least = float(str(refusal.value).split("reaches ")[1].split(" at best")[0].replace(",", ""))
    space = PlanSpace(GROUPS, SCORES, [parameter_table(GROUPS).at_most(least * 1.01)], layer_range=False)
    assert sampled(space, 1)
    with pytest.raises(PrunekitError, match="a budget of -3 parameters is not allowed"):
        parameter_table(GROUPS).at_most(-3)


def test_points_by_hand_are_told_when_they_miss_a_budget():
    space = PlanSpace(GROUPS, SCORES, 0.2)
    (point,) = sampled(space, 1)
    more = point | dict.fromkeys(space.units, 0.0)
    with pytest.raises(PrunekitError, match="more than its budget .* fit it first"):
        space.plan(more)


def test_a_budget_of_no_more_than_must_stay_is_met():
    """The very number that the refusal names, to the last bit."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        saved = {g.name: np.sort(rng.random(g.n_units + 1)) for g in GROUPS.of_kind("kv_head", "ffn_channel")}
        table = CostTable("ms", 10.0, saved)
        most = 10.0 - sum(float(values[-2]) for values in saved.values())
        assert sampled(PlanSpace(GROUPS, SCORES, [table.at_most(most)], layer_range=False), 1)


def test_a_table_knows_its_groups():
    table = parameter_table(GROUPS)
    with pytest.raises(PrunekitError, match="has no 'nothing'"):
        table.of({"nothing": 1})
    made = plan(GROUPS, SCORES["one"], 0.3)
    gone = {name: len(made.removed(name)) for name in made.keep}
    assert table.of(gone) == made.n_parameters_kept and "CostTable(parameters" in repr(table)


def test_points_do_not_depend_on_scores_of_magnitude():
    model = FAMILIES["llama_gqa"].model()
    space = PlanSpace(GROUPS, {"l2": score(model, GROUPS.of_kind("kv_head", "ffn_channel"), Magnitude(), None)}, 0.2)
    assert "importance" not in space.knobs and sampled(space, 2)
