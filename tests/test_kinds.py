"""Head dimensions and vocabularies: groups that only some plans cut, and what must change with them."""

import random

import pytest
import torch
from families import FAMILIES, logits, plan_keeping, relative_difference, tokens, zero_units
from torch import nn
from transformers import FalconConfig, FalconForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from prunekit import Magnitude, PrunekitError, discover, load, plan, prune, save, score

TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 48}


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**TINY, "num_key_value_heads": 4, **changes})).double().eval()


# --- head dimensions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "units"), [("llama_gqa", [4]), ("gpt2", [8]), ("bloom", [8]), ("gpt_neox", [1, 6])])
def test_head_dimensions_are_rotary_pairs_or_positions(name, units):
    """LLaMA turns 8 channels in 4 pairs; GPT-2 and BLOOM turn none; GPT-NeoX turns a quarter of them."""
    groups = discover(FAMILIES[name].model())
    for layer in (0, 1):
        assert [g.n_units for g in groups.of_kind("head_dim") if g.layer == layer] == units


def test_a_rotary_pair_owns_two_channels_of_every_head_and_of_the_values():
    group = discover(llama()).of_kind("head_dim")[0]
    index = {m.parameter.rsplit(".", 2)[-2]: m.index for m in group.members}
    assert {name: i.shape for name, i in index.items()} == {
        "q_proj": (4, 16), "k_proj": (4, 8), "v_proj": (4, 8), "o_proj": (4, 16)
    }  # fmt: skip
    assert index["k_proj"][1].tolist() == [1, 5, 9, 13, 17, 21, 25, 29]  # 1 and its partner 5, in four heads


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama_gqa", "llama_mqa", "gpt2", "opt", "bloom", "gpt_neox"])
def test_cutting_head_dimensions_equals_zeroing_them(name):
    model = FAMILIES[name].model()
    groups, rng = discover(model), random.Random(0)
    keep = {
        g.name: sorted(rng.sample(range(g.n_units), g.n_units - 1 - (g.layer or 0)))
        for g in groups.of_kind("head_dim")
        if g.n_units > 2
    }
    cut = plan_keeping(groups, keep)
    zeroed = logits(zero_units(FAMILIES[name].model(), groups, cut))
    small = prune(model, cut)
    assert relative_difference(zeroed, logits(model)) > 1e-4 and relative_difference(logits(small), zeroed) < 1e-12
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "input_ids": tokens(2, 5)}
    assert torch.equal(small.generate(**options, use_cache=True), small.generate(**options, use_cache=False))


def test_per_head_norms_make_head_dimensions_inexact():
    assert not any(g.exact for g in discover(FAMILIES["qwen3"].model()).of_kind("head_dim"))


def test_a_head_size_that_scales_the_scores_is_refused():
    class Scaled(nn.Module):
        """Attention that takes the root of its head size while it runs."""

        def __init__(self):
            super().__init__()
            self.head_dim = 8
            self.q, self.k, self.v, self.o = (nn.Linear(64, 64, bias=False) for _ in range(4))

        def forward(self, hidden_states, **_options):
            shape = (*hidden_states.shape[:-1], -1, self.head_dim)
            q, k, v = (f(hidden_states).view(shape).transpose(1, 2) for f in (self.q, self.k, self.v))
            weights = torch.softmax(q @ k.transpose(2, 3) / self.head_dim**0.5, -1)
            return self.o((weights @ v).transpose(1, 2).flatten(2)), None

    model = llama()
    model.model.layers[0].self_attn = Scaled()
    groups = discover(model)
    name = next(g.name for g in groups.of_kind("head_dim") if g.layer == 0)
    with pytest.raises(PrunekitError, match="a number that it computes from a width"):
        prune(model, plan_keeping(groups, {name: [0, 1, 2]}))


# --- the vocabulary ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama_gqa", "llama_tied", "gpt2", "opt_projected", "bloom", "gpt_neox"])
def test_a_smaller_vocabulary_answers_the_same_about_what_is_left(name):
    model = FAMILIES[name].model()
    groups = discover(model)
    (group,) = groups.of_kind("vocabulary")
    kept = sorted(random.Random(1).sample(range(group.n_units), 30))
    cut = plan_keeping(groups, {group.name: kept})
    small, zeroed = prune(model, cut), zero_units(FAMILIES[name].model(), groups, cut)
    new = torch.randint(0, 30, (2, 9), generator=torch.Generator().manual_seed(0))
    old = torch.tensor(kept)[new]
    with torch.no_grad():
        assert relative_difference(small(new).logits, zeroed(old).logits[..., kept]) < 1e-12
        assert relative_difference(small(new).logits, model(old).logits[..., kept]) < 1e-12
    assert small.config.vocab_size == 30 and model.config.vocab_size == group.n_units


