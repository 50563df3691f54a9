"""Plans in steps: one step is a plain plan, what went stays gone, scores are refreshed, budgets met, refusals."""

import pytest
import torch
from families import FAMILIES

from prunekit import Magnitude, PrunekitError, Random, Taylor, discover, plan, prune, score
from prunekit.pruning import plan_in_steps, planning

CALIB = torch.randint(0, 48, (8, 12), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def model():
    return FAMILIES["llama_gqa"].model()


def test_one_step_is_a_plain_plan(model):
    groups = discover(model)
    plain = plan(groups, score(model, groups.of_kind("kv_head", "ffn_channel"), Taylor(), CALIB), 0.2)
    assert plan_in_steps(model, Taylor(), 0.2, CALIB, n_steps=1).keep == plain.keep


def test_groups_that_are_given_are_not_discovered_again(model, monkeypatch):
    groups, traced = discover(model), []
    monkeypatch.setattr(planning, "discover", lambda found: traced.append(found) or discover(found))
    found = plan_in_steps(model, Magnitude(), 0.2, n_steps=2, groups=groups)
    assert len(traced) == 1 and traced[0] is not model
    assert found.keep == plan_in_steps(model, Magnitude(), 0.2, n_steps=2).keep


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"ranking": "global"}, {"of": "units"}, {"kinds": ["kv_head"]}])
def test_steps_are_nested_and_the_last_meets_the_budget(model, monkeypatch, options):
    made = []
    monkeypatch.setattr(planning, "plan", lambda *args, **more: made.append(plan(*args, **more)) or made[-1])
    ratio = 0.1812 if "kinds" in options else 0.3
    found = plan_in_steps(model, Taylor(), ratio, CALIB, n_steps=4, **options)
    assert found is made[-1] and len(made) > 2
    for earlier, later in zip(made, made[1:], strict=False):
        assert all(set(later.keep[name]) <= set(units) for name, units in earlier.keep.items())
    if options.get("of") != "units":
        assert found.pruning_ratio == pytest.approx(ratio, abs=0.005)
    assert sum(p.numel() for p in prune(model, found).parameters()) == found.n_parameters_kept


def test_scores_are_those_of_what_is_left(model, monkeypatch):
    """With two layers that depend on each other, scores change, and so does the choice."""
    seen = []
    monkeypatch.setattr(planning, "score", lambda *args, **more: seen.append(score(*args, **more)) or seen[-1])
    plan_in_steps(model, Taylor(), 0.4, CALIB, n_steps=2)
    name = "model.layers.1.mlp:ffn_channel"
    assert len(seen) == 2 and len(seen[1][name]) < len(seen[0][name])
    groups = discover(model)
    first = plan(groups, seen[0], 0.2)
    small = prune(model, first)
    again = score(small, discover(small).of_kind("kv_head", "ffn_channel"), Taylor(), CALIB)
    assert torch.equal(seen[1][name], again[name])
    assert not torch.allclose(seen[1][name], seen[0][name][first.keep[name]])


def test_a_score_that_does_not_change_chooses_the_same_in_any_number_of_steps(model):
    plans = [plan_in_steps(model, Magnitude(), 0.3, n_steps=n, kinds=["ffn_channel"]).keep for n in (1, 3, 7)]
    assert plans[0] == plans[1] == plans[2]


def test_scaled_scores_go_on_where_a_step_leaves_one_head(model):
    options = {"kinds": ["kv_head"], "of": "units", "normalize": "loss", "ranking": "global"}
    found = plan_in_steps(model, Random(), 0.5, CALIB, n_steps=4, **options)
    assert sum(map(len, found.keep.values())) == 4


@pytest.mark.slow
def test_steps_smaller_than_a_head_are_passed_over(model):
    found = plan_in_steps(model, Taylor(), 0.25, CALIB, n_steps=100, kinds=["kv_head"], of="units")
    assert {len(units) for units in found.keep.values()} == {3}
    found = plan_in_steps(model, Magnitude(), 0.0909, n_steps=50, kinds=["kv_head"])
    assert found.pruning_ratio == pytest.approx(0.0909, abs=0.005)


