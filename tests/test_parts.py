"""Whole blocks and layers are taken out as if all their parameters were zero, alone and with heads and channels."""

import random
import zlib

import pytest
import torch
from families import (
    COMMON,
    FAMILIES,
    continued,
    logits,
    plan_keeping,
    random_units,
    relative_difference,
    zero_units,
)
from other_families import DIFFICULT, EVERYONE
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from wirings import WIRINGS

from prunekit import PrunekitError, discover, prune

# layers that are wired differently
DIFFERENT = ["llama_gqa", "gemma2", "gpt2", "gptj", "opt", "bloom", "falcon_new", "mpt", "qwen2_moe", "llama_peft"]


NEEDED = {"lfm2": "model.layers.1:layer"}  # a convolution, then the only attention


def pruned_and_zeroed(family, keep, dtype=None):
    """The cut model and its zeroed twin."""
    model, groups = family.model(dtype=dtype), family.groups()
    plan = plan_keeping(groups, keep)
    small = prune(model, plan)
    return small, zero_units(model, groups, plan)


def random_parts(family, seed):
    """A plan that takes out some blocks, or a layer, and cuts a part of the heads and channels of what is left."""
    groups, rng = family.groups(), random.Random(seed)
    kind = rng.choice([kind for kind in ("block", "layer") if groups.of_kind(kind)])
    parts = [g for g in groups.of_kind(kind) if g.name != NEEDED.get(family.name)]
    n = rng.randint(1, max(1, len(parts) - 1))
    keep = {g.name: [] for g in rng.sample(parts, n)}
    gone = [name.rpartition(":")[0] for name in keep]
    units = random_units(family, groups, seed)
    return keep | {name: kept for name, kept in units.items() if not lies_in(groups[name], gone)}


def lies_in(group, paths):
    return any(m.parameter.startswith(f"{path}.") for m in group.members for path in paths)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERYONE)
def test_parts_with_heads_and_channels_are_cut_as_if_zero(name):
    """One draw a family."""
    family = EVERYONE[name]
    small, zeroed = pruned_and_zeroed(family, random_parts(family, seed=zlib.crc32(name.encode())))
    assert relative_difference(logits(small), logits(zeroed)) < family.tolerance


@pytest.mark.slow
@pytest.mark.parametrize("name", [*DIFFERENT, *WIRINGS, *DIFFICULT])
def test_every_part_is_cut_as_if_zero(name):
    """One by one."""
    family = EVERYONE[name]
    for group in family.groups().of_kind("block", "layer"):
        small, zeroed = pruned_and_zeroed(family, {group.name: []})
        assert relative_difference(logits(small), logits(zeroed)) < family.tolerance, group
        names = [n for n, _ in small.named_parameters()]
        n_gone = len({m.parameter for m in group.members})
        assert len(names) == len(list(zeroed.named_parameters())) - n_gone


@pytest.mark.parametrize("name", [*DIFFERENT, *WIRINGS, *DIFFICULT])
def test_all_blocks_of_one_kind_are_cut_as_if_zero(name):
    """A gate that multiplies what a block returns holds all hidden channels, and goes with the block."""
    family = EVERYONE[name]
    blocks = [group.name for group in family.groups().of_kind("block")]
    for kind in {name.rpartition(".")[2] for name in blocks}:
        keep = {name: [] for name in blocks if name.endswith(f".{kind}")}
        small, zeroed = pruned_and_zeroed(family, keep)
        assert relative_difference(logits(small), logits(zeroed)) < family.tolerance, list(keep)


@pytest.mark.parametrize("name", [*FAMILIES, "gpt_neo", "deepseek_v3"])
def test_the_cache_keeps_in_step_without_the_first_attention(name):
    """The cache counts its tokens in layer 0; the second prompt is padded."""
    family = EVERYONE[name]
    small, zeroed = pruned_and_zeroed(family, {family.groups().of_kind("block")[0].name: []}, torch.float32)
    expected = continued(zeroed, use_cache=True)
    assert expected.isfinite().all()
    assert relative_difference(continued(small, use_cache=True), expected) < 1e-5
    assert relative_difference(continued(small, use_cache=False), expected) < 1e-5


def deep(model_type="llama", **options):
    """Four layers."""
    torch.manual_seed(7)
    config = AutoConfig.for_model(model_type, **{**COMMON, "intermediate_size": 96, "num_hidden_layers": 4, **options})
    return AutoModelForCausalLM.from_config(config).double().eval()


def without_layers(model, gone, **options):
    groups = discover(model)
    return prune(model, plan_keeping(groups, {f"model.layers.{i}:layer": [] for i in gone}), **options)


@pytest.mark.parametrize("inplace", [True, False])
def test_what_stays_of_a_model_is_numbered_anew(inplace):
    model = deep("gemma3_text", num_key_value_heads=4, head_dim=8, sliding_window=4, sliding_window_pattern=2)
    types, stayed = list(model.config.layer_types), [model.model.layers[i].mlp.up_proj.weight.clone() for i in (1, 2)]
    assert len(set(types)) == 2
    expected = logits(zero_units(deep_copy(model), discover(model), plan_without(model, (0, 3))))
    small = without_layers(model, (0, 3), inplace=inplace)
    assert (small is model) is inplace and len(small.model.layers) == small.config.num_hidden_layers == 2
    assert small.config.layer_types == types[1:3] != types[:2]
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == [0, 1]
    assert all(torch.equal(layer.mlp.up_proj.weight, p) for layer, p in zip(small.model.layers, stayed, strict=True))
    assert relative_difference(logits(small), expected) < 1e-12
    assert small.config.prunekit["stages"] == [{"model.layers.0:layer": [], "model.layers.3:layer": []}]


