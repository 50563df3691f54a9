"""Budgets are met within half a percent or refused with the nearest that can be."""

import copy
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, logits, relative_difference, zero_units
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from prunekit import Magnitude, PrunekitError, PruningPlan, discover, plan, prune, score
from prunekit.discovery.tracing import trace
from prunekit.errors import BudgetError
from prunekit.pruning import surgery
from prunekit.pruning.budgets import TOLERANCE
from prunekit.pruning.plan_options import candidates_of, default_units

GROUPS = {name: discover(FAMILIES[name].model()) for name in ("llama_gqa", "gpt2", "bloom")}
GROUPS_GQA = GROUPS["llama_gqa"]


def random_scores(groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand(g.n_units, generator=generator) for g in groups}


def counted(groups, made):
    """Parameters left, counted by brute force over every index of every parameter."""
    alive = {name: [torch.ones(n, dtype=torch.bool) for n in shape] for name, shape in groups.shapes.items()}
    for name in made.keep:
        for m in groups[name].members:
            alive[m.parameter][m.dim][m.index[made.removed(name)].flatten()] = False
    return sum(math.prod(int(dim.sum()) for dim in dims) for dims in alive.values())


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(GROUPS)),
    ratio=st.floats(0, 0.9),
    ranking=st.sampled_from(["local", "global"]),
    seed=st.integers(0, 99),
    round_to=st.sampled_from([1, 2, 8]),
)
def test_a_budget_is_met_within_half_a_percent_or_refused(name, ratio, ranking, seed, round_to):
    groups = GROUPS[name]
    try:
        made = plan(groups, random_scores(groups, seed), ratio, ranking=ranking, round_to={"ffn_channel": round_to})
    except PrunekitError as error:
        assert "cannot be met" in str(error)
        advice = float(re.search(r"(?:at most|ask for) (0\.\d+)", str(error)).group(1))
        plan(groups, random_scores(groups, seed), advice, ranking=ranking, round_to={"ffn_channel": round_to})
        return
    assert abs(made.pruning_ratio - ratio) <= TOLERANCE
    assert made.n_parameters_kept == counted(groups, made)
    for kept_name, kept in made.keep.items():
        full = made.n_units[kept_name]
        if groups[kept_name].kind == "ffn_channel" and len(kept) < full:
            assert len(kept) % round_to == 0


def test_the_parameter_count_is_that_of_the_cut_model():
    model = FAMILIES["llama_gqa"].model()
    made = plan(GROUPS_GQA, random_scores(GROUPS_GQA), 0.3)
    assert sum(p.numel() for p in prune(model, made).parameters()) == made.n_parameters_kept


def test_a_summary_counts_units_by_kind():
    made = plan(GROUPS_GQA, random_scores(GROUPS_GQA), 0.25, of="units")
    assert made.summary().to_dict("index") == {
        "kv_head": {"groups": 2, "before": 8, "after": 6}, "ffn_channel": {"groups": 2, "before": 192, "after": 144}
    }  # fmt: skip
    head, parameters, *kinds = made.summary_rows()
    assert head == ("", "before", "after", "removed") and kinds[1] == ("ffn_channel units", "192", "144", "25.0%")
    assert parameters[:3] == ("parameters", f"{made.n_parameters:,}", f"{made.n_parameters_kept:,}")


def test_the_refusal_names_a_ratio_that_can_be_met():
    scores = random_scores(GROUPS_GQA)
    with pytest.raises(PrunekitError, match=r"at most 0\.\d+ of the parameters") as refusal:
        plan(GROUPS_GQA, scores, 0.97)
    largest = float(str(refusal.value).split("at most ")[1].split()[0])
    assert plan(GROUPS_GQA, scores, largest).pruning_ratio == pytest.approx(largest, abs=TOLERANCE)
    with pytest.raises(PrunekitError, match="nearest feasible ratios are") as coarse:
        plan(GROUPS_GQA, scores, 0.02, kinds=("kv_head",))
    nearest = float(str(coarse.value).split("ask for ")[1])
    assert plan(GROUPS_GQA, scores, nearest, kinds=("kv_head",)).pruning_ratio == pytest.approx(nearest, abs=TOLERANCE)