def test_special_tokens_get_their_new_numbers():
    model = llama(bos_token_id=5, eos_token_id=[7, 9], pad_token_id=2)
    groups = discover(model)
    small = prune(model, plan_keeping(groups, {"vocabulary": [2, 5, 6, 9, 11]}))
    assert (small.config.bos_token_id, small.config.eos_token_id, small.config.pad_token_id) == (1, [3], 0)
    assert small.generation_config.bos_token_id == 1 and small.model.embed_tokens.padding_idx == 0
    assert (model.config.bos_token_id, model.generation_config.eos_token_id) == (5, [7, 9])
    lost = prune(model, plan_keeping(groups, {"vocabulary": [0, 1]}))
    assert lost.config.eos_token_id is None and lost.model.embed_tokens.padding_idx is None


def test_a_smaller_vocabulary_survives_saving(tmp_path):
    model = llama()
    groups = discover(model)
    scores = score(model, groups.of_kind("vocabulary"), Magnitude())
    small = prune(model, plan(groups, scores, 0.25, kinds=("vocabulary",), of="units"))
    save(small, tmp_path / "out")
    again, _ = load(tmp_path / "out")
    ids = torch.arange(36)[None]
    assert torch.equal(again(ids).logits, small(ids).logits) and again.config.vocab_size == 36


def test_rows_that_are_looked_up_by_position_stay():
    config = GPT2Config(n_embd=64, n_layer=1, n_head=8, vocab_size=64, n_positions=64)  # all sizes alike
    groups = discover(GPT2LMHeadModel(config))
    assert "by position" in groups.locked["transformer.wpe.weight[dim 0]"]
    (group,) = groups.of_kind("vocabulary")
    assert [m.parameter for m in group.members] == ["transformer.wte.weight"]


def test_a_model_without_logits_has_no_vocabulary_to_cut():
    groups = discover(llama().model)
    assert not groups.of_kind("vocabulary") and "looked up" in groups.locked["embed_tokens.weight[dim 0]"]


# --- what must not be called exact ------------------------------------------------------------------------------------


def test_attention_that_takes_its_scale_from_the_head_size_as_it_runs_is_refused():
    """Falcon with ALiBi keeps its scale when attention is written out, and leaves it to torch when it is not."""
    options = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8, "vocab_size": 48, "alibi": True,
               "multi_query": False, "new_decoder_architecture": False, "parallel_attn": False}  # fmt: skip
    models = {how: FalconForCausalLM(FalconConfig(**options, attn_implementation=how)) for how in ("eager", "sdpa")}
    group = discover(models["eager"]).of_kind("head_dim")[0]
    cut = plan_keeping(discover(models["eager"]), {group.name: [0, 2, 3, 7]})
    assert prune(models["eager"], cut)
    with pytest.raises(PrunekitError, match="a number that it computes from a width"):
        prune(models["sdpa"], cut)


class Filled(nn.Module):
    """Multiplies by a tensor filled with a number made from the width."""

    def forward(self, x):
        return torch.relu(x) * torch.full_like(x, 1 / x.shape[-1])


class Meeting(nn.Module):
    """Two activations meet channel by channel, and neither is zero where its weights are."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.out = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(1, 64)

    def forward(self, x):
        left, right = (torch.sigmoid(f(x)) for f in (self.left, self.right))
        return self.out((left.unsqueeze(-2) @ right.unsqueeze(-1)).squeeze(-1))


def test_a_fill_made_from_the_width_is_refused():
    model = llama()
    model.model.layers[0].mlp.act_fn = Filled()
    groups = discover(model)
    with pytest.raises(PrunekitError, match="a number that it computes from a width"):
        prune(model, plan_keeping(groups, {"model.layers.0.mlp:ffn_channel": list(range(40))}))


def test_channels_that_add_something_when_zeroed_are_inexact():
    model = llama()
    model.model.layers[0].mlp = Meeting().double()
    found = [g for g in discover(model).of_kind("ffn_channel") if g.layer == 0]
    assert found and not any(g.exact for g in found)


def test_an_operation_without_a_rule_is_given_memory_of_its_own():
    """Weight norm has a kernel that reads every element of a matrix, and a traced parameter has but one."""
    model = llama()
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    groups = discover(model)
    assert not [g for g in groups.of_kind("ffn_channel") if g.layer == 0]
    assert [g.n_units for g in groups.of_kind("ffn_channel") if g.layer == 1] == [96]