def test_what_cannot_be_is_refused(model):
    for n_steps in (0, -1, 1.5, True, "2"):
        with pytest.raises(PrunekitError, match=r"n_steps=.* is not allowed; give an integer of 1 or more"):
            plan_in_steps(model, Magnitude(), 0.2, n_steps=n_steps)
    with pytest.raises(PrunekitError, match="after which calib would name other tokens; take tokens in one step"):
        plan_in_steps(model, Taylor(), 0.1, CALIB, n_steps=2, kinds=["vocabulary", "ffn_channel"])
    with pytest.raises(PrunekitError, match="remove those by a separate plan"):
        plan_in_steps(model, Magnitude(), 0.2, n_steps=2, kinds=["block", "ffn_channel"])
    with pytest.raises(PrunekitError, match="'model.layers.0.self_attn:query_head' is not found again after a step"):
        plan_in_steps(model, Magnitude(), 0.6, n_steps=4, kinds=["query_head"], of="units")
    with pytest.raises(PrunekitError, match="cannot be met"):
        plan_in_steps(model, Magnitude(), 0.95, n_steps=3)
    with pytest.raises(PrunekitError, match=r"pruning_ratio=2 is not allowed"):
        plan_in_steps(model, Magnitude(), 2, n_steps=1)
    for ratio in ("0.2", None, {"block": 0.5, "ffn_channel": 0.2}, {"ffn_channels": 0.5}):
        with pytest.raises(PrunekitError, match=r"is not allowed; give a fraction|separate plan|is unknown"):
            plan_in_steps(model, Magnitude(), ratio, n_steps=2, of="units")
    with pytest.raises(PrunekitError, match="kinds is empty"):
        plan_in_steps(model, Magnitude(), 0.2, n_steps=2, kinds=[])
    with pytest.raises(PrunekitError, match="after={} is not allowed; give a PruningPlan"):
        groups = discover(model)
        plan(groups, score(model, groups, Magnitude()), 0.2, after={})


def test_arguments_are_checked_before_the_model_is_looked_at(monkeypatch):
    monkeypatch.setattr(planning, "discover", lambda _: pytest.fail("discovered"))
    for options in ({"ranking": "best"}, {"kinds": "kv_head"}, {"round_to": 0}, {"of": "heads"}):
        with pytest.raises(PrunekitError):
            plan_in_steps(None, Magnitude(), 0.2, n_steps=2, **options)


def test_kinds_may_be_a_generator_and_those_of_a_mapping_count(model):
    listed, drawn = (
        plan_in_steps(model, Magnitude(), 0.2, n_steps=2, kinds=kinds).keep
        for kinds in (["ffn_channel"], (kind for kind in ["ffn_channel"]))
    )
    assert drawn == listed
    ratio, groups = {"query_head": 0.5}, discover(model)
    plain = plan(groups, score(model, groups, Magnitude()), ratio, of="units")
    assert plan_in_steps(model, Magnitude(), ratio, n_steps=1, of="units").keep == plain.keep


@pytest.mark.parametrize("ranking", ["local", "global"])
@pytest.mark.parametrize("of", ["units", "parameters"])
def test_what_went_before_goes_first_in_every_mode(model, of, ranking):
    groups, options = discover(model), {"of": of, "ranking": ranking, "kinds": ["ffn_channel"]}
    low = {g.name: torch.arange(g.n_units).float() + 1 for g in groups}
    high = {name: values.flip(0) for name, values in low.items()}
    before = plan(groups, low, 0.1, **options)
    after = plan(groups, high, 0.2, after=before, **options)
    assert any(before.removed(name) for name in before.keep)
    for name in before.keep:
        assert set(before.removed(name)) <= set(after.removed(name))