def test_what_rounding_forbids_is_refused_by_its_name():
    groups = GROUPS_GQA
    for size in (1000, 32):  # no step at all, steps that are too large
        with pytest.raises(PrunekitError, match=f"pruning_ratio=0.25 cannot be met.*round_to={size}"):
            plan(groups, random_scores(groups), 0.25, round_to=size)


def test_a_kind_that_rounding_leaves_whole_is_named():
    groups = GROUPS_GQA
    made = plan(groups, random_scores(groups), 0.1132, round_to=8)
    assert all(not made.removed(name) for name in made.keep if name.endswith("kv_head"))
    assert "kv_head: no smaller number of units for round_to=8" in repr(made)
    assert "ffn_channel" not in repr(made) and "kv_head" not in repr(plan(groups, random_scores(groups), 0.1132))


def test_lowest_scores_go_first_and_local_ranking_takes_equal_shares():
    scores = {g.name: torch.arange(g.n_units).float() for g in GROUPS_GQA}
    made = plan(GROUPS_GQA, scores, 0.25)
    for name, kept in made.keep.items():
        assert kept == list(range(made.n_units[name] - len(kept), made.n_units[name]))
    kept = made.table().groupby("kind")["kept"].agg(["min", "max"])
    assert kept.loc["kv_head", "min"] == kept.loc["kv_head", "max"] == 3
    assert kept.loc["ffn_channel", "max"] - kept.loc["ffn_channel", "min"] <= 1


def test_global_ranking_removes_heads_too():
    """The reference ranks head sums against single channels, and so never removes a head."""
    drawn = random_scores(GROUPS_GQA)  # a share of what each unit holds
    made = plan(GROUPS_GQA, {g.name: _parameters(g) * drawn[g.name] for g in GROUPS_GQA}, 0.3, ranking="global")
    assert any(len(made.keep[g.name]) < g.n_units for g in GROUPS_GQA.of_kind("kv_head"))
    assert len({len(kept) for name, kept in made.keep.items() if "ffn" in name}) > 1


def _parameters(group):
    return sum(m.width for m in group.members)


def test_units_are_counted_where_told():
    made = plan(GROUPS_GQA, random_scores(GROUPS_GQA), 0.25, of="units")
    assert {name: len(kept) for name, kept in made.keep.items() if ".0." in name} == {
        "model.layers.0.self_attn:kv_head": 3, "model.layers.0.mlp:ffn_channel": 72
    }  # fmt: skip
    by_kind = plan(GROUPS_GQA, random_scores(GROUPS_GQA), {"ffn_channel": 0.5}, of="units")
    assert all(len(kept) == 48 for kept in by_kind.keep.values()) and len(by_kind.keep) == 2
    together = plan(GROUPS_GQA, random_scores(GROUPS_GQA), {"ffn_channel": 0.5}, of="units", ranking="global")
    assert sum(map(len, together.keep.values())) == 96


def test_protected_layers_and_kinds_stay_whole():
    made = plan(GROUPS_GQA, random_scores(GROUPS_GQA), 0.2, protect_layers=[0])
    assert all(".1." in name for name in made.keep)
    heads = plan(GROUPS_GQA, random_scores(GROUPS_GQA), 0.3, of="units", kinds=["kv_head"])
    assert all(name.endswith(":kv_head") for name in heads.keep)


def test_at_least_one_unit_stays():
    made = plan(GROUPS_GQA, random_scores(GROUPS_GQA), 0.999, of="units")
    assert all(made.keep.values())
    more = plan(GROUPS_GQA, random_scores(GROUPS_GQA), 0.5, of="units", min_units=2)
    assert min(map(len, more.keep.values())) == 2


def test_the_same_scores_give_the_same_plan():
    scores = {g.name: torch.zeros(g.n_units) for g in GROUPS_GQA}  # ties everywhere
    assert plan(GROUPS_GQA, scores, 0.25) == plan(GROUPS_GQA, scores, 0.25)


def test_a_plan_goes_to_json_and_back(tmp_path):
    made = plan(GROUPS_GQA, random_scores(GROUPS_GQA), 0.25)
    made.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == made
    assert json.loads((tmp_path / "plan.json").read_text())["keep"] == made.keep
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    assert "of 70,0" in repr(made) or "parameters go" in repr(made)
    assert "kv_head" in made._repr_html_()


