"""Scores: formulas, reductions, alignment under grouped-query attention, values, and what is refused."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from prunekit.calibration import check_finite
from prunekit.discovery.groups import CoupledGroup, Groups, Member
from prunekit.errors import PrunekitError
from prunekit.gradients import gather_gradients
from prunekit.importance import (
    IMPORTANCES,
    Importance,
    Magnitude,
    Random,
    Scores,
    Taylor,
    importance_from_name,
    score,
)
from prunekit.importance.scores import REDUCTIONS, all_slice_scores, slice_scores, unit_scores

CALIB = torch.randint(3, 50, (4, 12), generator=torch.Generator().manual_seed(1))
D_HEAD = 4


def tiny_llama(n_heads=4, n_kv=2, *, seed=0, dtype=torch.float32):
    """Two layers of 16 channels; weights large enough for the loss to care."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=n_heads,
        num_key_value_heads=n_kv,
        head_dim=D_HEAD,
        intermediate_size=12,
        vocab_size=50,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def _member(parameter, dim, n_units, width):
    return Member(parameter, dim, torch.arange(n_units * width).reshape(n_units, width))


def llama_groups(model):
    """KV-head and FFN-channel groups of a LLaMA, written down by hand."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    d = model.config.head_dim
    items = []
    for i in range(model.config.num_hidden_layers):
        attn, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        n = shapes[f"{attn}.k_proj.weight"][0] // d
        width = shapes[f"{attn}.q_proj.weight"][0] // n
        heads = [("q_proj", 0, width), ("k_proj", 0, d), ("v_proj", 0, d), ("o_proj", 1, width)]
        members = tuple(_member(f"{attn}.{p}.weight", dim, n, w) for p, dim, w in heads)
        items.append(CoupledGroup(f"{attn}:kv_head", "kv_head", n, members, True))
        f = shapes[f"{mlp}.gate_proj.weight"][0]
        channels = [("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)]
        members = tuple(_member(f"{mlp}.{p}.weight", dim, f, 1) for p, dim in channels)
        items.append(CoupledGroup(f"{mlp}:ffn_channel", "ffn_channel", f, members, True))
    return Groups(tuple(items), shapes)


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def groups(model):
    return llama_groups(model)


def kv_head_by_loops(model, weight_scores, layer, query_heads_of):
    """Sum over a KV head's own rows and columns, one weight at a time, whoever owns which query head."""
    attn = f"model.layers.{layer}.self_attn"
    found = []
    for h, heads in enumerate(query_heads_of):
        total = 0.0
        for c in range(D_HEAD):
            for name in ("k_proj", "v_proj"):
                total += weight_scores(f"{attn}.{name}.weight")[h * D_HEAD + c].abs().sum().item()
            for q in heads:
                total += weight_scores(f"{attn}.q_proj.weight")[q * D_HEAD + c].abs().sum().item()
                total += weight_scores(f"{attn}.o_proj.weight")[:, q * D_HEAD + c].abs().sum().item()
        found.append(total)
    return torch.tensor(found)


def test_kv_heads_are_scored_with_their_own_query_heads(model, groups):
    weights = dict(model.named_parameters())
    g = gather_gradients(model, CALIB, weights).g
    scores = score(model, groups, Taylor(), CALIB)
    expected = kv_head_by_loops(model, lambda n: weights[n].detach() * g[n], 0, [(0, 1), (2, 3)])
    torch.testing.assert_close(scores["model.layers.0.self_attn:kv_head"], expected, rtol=1e-5, atol=0)


def test_the_references_misalignment_would_rank_other_heads():
    model = tiny_llama()
    attn = model.model.layers[0].self_attn
    with torch.no_grad():  # query heads 0, 1 (of KV head 0) weigh .1 and 10, heads 2, 3 (of KV head 1) 4 and 4
        for p in (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj):
            p.weight.fill_(1e-3)
        for head, size in enumerate((0.1, 10.0, 4.0, 4.0)):
            attn.q_proj.weight[head * D_HEAD : (head + 1) * D_HEAD] = size
    ours = score(model, llama_groups(model), Magnitude(1))["model.layers.0.self_attn:kv_head"]
    own = kv_head_by_loops(model, dict(model.named_parameters()).__getitem__, 0, [(0, 1), (2, 3)])
    misaligned = kv_head_by_loops(model, dict(model.named_parameters()).__getitem__, 0, [(0, 2), (1, 3)])
    assert ours.argsort().tolist() == own.argsort().tolist() == [1, 0]
    assert misaligned.argsort().tolist() == [0, 1]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_work_channel_by_channel(reduction):
    group = CoupledGroup("g:kv_head", "kv_head", 2, (_member("q.w", 0, 2, 4), _member("o.w", 1, 2, 2)), True)
    slices = {("q.w", 0): torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]), ("o.w", 1): torch.tensor([2.0, 3, 4, 0.5])}
    # unit 0, channel 0: q rows 0 and 2, o column 0 = 1, 3, 2; channel 1: 2, 4, 3
    expected = {
        "sum": [15.0, 30.5],
        "mean": [5.0, 30.5 / 3],
        "max": [7.0, 15.0],
        "prod": [1 * 3 * 2 + 2 * 4 * 3, 5 * 7 * 4 + 6 * 8 * 0.5],
        "first": [10.0, 26.0],
        "second": [5.0, 4.5],
    }
    torch.testing.assert_close(unit_scores(group, slices, reduction), torch.tensor(expected[reduction]).float())