def deep_copy(model):
    twin = AutoModelForCausalLM.from_config(model.config).to(torch.float64).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def plan_without(model, gone):
    groups = discover(model)
    return plan_keeping(groups, {f"model.layers.{i}:layer": [] for i in gone})


def test_a_model_that_is_not_cut_in_place_stays_as_it_was():
    model = deep()
    before = {n: p.clone() for n, p in model.named_parameters()}
    said, modules = model.config.to_dict(), [n for n, _ in model.named_modules()]
    small = without_layers(model, (1, 2))
    assert [n for n, _ in model.named_modules()] == modules and model.config.to_dict() == said
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in small.parameters()}


def test_a_layer_and_channels_of_one_that_moves_up_go_in_one_plan():
    model = deep()
    groups = discover(model)
    keep = {
        "model.layers.1:layer": [],
        "model.layers.2.self_attn:block": [],
        "model.layers.2.mlp:ffn_channel": list(range(0, 96, 3)),
        "model.layers.3.self_attn:kv_head": [1, 2, 5],
    }
    plan = plan_keeping(groups, keep)
    small = prune(model, plan)
    assert small.model.layers[1].mlp.up_proj.weight.shape == (32, 64)
    assert small.model.layers[2].self_attn.q_proj.weight.shape == (24, 64)
    assert relative_difference(logits(small), logits(zero_units(model, groups, plan))) < 1e-12
    again = discover(small)
    assert [g.name for g in again.of_kind("layer")] == [f"model.layers.{i}:layer" for i in range(3)]


def test_cutting_layers_in_two_plans_is_as_in_one():
    model = deep()
    one, two = without_layers(model, (0, 2)), without_layers(without_layers(model, (0,)), (1,))
    assert torch.equal(logits(one), logits(two)) and one.config.num_hidden_layers == two.config.num_hidden_layers == 2


@pytest.mark.parametrize("inplace", [True, False])
def test_a_model_without_layers_is_refused_and_nothing_changes(inplace):
    model = deep()
    before = logits(model)
    with pytest.raises(PrunekitError, match="leaves nothing in model.layers; keep at least one"):
        without_layers(model, range(4), inplace=inplace)
    assert torch.equal(logits(model), before) and not hasattr(model.config, "prunekit")


def test_layers_that_share_a_parameter_are_not_offered():
    model = deep()
    model.model.layers[2].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    offered = {g.name for g in discover(model).of_kind("block", "layer")}
    assert {"model.layers.0:layer", "model.layers.3:layer", "model.layers.1.self_attn:block"} <= offered
    assert not offered & {f"model.layers.{i}{part}" for i in (1, 2) for part in (":layer", ".mlp:block")}


def test_layers_that_share_a_module_are_not_offered():
    model = deep()
    model.model.layers[2].mlp = model.model.layers[1].mlp
    offered = {g.name for g in discover(model).of_kind("block", "layer")}
    assert not offered & {f"model.layers.{i}{part}" for i in (1, 2) for part in (":layer", ".mlp:block")}


def test_a_hybrid_without_attention_is_refused():
    """Its cache wants one layer of attention at least."""
    with pytest.raises(
        PrunekitError, match="layers or blocks that go, the model does not run with its cache: .*ValueError"
    ):
        pruned_and_zeroed(EVERYONE["lfm2"], {NEEDED["lfm2"]: []})


def test_a_block_that_the_rest_is_reached_through_is_named():
    """A norm stands behind a residual sum, inside the block; the other block of the plan could go."""
    config = AutoConfig.for_model("xlnet", d_model=64, n_layer=3, n_head=8, d_inner=96, vocab_size=48)
    model = AutoModelForCausalLM.from_config(config).eval()
    groups, could = discover(model), {"transformer.layer.0.rel_attn:block": []}
    assert prune(model, plan_keeping(groups, could))
    with pytest.raises(PrunekitError, match=r"^transformer.layer.1.ff cannot go: .* only through it"):
        prune(model, plan_keeping(groups, could | {"transformer.layer.1.ff:block": []}))


class Biased(nn.Module):
    """An FFN that adds a constant, which stays when its parameters are zero."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x) + 1


def test_what_does_something_without_parameters_is_not_offered():
    model = LlamaForCausalLM(LlamaConfig(**COMMON, intermediate_size=96))
    model.model.layers[0].mlp = Biased(model.model.layers[0].mlp)
    offered = {g.name for g in discover(model).of_kind("block", "layer")}
    assert not offered & {"model.layers.0:layer", "model.layers.0.mlp:block"}
    assert {"model.layers.0.self_attn:block", "model.layers.1:layer", "model.layers.1.mlp:block"} <= offered


NARROWED = ["llama_gqa", "llama_mqa", "gpt2", "opt", "bloom", "gpt_neo", "gpt_neox"]  # whose head size may be cut


@pytest.mark.parametrize(
    ("name", "kinds"),
    [*((name, ("kv_head", "ffn_channel")) for name in EVERYONE), *((name, ("head_dim",)) for name in NARROWED)],
)
def test_one_unit_is_left(name, kinds):
    """Of every group of these kinds, where sizes of one could be taken for what is broadcast."""
    family = EVERYONE[name]
    keep = {g.name: [g.n_units - 1] for g in family.groups().of_kind(*kinds) if g.exact}
    if not keep:
        pytest.skip(f"no exact {' or '.join(kinds)} groups")
    small, zeroed = pruned_and_zeroed(family, keep)
    assert relative_difference(logits(small), logits(zeroed)) < family.tolerance
