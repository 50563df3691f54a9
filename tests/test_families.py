"""Every family: what discovery finds is what the configuration implies, and what is cut is as if it were zero."""

import pytest
import torch
from families import (
    FAMILIES,
    HEADS,
    continued,
    found,
    logits,
    plan_keeping,
    random_units,
    relative_difference,
    zero_units,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from other_families import EVERYONE
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from wirings import WIRINGS

from prunekit import discover, prune
from prunekit.knowledge import ablate

PROVED = {**FAMILIES, **WIRINGS}
MIXTURES = [name for name, family in EVERYONE.items() if "expert~" in family.layers[-1]]
# what may change places; dimensions of a head that positions turn may not
UNORDERED = ("kv_head", "query_head", "ffn_channel", "rank", "hidden", "expert")

proved = pytest.mark.parametrize("name", PROVED)
drawn = settings(max_examples=2, deadline=None, phases=[Phase.generate])


def exact_units(family):
    """Whether heads or channels are implied that are exact."""
    return any(sizes for units in family.layers for kind, sizes in units.items() if kind in (*HEADS, "ffn_channel"))


def each_attention(families):
    """Every family with each of the attention implementations that it has."""
    pairs = [(name, attention) for name, family in families.items() for attention in family.attentions]
    return pytest.mark.parametrize(("name", "attention"), pairs)


@each_attention({name: family for name, family in EVERYONE.items() if name != "made_up"})
def test_every_layer_has_the_units_that_its_configuration_implies(name, attention):
    """Numbers, and which of them are exact."""
    assert found(EVERYONE[name].groups(attention)) == EVERYONE[name].implied()


@pytest.mark.xfail(strict=True, reason="what else is handed to a layer is probed as if it were the residual stream")
def test_values_of_the_first_layer_are_exact_in_all_others():
    assert found(WIRINGS["made_up"].groups()) == WIRINGS["made_up"].implied()


def test_heads_whose_values_reach_all_layers_are_cut_in_all():
    """Whatever is said of their exactness, cut = zero."""
    family = WIRINGS["made_up"]
    model, groups = family.model(), family.groups()
    heads = groups.of_kind("kv_head")
    assert [g.layer for g in heads] == [None]
    plan = plan_keeping(groups, {heads[0].name: [0, 3]})
    assert relative_difference(logits(prune(model, plan)), logits(zero_units(model, groups, plan))) < 1e-12


@pytest.mark.parametrize("name", [name for name, family in EVERYONE.items() if family.locked])
def test_what_is_not_understood_is_named_with_its_module(name):
    locked = EVERYONE[name].groups().locked
    for parameter, reason in EVERYONE[name].locked.items():
        assert [why for where, why in locked.items() if parameter in where and reason in why], (parameter, locked)


def test_only_what_may_be_locked_is():
    """Every family that must be found whole implies heads and channels, in every layer or across all."""
    for family in PROVED.values():
        for units in family.layers:
            kinds = {kind.rstrip("~") for kind, sizes in units.items() if sizes and max(sizes) > 1}
            assert "ffn_channel" in kinds and kinds & set(HEADS) and not family.locked, family.name


def _permute(model, members, order):
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for member in members:
            p = parameters[member.parameter]
            moved = p.index_select(member.dim, member.index[order].flatten())
            p.index_copy_(member.dim, member.index.flatten(), moved)


def _within_kv_groups(group, family, generator):
    """An order of units; of query heads one that keeps each with its KV head."""
    size = family.repeats() if group.kind == "query_head" else group.n_units
    starts = range(0, group.n_units, size)
    return torch.cat([start + torch.randperm(size, generator=generator) for start in starts])


@pytest.mark.parametrize("name", [*PROVED, "bitnet", "deepseek_v3"])
@drawn
@given(seed=st.integers(0, 2**16))
def test_permuting_units_leaves_the_logits_unchanged(name, seed):
    family = EVERYONE[name]
    model, generator = family.model(), torch.Generator().manual_seed(seed)
    for group in family.groups().of_kind(*UNORDERED):
        if family.ordered and group.kind in HEADS:
            continue
        before = logits(model)
        _permute(model, group.members, _within_kv_groups(group, family, generator))
        assert relative_difference(logits(model), before) < family.tolerance, group


@pytest.mark.parametrize("name", [name for name, family in PROVED.items() if family.ordered])
def test_heads_with_slopes_or_norms_of_their_own_are_not_interchangeable(name):
    model = PROVED[name].model()
    for group in PROVED[name].groups().of_kind(*HEADS):
        before, size = logits(model), PROVED[name].repeats() if group.kind == "query_head" else group.n_units
        order = torch.arange(group.n_units).view(-1, size).roll(1, 1).flatten()
        _permute(model, group.members, order)
        assert relative_difference(logits(model), before) > 1e-6, group


@proved
def test_leaving_one_site_unpermuted_changes_the_logits(name):
    family = PROVED[name]
    model = family.model()
    for group in family.groups().of_kind(*UNORDERED):
        if group.n_units > 1:
            before, order = logits(model), torch.arange(group.n_units).roll(1)
            _permute(model, group.members[-1:], order)
            assert relative_difference(logits(model), before) > 1e-6, group
            _permute(model, group.members[-1:], order.roll(-2))  # and back


@pytest.mark.slow
@each_attention(PROVED)
@drawn
@given(seed=st.integers(0, 2**16))
def test_cut_equals_zero_for_random_units(name, attention, seed):
    family = PROVED[name]
    model, groups = family.model(attention), family.groups(attention)
    plan = plan_keeping(groups, random_units(family, groups, seed))
    before = {n: p.clone() for n, p in model.named_parameters()}
    small = logits(prune(model, plan))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert relative_difference(small, logits(zero_units(model, groups, plan))) < family.tolerance


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "mixtral"])
def test_ablating_what_a_plan_removes_sets_it_to_zero(name):
    model, groups = EVERYONE[name].model(), EVERYONE[name].groups()
    plan = plan_keeping(groups, random_units(EVERYONE[name], groups, seed=1, share=0.25))
    before = logits(model)
    with ablate(model, groups, plan.gone):
        inside = logits(model)
    assert torch.equal(logits(model), before) and not torch.equal(inside, before)
    assert torch.equal(inside, logits(zero_units(model, groups, plan)))