@pytest.mark.parametrize("reduction", ["sum", "mean", "max", "prod"])
def test_a_fused_projection_scores_as_three_separate_ones(reduction):
    n, d = 3, 4
    q, k, v, o = torch.rand(4, n * d, generator=torch.Generator().manual_seed(0))
    apart = tuple(_member(f"{name}.w", 0, n, d) for name in "qkvo")
    index = torch.arange(3 * n * d).reshape(3, n, d).transpose(0, 1).reshape(n, 3 * d)  # GPT-2: all q, all k, all v
    fused = (Member("qkv.w", 0, index), apart[3])
    slices = {("q.w", 0): q, ("k.w", 0): k, ("v.w", 0): v, ("o.w", 0): o, ("qkv.w", 0): torch.cat([q, k, v])}
    first, second = (
        unit_scores(CoupledGroup("g:kv_head", "kv_head", n, m, True), slices, reduction) for m in (apart, fused)
    )
    torch.testing.assert_close(first, second)


def test_members_that_do_not_align_count_as_one_channel():
    members = (_member("a.w", 0, 2, 2), _member("b.w", 0, 2, 3))
    group = CoupledGroup("g:block", "block", 2, members, True)
    slices = {("a.w", 0): torch.tensor([1.0, 2, 3, 4]), ("b.w", 0): torch.tensor([1.0, 1, 9, 2, 2, 2])}
    assert unit_scores(group, slices, "sum").tolist() == [14, 13]
    assert unit_scores(group, slices, "max").tolist() == [9, 4]


def test_the_second_of_a_group_is_never_a_bias():
    members = (_member("fc.weight", 0, 2, 1), _member("fc.bias", 0, 2, 1), _member("proj.weight", 1, 2, 1))
    group = CoupledGroup("g:ffn_channel", "ffn_channel", 2, members, True)
    slices = {("fc.weight", 0): torch.ones(2), ("fc.bias", 0): torch.zeros(2), ("proj.weight", 1): torch.full((2,), 7)}
    assert unit_scores(group, slices, "second").tolist() == [7, 7]
    alone = CoupledGroup("g:vocabulary", "vocabulary", 2, members[:1], True)
    assert unit_scores(alone, slices, "second").tolist() == [1, 1]


def test_granularity_says_when_the_absolute_value_is_taken():
    weights = torch.tensor([[1.0, -1.0], [2.0, 3.0]])
    assert slice_scores(weights, 0, "vector").tolist() == [0, 5]
    assert slice_scores(weights, 0, "element").tolist() == [2, 5]
    assert slice_scores(weights, 1, "vector").tolist() == [3, 2]
    assert slice_scores(torch.tensor([-2.0, 1.0]), 0, "vector").tolist() == [2, 1]  # a bias
    assert slice_scores(torch.ones(2, 3, 5), 1, "element").tolist() == [10, 10, 10]  # fused experts


@pytest.mark.parametrize(
    ("order", "formula"),
    [
        ("first", lambda w, g, h: w * g),
        ("second", lambda w, g, h: w**2 * h),
        ("mixed", lambda w, g, h: w * g - w**2 * h / 2),
    ],
)
@pytest.mark.parametrize("granularity", ["vector", "element"])
def test_taylor_follows_its_formula(model, groups, order, formula, granularity):
    per_sample = []
    names = [f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up", "down")]
    weights = dict(model.named_parameters())
    for sample in CALIB.split(1):
        loss = model(input_ids=sample, labels=sample).loss
        per_sample.append(torch.autograd.grad(loss, [weights[n] for n in names]))
    expected = torch.zeros(12)
    for name, grads in zip(names, zip(*per_sample, strict=True), strict=True):
        g, h = torch.stack(grads).mean(0), torch.stack(grads).square().mean(0)
        s = formula(weights[name].detach(), g, h)
        dim = 0 if "down" in name else 1
        expected += s.sum(dim).abs() if granularity == "vector" else s.abs().sum(dim)
    actual = score(model, groups, Taylor(granularity, order), CALIB)["model.layers.1.mlp:ffn_channel"]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)


