"""Everything that must hold of a cut model, and what is refused; that cuts are right is in `test_families.py`."""

import numpy as np
import pytest
import torch
from families import FAMILIES, logits, plan_keeping, random_units, relative_difference, zero_units
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from prunekit import PrunekitError, PruningPlan, discover, prune
from prunekit.discovery.labelling import Trace
from prunekit.pruning import proving
from prunekit.pruning.consequences import emptied_elements


def groups_of(name):
    return FAMILIES[name].groups()


def quarter(name):
    return plan_keeping(groups_of(name), random_units(FAMILIES[name], groups_of(name), seed=0, share=0.25))


def test_query_heads_that_leave_uneven_groups_are_refused_and_nothing_changes():
    model = FAMILIES["llama_gqa"].model()
    plan = plan_keeping(groups_of("llama_gqa"), {"model.layers.0.self_attn:query_head": [0, 1, 2]})
    shapes = {n: p.shape for n, p in model.named_parameters()}
    with pytest.raises(PrunekitError, match=r"would need .*num_key_value_groups .* also used where"):
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
    small = prune(model, quarter("llama_tied"))
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert not small.model.layers[0].mlp.up_proj.weight.requires_grad
    assert small.model.layers[0].mlp.gate_proj.weight.requires_grad


def test_the_new_model_shares_no_storage_with_the_old():
    model = FAMILIES["llama_mha"].model()
    small = prune(model, quarter("llama_mha"))
    old = {p.data_ptr() for p in model.parameters()}
    assert not old & {p.data_ptr() for p in small.parameters()}


def test_a_plan_for_another_model_is_refused():
    plan = PruningPlan({"model.layers.0.mlp:ffn_channel": [0]}, {"model.layers.0.mlp:ffn_channel": 77}, 10, 5)
    with pytest.raises(PrunekitError, match="for another model: it has 77 units .* this model has 96"):
        prune(FAMILIES["llama_mha"].model(), plan)
    plan = PruningPlan({"h.0.mlp:ffn_channel": [0]}, {"h.0.mlp:ffn_channel": 77}, 10, 5)
    with pytest.raises(PrunekitError, match="this model has no such group; make a plan from discover"):
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
    with pytest.raises(
        PrunekitError,
        match="nothing was changed: the model does not run.*; keep the groups .* whole, or plan with other kinds",
    ):
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
    with pytest.raises(PrunekitError, match="a number that it computes from a width; keep the groups"):
        prune(model, plan)


def test_the_second_trace_refuses_another_structure(monkeypatch):
    """If the wrong rows were kept together, the partition would say so."""
    honest = proving.levels

    def shifted(graph, dead=None):
        for label in honest(graph, dead):
            yield label if dead is None else label[::-1].copy()

    monkeypatch.setattr(proving, "levels", shifted)
    with pytest.raises(PrunekitError, match="structure is not the full .*; keep the groups"):
        prune(FAMILIES["llama_mha"].model(), quarter("llama_mha"))


@pytest.mark.parametrize(
    ("other", "same"), [([5, 5, 2], True), ([0, 1, 1], False), ([0, 0, 0], False), ([0, 1, 2], False)]
)
def test_partitions_are_compared_whatever_their_numbers(other, same):
    assert proving._same_partition(np.array([0, 0, 1]), np.array(other)) is same


def test_of_lists_in_lists_the_outermost_element_goes():
    model = nn.Module()
    model.experts = nn.ModuleList(nn.ModuleList(nn.Linear(2, 2) for _ in range(2)) for _ in range(3))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    offsets = {(name, 0): (2 + 2 * i, 2) for i, name in enumerate(shapes)}
    dead = np.zeros(2 + 2 * len(shapes), np.bool_)
    for (name, _), (start, size) in offsets.items():
        dead[start : start + size] = name.startswith(("experts.1.", "experts.2.0."))
    assert emptied_elements(model, Trace(offsets=offsets, shapes=shapes), dead) == {"experts.1", "experts.2.0"}