def _quarter(family, dtype=None):
    """A model cut in place by a quarter of its heads and channels, its zeroed twin, and the logits before."""
    model, groups = family.model(dtype=dtype), family.groups()
    plan, uncut = plan_keeping(groups, random_units(family, groups, seed=1, share=0.25)), logits(model)
    small = prune(model, plan, inplace=True)
    assert small is model
    return small, zero_units(family.model(dtype=dtype), groups, plan), uncut


@pytest.mark.parametrize("name", [name for name, family in EVERYONE.items() if exact_units(family)])
def test_a_quarter_cut_in_place_equals_zero(name):
    family = EVERYONE[name]
    small, zeroed, uncut = _quarter(family)
    n_parameters = [sum(p.numel() for p in model.parameters()) for model in (small, zeroed)]
    assert n_parameters[0] < 0.98 * n_parameters[1]
    assert relative_difference(logits(zeroed), uncut) > 1e-4  # the units did something
    assert relative_difference(logits(small), logits(zeroed)) < family.tolerance


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_padded_prompts_go_on_alike_with_and_without_a_cache(name):
    """Slopes and positions belong to each sequence. In float32: masks of float64 overflow in some families."""
    small, zeroed, _ = _quarter(FAMILIES[name], torch.float32)
    cached, expected = continued(small, use_cache=True), continued(zeroed, use_cache=True)
    assert expected.isfinite().all()
    assert relative_difference(cached, expected) < 1e-5
    assert relative_difference(continued(small, use_cache=False), expected) < 1e-5