def test_magnitude_sums_powers_without_a_root(model, groups):
    mlp = model.model.layers[0].mlp
    for p in (1, 2):
        sums = [m.weight.abs().pow(p).sum(d) for m, d in ((mlp.gate_proj, 1), (mlp.up_proj, 1), (mlp.down_proj, 0))]
        scores = score(model, groups, Magnitude(p))["model.layers.0.mlp:ffn_channel"]
        torch.testing.assert_close(scores, torch.stack(sums).mean(0).detach())


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(12)), st.sampled_from([Taylor(), Taylor("vector", "mixed"), Magnitude(1, "prod")]))
def test_permuting_units_permutes_their_scores(order, importance):
    model = tiny_llama(dtype=torch.float64)
    name = "model.layers.0.mlp:ffn_channel"
    before = score(model, llama_groups(model), importance, CALIB)[name]
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
            weight.copy_(weight[list(order)].clone())
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, list(order)].clone())
    after = score(model, llama_groups(model), importance, CALIB)[name]
    torch.testing.assert_close(after, before[list(order)], rtol=1e-9, atol=1e-15)


def test_random_depends_on_seed_and_name_alone(model, groups):
    scores = score(model, groups, Random(3))
    backwards = score(model, tuple(reversed(groups)), Random(3))
    other = score(model, groups, Random(4))
    for name, values in scores.items():
        assert values.equal(backwards[name]) and not values.equal(other[name])
    first, second = (scores[f"model.layers.{i}.mlp:ffn_channel"] for i in (0, 1))
    assert not first.equal(second)


def test_scores_are_detached_cpu_floats_and_the_model_is_left_alone(model, groups):
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    scores = score(model, groups, Taylor(), CALIB)
    assert {n: len(s) for n, s in scores.items()} == {g.name: g.n_units for g in groups}
    assert all(s.dtype == torch.float32 and not s.requires_grad and s.device.type == "cpu" for s in scores.values())
    assert all(p.equal(before[n]) and p.requires_grad and p.grad is None for n, p in model.named_parameters())


def test_half_precision_scores_near_those_of_float32():
    full = tiny_llama()
    expected = score(full, llama_groups(full), Taylor(), CALIB)
    half = tiny_llama(dtype=torch.bfloat16)
    actual = score(half, llama_groups(half), Taylor(), CALIB)
    for name, values in actual.items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, expected[name], rtol=0.1, atol=0.02)


def test_each_parameter_is_scored_once_however_many_groups_touch_it(groups):
    seen = []

    def weight_scores(name):
        seen.append(name)
        return torch.ones(groups.shapes[name])

    hidden = CoupledGroup("model:hidden", "hidden", 16, tuple(_member(n, 1, 16, 1) for n in (
        "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight")), False)  # fmt: skip
    all_slice_scores([*groups, hidden], weight_scores, "element")
    assert len(seen) == len(set(seen))


def test_gradients_gathered_once_serve_several_importances(model, groups):
    gathered = gather_gradients(model, CALIB, groups.shapes, second=True)
    for importance in (Taylor(), Taylor("vector", "second")):
        ours, direct = (score(model, groups, importance, c) for c in (gathered, CALIB))
        for name in direct:
            torch.testing.assert_close(ours[name], direct[name], rtol=1e-4, atol=1e-8)
    first_only = gather_gradients(model, CALIB, groups.shapes)
    with pytest.raises(PrunekitError, match="lack second-order"):
        score(model, groups, Taylor(order="mixed"), first_only)
    few = gather_gradients(model, CALIB, ["lm_head.weight"])
    with pytest.raises(PrunekitError, match="lack those of model.layers.0"):
        score(model, groups, Taylor(), few)


def test_names_of_the_command_line(model, groups):
    for name in IMPORTANCES:
        assert isinstance(importance_from_name(name), Importance)
    assert importance_from_name("taylor") == Taylor()
    assert importance_from_name("l1", reduction="max") == Magnitude(1, "max")
    assert importance_from_name("random", seed=5) == Random(5)
    labels = {importance_from_name(name).label for name in IMPORTANCES}
    assert len(labels) == len(IMPORTANCES)
    with pytest.raises(PrunekitError, match="'l3' is unknown; allowed: curvature, taylor, .*random"):
        importance_from_name("l3")
    with pytest.raises(PrunekitError, match=r"did you mean 'curvature'\?"):
        importance_from_name("curvatur")
    with pytest.raises(PrunekitError, match="'random' does not take order"):
        importance_from_name("random", order="first")


