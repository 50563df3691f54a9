"""Cut = zero on every family, and everything that must hold of a cut model."""

import random
from functools import cache

import numpy as np
import pytest
import torch
from families import FAMILIES, logits, plan_keeping, relative_difference, tokens, zero_units
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from prunekit import PrunekitError, PruningPlan, discover, prune
from prunekit.pruning import surgery

EVERY = pytest.mark.parametrize("name", FAMILIES)
DEFAULT = ("kv_head", "ffn_channel")


@cache
def groups_of(name, attention="sdpa"):
    return discover(FAMILIES[name].model(attention))


def random_plan(groups, kinds, rng, share=None):
    """Keep a random number of random units of every group of these kinds."""
    keep = {}
    for group in groups.of_kind(*kinds):
        n = round(group.n_units * (1 - share)) if share else rng.randint(1, group.n_units)
        keep[group.name] = sorted(rng.sample(range(group.n_units), max(1, n)))
    return plan_keeping(groups, keep)


@EVERY
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@settings(max_examples=2, deadline=None, phases=[Phase.generate])
@given(seed=st.integers(0, 2**16))
def test_cut_equals_zero_for_random_units(name, attention, seed):
    model, groups = FAMILIES[name].model(attention), groups_of(name, attention)
    plan = random_plan(groups, DEFAULT, random.Random(seed))
    before = {n: p.clone() for n, p in model.named_parameters()}
    small = prune(model, plan)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    found = logits(small)
    assert relative_difference(found, logits(zero_units(model, groups, plan))) < 1e-12


@EVERY
def test_a_quarter_cut_equals_zero_in_place_and_generates_through_the_cache(name):
    model, groups = FAMILIES[name].model(), groups_of(name)
    plan = random_plan(groups, DEFAULT, random.Random(1), share=0.25)
    uncut, n_parameters = logits(model), sum(p.numel() for p in model.parameters())
    zeroed = logits(zero_units(FAMILIES[name].model(), groups, plan))
    small = prune(model, plan, inplace=True)
    assert small is model and sum(p.numel() for p in small.parameters()) < 0.95 * n_parameters
    assert relative_difference(zeroed, uncut) > 1e-4  # the units did something
    assert relative_difference(logits(small), zeroed) < 1e-12
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = small.generate(input_ids=tokens(1, 5), use_cache=True, **options)
    assert torch.equal(cached, small.generate(input_ids=tokens(1, 5), use_cache=False, **options))


@EVERY
def test_ranks_and_hidden_channels_are_cut_where_told(name):
    groups = groups_of(name)
    for kind in ("rank", "hidden"):
        if not groups.of_kind(kind):
            continue
        model = FAMILIES[name].model()
        plan = random_plan(groups, (kind,), random.Random(2), share=0.25)
        small = prune(model, plan)
        for group in discover(small).of_kind(kind):
            assert group.n_units == len(plan.keep[group.name])
        if all(g.exact for g in groups.of_kind(kind)):
            assert relative_difference(logits(small), logits(zero_units(model, groups, plan))) < 1e-12
        else:
            assert logits(small).isfinite().all()


def test_removing_all_query_heads_of_one_kv_group_takes_its_keys_along():
    model, groups = FAMILIES["llama_gqa"].model(), groups_of("llama_gqa")
    name = "model.layers.0.self_attn:query_head"
    small = prune(model, plan_keeping(groups, {name: [0, 1, 4, 5, 6, 7]}))
    attention = small.model.layers[0].self_attn
    assert attention.k_proj.weight.shape == (24, 64) and attention.q_proj.weight.shape == (48, 64)
    plan = plan_keeping(groups, {"model.layers.0.self_attn:kv_head": [0, 2, 3]})
    assert torch.equal(logits(small), logits(prune(model, plan)))


def test_query_heads_that_leave_uneven_groups_are_refused_and_nothing_changes():
    model = FAMILIES["llama_gqa"].model()
    plan = plan_keeping(groups_of("llama_gqa"), {"model.layers.0.self_attn:query_head": [0, 1, 2]})
    shapes = {n: p.shape for n, p in model.named_parameters()}
    with pytest.raises(PrunekitError, match="cannot be cut that way, nothing was changed"):
        prune(model, plan, inplace=True)
    assert {n: p.shape for n, p in model.named_parameters()} == shapes


def test_layers_may_keep_different_numbers_and_print_their_true_widths():
    model, groups = FAMILIES["gpt2"].model(), groups_of("gpt2")
    plan = plan_keeping(groups, {
        "transformer.h.0.attn:kv_head": [1, 2, 5], "transformer.h.1.attn:kv_head": list(range(7)),
        "transformer.h.1.mlp:ffn_channel": [0, 9, 200],
    })  # fmt: skip
    small = prune(model, plan)
    assert relative_difference(logits(small), logits(zero_units(model, groups, plan))) < 1e-12
    assert "Conv1D(nf=3, nx=64)" in repr(small) and "Conv1D(nf=72, nx=64)" in repr(small)
    llama = prune(FAMILIES["llama_mha"].model(), plan_keeping(groups_of("llama_mha"), {
        "model.layers.0.mlp:ffn_channel": [3, 4]}))  # fmt: skip
    assert "Linear(in_features=2, out_features=64" in repr(llama)