@pytest.mark.parametrize("ratio", [1.0, -0.1, float("nan"), 1.5, True, "0.2"])
def test_a_ratio_that_is_no_fraction_is_refused(ratio):
    with pytest.raises(PrunekitError, match=r"pruning_ratio=.* give a fraction in \[0, 1\)"):
        plan(GROUPS_GQA, random_scores(GROUPS_GQA), ratio)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "rows"}, "of='rows' is unknown; allowed: 'parameters', 'units'"),
        ({"ranking": "best"}, "ranking='best' is unknown"),
        ({"kinds": ["heads"]}, "kind='heads' is unknown; allowed: 'kv_head'"),
        ({"protect_layers": [9]}, "protect_layers names 9; this model has layers 0 to 1"),
        ({"round_to": 0}, "round_to=0 is not allowed"),
        ({"kinds": []}, "kinds is empty"),
        (
            {"of": "units", "round_to": {"kv_head": 99}},
            "units of .* cannot go: round_to or min_units lets at most 0.0000",
        ),
        ({"kinds": ["kv_head", "query_head"]}, "give kinds that do not overlap"),
        ({"kinds": "kv_head"}, r"kinds='kv_head' is not allowed; give a list, each entry a text"),
        ({"protect_layers": 0}, r"protect_layers=0 is not allowed; give a list, each entry an integer"),
        ({"protect_layers": [[0]]}, r"protect_layers\[0\]=\[0\] is not allowed; give an integer"),
        ({"min_units": "2"}, "min_units='2' is not allowed; give an integer of 1 or more"),
        ({"round_to": {"heads": 2}}, "round_to: kind='heads' is unknown; allowed: 'kv_head'"),
        ({"round_to": {"rank": 0}}, r"round_to\['rank'\]=0 is not allowed"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(PrunekitError, match=message):
        plan(GROUPS_GQA, random_scores(GROUPS_GQA), 0.2, **options)


def test_scores_that_do_not_fit_are_named():
    scores = random_scores(GROUPS_GQA)
    name = "model.layers.0.mlp:ffn_channel"
    with pytest.raises(PrunekitError, match=f"no entry for '{name}'"):
        plan(GROUPS_GQA, {k: v for k, v in scores.items() if k != name}, 0.2)
    with pytest.raises(PrunekitError, match="must be 96 finite numbers; got shape"):
        plan(GROUPS_GQA, {**scores, name: torch.full((96,), math.nan)}, 0.2)
    with pytest.raises(PrunekitError, match=rf"scores\['{name}'\]=.* give a dense tensor"):
        plan(GROUPS_GQA, {**scores, name: scores[name].tolist()}, 0.2)
    with pytest.raises(PrunekitError, match="scores=.* is not allowed; give a dictionary"):
        plan(GROUPS_GQA, [scores], 0.2)
    with pytest.raises(PrunekitError, match=r"groups=.* is not allowed; give Groups, as discover\(model\) returns"):
        plan(tuple(GROUPS_GQA), scores, 0.2)
    with pytest.raises(PrunekitError, match="of='units'; give one number"):
        plan(GROUPS_GQA, scores, {"kv_head": 0.5})


@pytest.mark.parametrize("keep", [[], [3, 1], [0, 0], [4], [-1]])
def test_a_plan_that_keeps_nonsense_is_refused(keep):
    with pytest.raises(PrunekitError, match="must be an ascending, non-empty list of distinct numbers from 0 to 3"):
        PruningPlan({"a:kv_head": keep}, {"a:kv_head": 4}, 10, 5)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("nonsense", "no JSON from line 1"),
        ("[1, 2]", "it is a list"),
        ('{"keep": {}}', "it has no 'n_units'"),
        ('{"model_type": "llama"}', "it has no 'keep'; give JSON as PruningPlan.save writes"),
    ],
)
def test_text_that_is_no_plan_is_refused(text, why):
    with pytest.raises(PrunekitError, match=f"this is no pruning plan.*{why}"):
        PruningPlan.from_json(text)
    with pytest.raises(PrunekitError, match=r"cannot read .nowhere.json. \(No such file"):
        PruningPlan.load("nowhere.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_parameters": 0, "n_parameters_kept": 0}, "n_parameters=0 .* the first above 0"),
        ({"n_parameters": "9"}, "n_parameters='9' .* must be integers"),
        ({"n_parameters_kept": 77}, "n_parameters_kept=77; .* the second not larger"),
        ({"n_units": {"a:kv_head": 4.5}}, "has n_units 4.5; it must be an integer"),
        ({"n_units": {}}, "has n_units None; it must be an integer"),
        ({"n_units": [4]}, r"n_units of a plan is \[4\]; it must be a dictionary"),
        ({"notes": 5}, "notes of a plan is 5; it must be a dictionary"),
        ({"groups": 5}, "groups of a plan are 5; leave them out"),
        ({"unit": 5}, "this is no pruning plan: it has a field 'unit'"),
    ],
)
def test_odd_values_in_a_plan_are_named(changes, message):
    sound = {"keep": {"a:kv_head": [1]}, "n_units": {"a:kv_head": 4}, "n_parameters": 9, "n_parameters_kept": 3}
    assert PruningPlan.from_json(json.dumps(sound)).pruning_ratio == pytest.approx(2 / 3)
    with pytest.raises(PrunekitError, match=message):
        PruningPlan.from_json(json.dumps({**sound, **changes}))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\x80\x04\xff", "cannot read .* as text"), (b"[" * 99999, "no pruning plan"), (b"9" * 9999, "no pruning plan")],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path, content, message):
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(PrunekitError, match=message):
        PruningPlan.load(tmp_path / "plan.json")


def test_what_is_no_model_and_no_plan_is_refused():
    made = plan(GROUPS_GQA, random_scores(GROUPS_GQA), 0.2)
    with pytest.raises(PrunekitError, match=r"plan={} is not allowed; give a PruningPlan, as plan\(...\)"):
        prune(FAMILIES["llama_gqa"].model(), {})
    with pytest.raises(PrunekitError, match="model=None is not allowed; give a causal language model"):
        prune(None, made)


@settings(max_examples=10, deadline=None)
@given(ratio=st.floats(0.51, 0.6), seed=st.integers(0, 99), ranking=st.sampled_from(["local", "global"]))
def test_query_heads_go_evenly_from_every_kv_group(ratio, seed, ranking):
    scores = random_scores(GROUPS_GQA, seed)
    made = plan(GROUPS_GQA, scores, ratio, kinds=("query_head",), of="units", ranking=ranking)
    for name, kept in made.keep.items():
        left = [sum(unit // 2 == group for unit in kept) for group in range(4)]
        assert len(set(left)) == 1
        assert left[0] == 1  # of each two, the one with the higher score
        assert all(scores[name][unit] >= scores[name][unit ^ 1] for unit in kept)
    assert prune(FAMILIES["llama_gqa"].model(), made)


EIGHT_LAYERS = discover(LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=8,
                                                     num_attention_heads=4, vocab_size=32)))  # fmt: skip


@pytest.mark.parametrize("ranking", ["local", "global"])
def test_query_heads_stand_in_for_a_single_kv_head(ranking):
    """By default they are cut like other heads; asked-for kinds, and scores without them, leave them whole."""
    model = FAMILIES["llama_mqa"].model()
    groups = discover(model)
    assert {(g.kind, g.n_units > 1) for g in default_units(groups)} == {("query_head", True), ("ffn_channel", True)}
    scores = random_scores(groups)
    made = plan(groups, scores, 0.3, ranking=ranking)
    gone = {groups[name].kind for name in made.keep if made.removed(name)}
    assert gone == {"query_head", "ffn_channel"}
    small = prune(model, made)
    assert relative_difference(logits(small), logits(zero_units(model, groups, made))) < 1e-9
    units = plan(groups, scores, 0.5, of="units")
    assert all(len(units.keep[g.name]) == g.n_units // 2 for g in default_units(groups))
    without = {name: values for name, values in scores.items() if ":query_head" not in name}
    for options in ({"kinds": ["kv_head", "ffn_channel"]}, {}):
        held = plan(groups, without if not options else scores, 0.1, **options)
        assert not any(held.removed(name) for name in held.keep if ":ffn_channel" not in name)


def test_several_kv_heads_are_cut_with_their_query_heads():
    assert {g.kind for g in default_units(GROUPS_GQA)} == {"kv_head", "ffn_channel"}


@pytest.mark.parametrize("ranking", ["local", "global"])
def test_whole_layers_compete_with_each_other(ranking):
    scores = random_scores(EIGHT_LAYERS, 3)
    made = plan(EIGHT_LAYERS, scores, 0.25, kinds=("layer",), of="units", ranking=ranking)
    worst = sorted((float(scores[g.name]), g.name) for g in EIGHT_LAYERS.of_kind("layer"))[:2]
    assert {name for name, kept in made.keep.items() if not kept} == {name for _, name in worst}
    assert made.n_parameters_kept == counted(EIGHT_LAYERS, made)


def test_a_budget_between_two_numbers_of_layers_is_refused_with_the_nearest():
    with pytest.raises(PrunekitError, match="nearest feasible ratios are") as refused:
        plan(EIGHT_LAYERS, random_scores(EIGHT_LAYERS), 0.3, kinds=("layer",))
    advice = float(re.search(r"ask for (0\.\d+)", str(refused.value)).group(1))
    assert abs(plan(EIGHT_LAYERS, random_scores(EIGHT_LAYERS), advice, kinds=("layer",)).pruning_ratio - advice) < 5e-3


def test_the_last_layer_is_never_taken():
    made = plan(EIGHT_LAYERS, random_scores(EIGHT_LAYERS), 0.99, kinds=("layer",), of="units")
    assert sum(len(kept) for kept in made.keep.values()) == 1


def test_only_whole_layers_and_blocks_may_be_left_empty():
    with pytest.raises(PrunekitError, match="keeps .* it must be an ascending, non-empty list"):
        PruningPlan({"model.layers.0.mlp:ffn_channel": []}, {"model.layers.0.mlp:ffn_channel": 96}, 10, 5)
    groups = discover(FAMILIES["llama_mqa"].model())
    name = "model.layers.0.self_attn:kv_head"
    with pytest.raises(PrunekitError, match="leaves nothing of .*kv_head"):
        prune(FAMILIES["llama_mqa"].model(), PruningPlan({name: []}, {name: 1}, 10, 5))
    assert groups[name].n_units == 1


def test_prune_does_not_trace_again_what_discover_has(monkeypatch):
    model = FAMILIES["llama_gqa"].model()
    groups = discover(model)
    made = plan(groups, random_scores(groups), 0.2)
    traced = []
    monkeypatch.setattr(surgery, "trace", lambda m: traced.append(m) or trace(m))
    small = prune(model, made)
    assert not traced and prune(model, PruningPlan.from_json(made.to_json())) is not small and traced == [model]


class Crossed(LlamaMLP):
    """Pairs the first gate with the last channel, and so on."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).flip(-1) * self.up_proj(x))


def test_a_model_that_changed_since_is_traced_anew():
    """Nothing changed that can be seen but what runs: the old trace's cut fails the proof, the new one's passes."""
    model = FAMILIES["llama_mha"].model()
    groups = discover(model)
    made = plan(groups, random_scores(groups), 0.2)
    for layer in model.model.layers:
        layer.mlp.__class__ = Crossed
    small = prune(model, made)
    zeroed = zero_units(copy.deepcopy(model), discover(model), made)
    assert relative_difference(logits(small), logits(zeroed)) < 1e-12


def test_groups_are_copied_without_their_trace():
    groups = discover(FAMILIES["llama_gqa"].model())
    again = copy.deepcopy(groups)
    assert groups.traced is not None and again.traced is None and [g.name for g in again] == [g.name for g in groups]


def test_groups_can_be_left_out_by_name():
    names = ["model.layers.0.mlp:ffn_channel", "model.layers.1.self_attn:kv_head"]
    fewer = GROUPS_GQA.without(names)
    assert [g.name for g in fewer] == [g.name for g in GROUPS_GQA if g.name not in names]
    assert fewer.n_parameters == GROUPS_GQA.n_parameters
    made = plan(fewer, random_scores(GROUPS_GQA), 0.1)
    assert not set(names) & set(made.keep)
    assert abs(made.pruning_ratio - 0.1) <= TOLERANCE
    with pytest.raises(PrunekitError, match="no group is called 'none'"):
        GROUPS_GQA.without(["none"])


def test_groups_of_one_kind_may_share_rows_whatever_number_stands_behind_their_names():
    group = GROUPS_GQA.of_kind("ffn_channel")[0]
    twin = replace(group, name=f"{group.name}#2")
    groups = replace(GROUPS_GQA, items=(group, twin))
    assert groups.layers == [group.layer]
    assert candidates_of(groups, random_scores(groups), groups, ()) == [group, twin]
    other = replace(group, name="other", kind="kv_head")
    with pytest.raises(PrunekitError, match="cut the same rows"):
        candidates_of(groups, random_scores([group, other]), [group, other], ())


def test_saving_says_where(tmp_path):
    made = plan(GROUPS_GQA, random_scores(GROUPS_GQA), 0.2)
    assert made.save(tmp_path / "plan.json") == tmp_path / "plan.json"
    assert PruningPlan.load(made.save(str(tmp_path / "plan.json"))).keep == made.keep


def test_a_plan_says_by_which_importance():
    model = FAMILIES["llama_gqa"].model()
    made = plan(GROUPS_GQA, score(model, GROUPS_GQA, Magnitude()), 0.2)
    assert made.notes["importance"] == "L2"


@pytest.mark.parametrize("ranking", ["local", "global"])
@pytest.mark.parametrize(
    "options", [{"kinds": ["query_head"]}, {"kinds": ["ffn_channel"], "round_to": 80}], ids=["heads", "rounded"]
)
def test_a_share_of_units_by_which_nothing_goes_is_refused(options, ranking):
    with pytest.raises(PrunekitError, match=rf"nothing would go \({options['kinds'][0]}: 0.05 of \d+ units a group"):
        plan(GROUPS_GQA, random_scores(GROUPS_GQA), 0.05, of="units", ranking=ranking, **options)


@pytest.mark.parametrize(
    "options",
    [{"of": "units", "protect_layers": [0, 1]}, {"protect_layers": [0, 1]}, {"kinds": ["kv_head"]}],
    ids=["all layers, units", "all layers", "too little"],
)
def test_a_plan_by_which_nothing_goes_is_refused(options):
    ratio = 0.25 if "protect_layers" in options else 0.004
    with pytest.raises(BudgetError, match="nothing would go|cannot be met"):
        plan(GROUPS_GQA, random_scores(GROUPS_GQA), ratio, **options)
    assert plan(GROUPS_GQA, random_scores(GROUPS_GQA), 0.0, **options).pruning_ratio == 0


def test_a_kind_of_which_nothing_goes_is_noted():
    made = plan(GROUPS_GQA, random_scores(GROUPS_GQA), 0.1, of="units")
    assert "kv_head: 0.1 of 4 units a group" in made.notes["whole"] and "kv_head: 0.1" in repr(made)
    made = plan(GROUPS_GQA, random_scores(GROUPS_GQA), 0.25, of="units")
    assert "whole" not in made.notes


def test_what_is_asked_for_by_name_is_cut_or_refused():
    scores, ratio = random_scores(GROUPS_GQA), {"hidden": 0.25, "ffn_channel": 0.25}
    made = plan(GROUPS_GQA, scores, ratio, of="units")
    assert {name.rpartition(":")[2] for name in made.keep if made.removed(name)} == set(ratio)
    for ratio, kinds in (({"expert": 0.5, "ffn_channel": 0.2}, None), (0.25, ["expert"])):
        with pytest.raises(PrunekitError, match="this model has no groups of the kind 'expert'; it has kv_head, "):
            plan(GROUPS_GQA, scores, ratio, of="units", kinds=kinds)


def test_a_plan_names_what_it_cuts_and_takes_out():
    keep = {"h.0.mlp:ffn_channel#2": [0], "h.1:layer": [], "h.2.mlp:block": [], "wte:vocabulary": [0, 1]}
    made = PruningPlan(
        keep, {"h.0.mlp:ffn_channel#2": 3, "h.1:layer": 1, "h.2.mlp:block": 1, "wte:vocabulary": 2}, 9, 5
    )
    assert made.cut_groups("ffn_channel") == ["h.0.mlp:ffn_channel#2"] and not made.takes_tokens
    assert made.cut_kinds == {"ffn_channel", "block", "layer"}
    assert made.removed_parts == ["h.1", "h.2.mlp"] and made.removed_layers == ["h.1"]