def test_table_repr_and_file_hold_the_same_numbers(model, groups, tmp_path):
    scores = score(model, groups, Magnitude(1))
    table = scores.table()
    assert list(table.columns) == ["group", "kind", "layer", "unit", "score"]
    assert len(table) == 2 * (2 + 12) and set(table.kind) == {"kv_head", "ffn_channel"} and set(table.layer) == {0, 1}
    assert repr(scores) == "Scores(L1; 4 groups, 28 units)"
    assert "kv_head" in scores._repr_html_()
    path = scores.save(tmp_path / "scores.safetensors")
    loaded = Scores.load(path)
    assert list(loaded) == list(scores) and loaded.label == "L1" and loaded.kinds == scores.kinds
    assert all(loaded[name].equal(values) for name, values in scores.items())
    assert [p.name for p in tmp_path.iterdir()] == ["scores.safetensors"]


def test_scores_that_cannot_be_read_or_written_say_so(model, groups, tmp_path):
    missing = tmp_path / "none.safetensors"
    with pytest.raises(PrunekitError) as told:
        Scores.load(missing)
    assert str(told.value) == (
        f"cannot read {str(missing)!r} (No such file or directory); give a file that Scores.save wrote"
    )
    (tmp_path / "text").write_text("hello")
    with pytest.raises(PrunekitError, match="no scores in"):
        Scores.load(tmp_path / "text")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(PrunekitError, match="Scores.save did not write it"):
        Scores.load(tmp_path / "other.safetensors")
    with pytest.raises(PrunekitError, match="create the folder"):
        score(model, groups, Random()).save(tmp_path / "no" / "where")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Taylor(granularity="row"), r"granularity='row' is unknown; allowed: 'vector', 'element'"),
        (lambda: Taylor(order="third"), r"order='third' is unknown; allowed: 'first', 'second', 'mixed'"),
        (lambda: Taylor(reduction="median"), r"reduction='median' is unknown; allowed: 'sum'"),
        (lambda: Magnitude(3), r"p=3 is unknown; allowed: 1, 2"),
        (lambda: Magnitude(reduction="median"), r"reduction='median' is unknown"),
        (lambda: Random("x"), r"seed='x' is not allowed; give an integer"),
    ],
)
def test_unknown_options_are_refused_at_construction(build, message):
    with pytest.raises(PrunekitError, match=message):
        build()


def test_importances_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Taylor().order = "second"


def test_score_refuses_what_it_cannot_score(model, groups):
    with pytest.raises(PrunekitError, match="needs a calibration set"):
        score(model, groups, Taylor())
    with pytest.raises(PrunekitError, match="importance='taylor' is not allowed; give an importance .*such as Taylor"):
        score(model, groups, "taylor")
    with pytest.raises(PrunekitError, match="no groups to score"):
        score(model, (), Magnitude())
    with pytest.raises(PrunekitError, match="integer tensor"):
        score(model, groups, Taylor(), CALIB.float())


def test_groups_of_another_model_are_refused(model, groups):
    wider = tiny_llama(n_heads=8, n_kv=4)
    with pytest.raises(PrunekitError, match=r"not of this model.*discover\(model\)"):
        score(wider, groups, Magnitude())
    with pytest.raises(PrunekitError, match="not of this model"):
        score(model, tuple(llama_groups(wider)), Magnitude())
    stranger = CoupledGroup("x:ffn_channel", "ffn_channel", 2, (_member("nowhere.weight", 0, 2, 1),), True)
    with pytest.raises(PrunekitError, match="nowhere.weight is missing"):
        score(model, [stranger], Magnitude())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("importance", [Magnitude(), Taylor(), Random()])
def test_bad_weights_are_named(bad, importance):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = bad
    with pytest.raises(PrunekitError, match="model.layers.1.mlp.up_proj.weight has NaN or infinite"):
        score(model, llama_groups(model), importance, CALIB)


def test_weights_whose_sum_overflows_are_still_finite():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(torch.finfo(torch.float32).max / 2)
    check_finite(model)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda found: [*found.values()], "must return a dictionary, group name → scores; it differs in list"),
        (lambda found: {"other": next(iter(found.values()))}, "must return a dictionary.* it differs in"),
        (lambda found: {name: value.tolist() for name, value in found.items()}, "finite scores; it gave list"),
        (
            lambda found: {name: value[1:] for name, value in found.items()},
            r"a tensor \(\d+,\) of finite.* gave \(\d+,\)",
        ),
        (lambda found: {name: value / 0 for name, value in found.items()}, "of finite scores"),
    ],
)
def test_what_an_importance_of_ones_own_returns_is_checked(model, groups, change, says):
    class Own(Magnitude):
        def unit_scores(self, *given):
            return change(super().unit_scores(*given))

    with pytest.raises(PrunekitError, match=says):
        score(model, groups.of_kind("ffn_channel"), Own())