def test_pruning_twice_composes_and_is_recorded_cut_after_cut():
    model, groups = FAMILIES["llama_mha"].model(), groups_of("llama_mha")
    name = "model.layers.0.mlp:ffn_channel"
    once = prune(model, plan_keeping(groups, {name: list(range(1, 96, 2))}))
    twice = prune(once, plan_keeping(discover(once), {name: [0, 10, 47]}))
    assert twice.config.prunekit["stages"] == [{name: list(range(1, 96, 2))}, {name: [0, 10, 47]}]
    assert not hasattr(model.config, "prunekit")
    direct = prune(model, plan_keeping(groups, {name: [1, 21, 95]}))
    assert torch.equal(logits(twice), logits(direct))


def test_integers_that_are_no_widths_stay():
    """A layer index and a token id that equal a head count must not be rewritten."""
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=8,
                         num_key_value_heads=2, vocab_size=48, eos_token_id=8, pad_token_id=2)  # fmt: skip
    model = LlamaForCausalLM(config)
    groups = discover(model)
    plan = plan_keeping(groups, {g.name: [1] for g in groups.of_kind("kv_head")})
    small = prune(model, plan)
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == [0, 1, 2]
    assert small.config.eos_token_id == 8 and small.config.pad_token_id == 2


def test_frozen_tied_and_half_precision_parameters_stay_so():
    model = FAMILIES["llama_tied"].model(dtype=torch.bfloat16)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    plan = random_plan(groups_of("llama_tied"), DEFAULT, random.Random(0), share=0.5)
    small = prune(model, plan)
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert not small.model.layers[0].mlp.up_proj.weight.requires_grad
    assert small.model.layers[0].mlp.gate_proj.weight.requires_grad


def test_the_new_model_shares_no_storage_with_the_old():
    model = FAMILIES["llama_mha"].model()
    small = prune(model, random_plan(groups_of("llama_mha"), DEFAULT, random.Random(0), share=0.25))
    old = {p.data_ptr() for p in model.parameters()}
    assert not old & {p.data_ptr() for p in small.parameters()}


def test_a_plan_for_another_model_is_refused():
    plan = PruningPlan({"model.layers.0.mlp:ffn_channel": [0]}, {"model.layers.0.mlp:ffn_channel": 77}, 10, 5)
    with pytest.raises(PrunekitError, match="for another model: it has 77 units .* this model has 96"):
        prune(FAMILIES["llama_mha"].model(), plan)


class TwoUses(nn.Module):
    """Uses one remembered number for its own width and for the width of the residual stream."""

    def __init__(self):
        super().__init__()
        self.width = 64
        self.up = nn.Linear(64, 64, bias=False)
        self.down = nn.Linear(64, 64, bias=False)

    def forward(self, x):
        h = torch.relu(self.up(x)).view(*x.shape[:-1], self.width)
        return self.down(h).view(*x.shape[:-1], self.width)


def test_a_number_used_for_two_widths_is_named_and_nothing_is_cut():
    model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                         num_attention_heads=8, vocab_size=48))  # fmt: skip
    model.model.layers[0].mlp = TwoUses()
    groups = discover(model)
    plan = plan_keeping(groups, {"model.layers.0.mlp:ffn_channel": list(range(32))})
    with pytest.raises(PrunekitError, match=r"model.layers.0.mlp.width .* also used where"):
        prune(model, plan)


class Stubborn(nn.Module):
    """Keeps its width where no trace can see it."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 32, bias=False), nn.Linear(32, 64, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)).view(1, -1, 32))


def test_the_second_trace_refuses_what_cannot_run():
    model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                         num_attention_heads=8, vocab_size=48))  # fmt: skip
    model.model.layers[1].mlp = Stubborn()
    plan = plan_keeping(discover(model), {"model.layers.1.mlp:ffn_channel": list(range(24))})
    with pytest.raises(PrunekitError, match="nothing was changed: the model does not run"):
        prune(model, plan)


class Averaging(nn.Module):
    """Scales by a number computed from its width."""

    def forward(self, x):
        return torch.relu(x) * x.shape[-1] ** -0.5


def test_a_scale_computed_from_the_width_is_refused():
    model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                         num_attention_heads=8, vocab_size=48))  # fmt: skip
    model.model.layers[1].mlp.act_fn = Averaging()
    plan = plan_keeping(discover(model), {"model.layers.1.mlp:ffn_channel": list(range(24))})
    with pytest.raises(PrunekitError, match="a number that it computes from a width"):
        prune(model, plan)


def test_the_second_trace_refuses_another_structure(monkeypatch):
    """If the wrong rows were kept together, the partition would say so."""
    model, groups = FAMILIES["llama_mha"].model(), groups_of("llama_mha")
    plan = random_plan(groups, ("ffn_channel",), random.Random(0), share=0.25)
    honest = surgery.levels

    def shifted(graph, dead=None):
        for label in honest(graph, dead):
            yield label if dead is None else label[::-1].copy()

    monkeypatch.setattr(surgery, "levels", shifted)
    with pytest.raises(PrunekitError, match="structure is not the full"):
        prune(model, plan)


@pytest.mark.parametrize(
    ("other", "same"), [([5, 5, 2], True), ([0, 1, 1], False), ([0, 0, 0], False), ([0, 1, 2], False)]
)
def test_partitions_are_compared_whatever_their_numbers(other, same):
    assert surgery._same_partition(np.array([0, 0, 1]), np.array(other)) is same