@pytest.mark.parametrize("name", ["llama_gqa", "opt_projected", "bloom", "mixtral", "llama_peft", "chatglm2"])
def test_ranks_and_hidden_channels_are_cut_where_told(name):
    family = PROVED[name]
    for kind in {g.kind for g in family.groups()} & {"rank", "hidden"}:
        model, groups = family.model(), family.groups()
        keep = {g.name: list(range(0, g.n_units, 2)) for g in groups.of_kind(kind)}
        plan = plan_keeping(groups, keep)
        small = prune(model, plan)
        for group in discover(small).of_kind(kind):
            assert group.n_units == len(keep[group.name])
        exact = all(g.exact for g in groups.of_kind(kind))
        if exact:
            assert relative_difference(logits(small), logits(zero_units(model, groups, plan))) < 1e-12
        else:
            assert logits(small).isfinite().all()


class NormOf(torch.nn.Module):
    """A norm's statistics, taken over the channels that are not zero."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        alive = self.norm.weight != 0
        mean = x.float()[..., alive].pow(2).mean(-1, keepdim=True)
        return (x.float() * (mean + self.norm.variance_epsilon).rsqrt()).to(x.dtype) * self.norm.weight


@pytest.mark.parametrize("kind", HEADS)
def test_heads_under_one_norm_are_cut_as_if_its_statistics_left_them_out(kind):
    """OLMo 2 norms all heads together, so its heads are inexact, and this is by what."""
    family = FAMILIES["olmo2"]
    model, groups = family.model(), family.groups()
    plan = plan_keeping(groups, {g.name: list(range(0, g.n_units, 2)) for g in groups.of_kind(kind)})
    small, zeroed = prune(model, plan), zero_units(model, groups, plan)
    assert relative_difference(logits(small), logits(zeroed)) > 1e-3
    for layer in zeroed.model.layers:
        layer.self_attn.q_norm, layer.self_attn.k_norm = (
            NormOf(norm) for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm)
        )
    assert relative_difference(logits(small), logits(zeroed)) < family.tolerance


class Unchosen(TorchFunctionMode):
    """While open, the router scores of some experts are −∞."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts  # pairs of a router's weight and experts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for weight, gone in self.experts if func is functional.linear else ():
            if args[1].shape == weight.shape and torch.equal(args[1], weight):  # it may have been converted
                result[..., gone] = -torch.inf
        return result


@pytest.mark.parametrize("name", MIXTURES)
@drawn
@given(seed=st.integers(0, 2**16))
def test_an_expert_that_was_cut_is_one_that_is_never_chosen(name, seed):
    family = EVERYONE[name]
    model, groups = family.model(), family.groups()
    generator = torch.Generator().manual_seed(seed)
    keep = {g.name: torch.randperm(4, generator=generator)[: 2 + i].sort().values.tolist()
            for i, g in enumerate(groups.of_kind("expert"))}  # fmt: skip
    plan = plan_keeping(groups, keep)
    small = prune(model, plan)
    parameters = dict(model.named_parameters())
    routers = {
        g.name: next(m for m in g.members if parameters[m.parameter].shape == (4, 64)) for g in groups.of_kind("expert")
    }
    gone = [(parameters[routers[name].parameter], plan.removed(name)) for name in keep]
    uncut = logits(model)
    with Unchosen(gone):
        expected = logits(model)
    assert relative_difference(expected, uncut) > 1e-4
    assert relative_difference(logits(small), expected) < family.tolerance


@pytest.mark.parametrize("name", MIXTURES)
def test_channels_inside_the_experts_are_cut_with_experts(name):
    """A plan may take both; channels are the same ones in every expert."""
    family = EVERYONE[name]
    model, groups = family.model(), family.groups()
    channels = {g.name: list(range(1, g.n_units, 3)) for g in groups.of_kind("ffn_channel")}
    experts = {g.name: [0, 2, 3] for g in groups.of_kind("expert")}
    both = prune(model, plan_keeping(groups, {**experts, **channels}))
    experts_first = prune(prune(model, plan_keeping(groups, experts)), plan_keeping(groups, channels))
    assert relative_difference(logits(both), logits(experts_first)) < 1e-12
