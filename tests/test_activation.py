"""Activation importance: numbers worked out by hand, grouped-query attention, half precision, and what is refused."""

import pytest
import torch
from families import FAMILIES, tokens
from other_families import UNLISTED
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from wirings import WIRINGS

from prunekit import Activation, CoupledGroup, Fluctuation, Member, PrunekitError, Taylor, discover, score
from prunekit.importance import IMPORTANCES


def inputs_of(model, name):
    """What a linear layer reads over all tokens (tokens, n_in)."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(tokens())
    hook.remove()
    return seen[0].flatten(0, 1)


def columns_by_hand(model, name, rows_are_inputs=False):
    """‖x_j‖ · Σ_i |W_ij|, column by column."""
    x, weight = inputs_of(model, name), model.get_submodule(name).weight.detach()
    weight = weight.T if rows_are_inputs else weight
    return torch.stack([x[:, j].norm() * weight[:, j].abs().sum() for j in range(weight.shape[1])])


def test_two_channels_worked_out_by_hand():
    model = FAMILIES["llama_mha"].model()
    groups = discover(model)
    down = model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        down.weight[:, :2] = 0
        down.weight[0, 0], down.weight[3, 0], down.weight[5, 1] = 2.0, -1.0, 4.0
    x = inputs_of(model, "model.layers.1.mlp.down_proj")
    found = score(model, groups, Activation(), tokens())["model.layers.1.mlp:ffn_channel"]
    expected = torch.stack([3 * (x[:, 0] ** 2).sum().sqrt(), 4 * (x[:, 1] ** 2).sum().sqrt()])
    torch.testing.assert_close(found[:2], expected)


def test_a_kv_head_is_what_its_own_query_heads_hand_to_the_output():
    model = FAMILIES["llama_gqa"].model()  # 8 query heads of 8 channels, 2 for each of 4 KV heads
    scores = score(model, discover(model), Activation(), tokens())
    columns = columns_by_hand(model, "model.layers.0.self_attn.o_proj").view(8, 8)
    torch.testing.assert_close(scores["model.layers.0.self_attn:query_head"], columns.sum(1))
    torch.testing.assert_close(scores["model.layers.0.self_attn:kv_head"], columns.view(4, 16).sum(1))


def test_a_layer_that_holds_its_weight_the_other_way_round():
    model = FAMILIES["gpt2"].model()
    found = score(model, discover(model), Activation(), tokens())["transformer.h.1.mlp:ffn_channel"]
    torch.testing.assert_close(found, columns_by_hand(model, "transformer.h.1.mlp.c_proj", rows_are_inputs=True))


def test_all_readers_of_the_hidden_channels_count_a_tied_head_too():
    model = FAMILIES["llama_tied"].model()
    group = discover(model).of_kind("hidden")[0]
    readers = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkv"]
    readers += [f"model.layers.{i}.mlp.{p}_proj" for i in range(2) for p in ("gate", "up")]
    expected = sum(columns_by_hand(model, name) for name in [*readers, "lm_head"])
    torch.testing.assert_close(score(model, (group,), Activation(), tokens())[group.name], expected)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_stacked_experts_are_scored_over_the_tokens_that_reach_each(name):
    """Channels by the columns of their expert's second matrix, in whatever orientation it lies, experts by both."""
    model = {**FAMILIES, **UNLISTED}[name].model()
    groups, layer = discover(model), model.model.layers[0].mlp
    seen, experts = [], layer.experts
    hook = layer.experts.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args, *kwargs.values())), with_kwargs=True
    )
    with torch.no_grad():
        model(tokens())
    hook.remove()
    hidden, chosen = seen[0][0].flatten(0, -2), next(t for t in seen[0][1:] if t.dtype == torch.long)
    turned = (lambda w: w) if name == "mixtral" else (lambda w: w.T)
    by_channel, by_expert = [], []
    for e in range(4):
        x = hidden[(chosen.flatten(0, -2) == e).any(-1)]
        if name == "mixtral":
            gate, up = (x @ experts.gate_up_proj[e].T).chunk(2, -1)
            inner = torch.nn.functional.silu(gate) * up
        else:
            inner = experts._apply_gate(x @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e])
        first, second = (
            (turned(w[e]).abs() * into.norm(dim=0)).detach()
            for w, into in ((experts.gate_up_proj, x), (experts.down_proj, inner))
        )
        by_channel.append(second.sum(0))
        by_expert.append(first.sum() + second.sum())
    found = score(model, groups, Activation(), tokens())
    torch.testing.assert_close(found["model.layers.0.mlp.experts:ffn_channel"], torch.stack(by_channel).sum(0))
    torch.testing.assert_close(found["model.layers.0.mlp:expert"], torch.stack(by_expert))


def test_an_expert_that_no_token_reaches_fluctuates_by_nothing():
    model = FAMILIES["mixtral"].model()
    groups, router = discover(model), model.model.layers[0].mlp.gate
    router.register_forward_hook(lambda _module, _args, out: (*out[:2], torch.tensor([[0, 1]]).expand(len(out[2]), 2)))
    found = score(model, groups, Fluctuation(), tokens())["model.layers.0.mlp:expert"]
    assert found[2:].tolist() == [0, 0] and bool((found[:2] > 0).all())


@pytest.mark.parametrize(("name", "block"), [("llama_gqa", "model.layers.1.mlp"), ("gpt2", "transformer.h.1.mlp")])
def test_what_nothing_reads_is_scored_by_all_its_weights(name, block):
    model = FAMILIES[name].model()
    linear = [
        n for n, _ in model.named_modules() if n.startswith(f"{block}.") and hasattr(model.get_submodule(n), "weight")
    ]
    expected = sum(columns_by_hand(model, n, rows_are_inputs=name == "gpt2").sum() for n in linear)
    found = score(model, discover(model), Activation(), tokens())[f"{block}:block"]
    torch.testing.assert_close(found, expected[None])


def test_batches_add_up(monkeypatch):
    model = FAMILIES["opt"].model()
    groups = discover(model).of_kind("ffn_channel")
    whole = score(model, groups, Activation(), tokens())
    monkeypatch.setattr("prunekit.calibration.TOKENS_A_BATCH", 9)
    apart = score(model, groups, Activation(), tokens())
    for name, values in whole.items():
        torch.testing.assert_close(apart[name], values)


@pytest.mark.parametrize("name", ["llama_gqa", "llama_tied", "qwen3", "gpt2", "opt_projected", "bloom", "gpt_neox"])
def test_half_precision_scores_as_the_same_weights_in_float32(name):
    half, wide = (FAMILIES[name].model(dtype=torch.float32) for _ in range(2))
    for p, q in zip(half.parameters(), wide.parameters(), strict=True):  # parameters alone, as a checkpoint loads
        p.data = p.data.half()
        q.data = p.data.float()
    groups = discover(half).of_kind("kv_head", "ffn_channel")
    found, expected = (score(model, groups, Activation(), tokens()) for model in (half, wide))
    for group in groups:
        torch.testing.assert_close(found[group.name], expected[group.name])


def test_the_model_is_left_as_it_was():
    model = FAMILIES["llama_mha"].model(dtype=torch.float16).train()
    before = {name: (id(p), p.dtype, p.clone()) for name, p in model.named_parameters()}
    score(model, discover(model), Activation(), tokens())
    assert model.training and model.model.layers[0].mlp.training
    for name, p in model.named_parameters():
        assert (id(p), p.dtype) == before[name][:2] and torch.equal(p, before[name][2])
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_unit_that_hands_on_nothing_scores_zero():
    model = FAMILIES["llama_mha"].model()
    groups = discover(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[7] = 0
    found = score(model, groups, Activation(), tokens())["model.layers.0.mlp:ffn_channel"]
    assert found[7] == 0 and found.count_nonzero() == len(found) - 1


@pytest.mark.parametrize("normed", [weight_norm, parametrizations.weight_norm])
def test_a_weight_that_is_computed_is_no_weight_of_a_reader(normed):
    model = FAMILIES["llama_mha"].model()
    normed(model.model.layers[0].mlp.down_proj)
    groups = discover(model)
    found = score(model, groups, Activation(), tokens())
    columns = columns_by_hand(model, "model.layers.1.mlp.down_proj")
    torch.testing.assert_close(found["model.layers.1.mlp:ffn_channel"], columns)
    own = next(n for n, _ in model.named_parameters() if n.startswith("model.layers.0.mlp.down_proj."))
    alone = CoupledGroup("it:hidden", "hidden", 1, (Member(own, 0, torch.zeros(1, 1, dtype=torch.long)),), True)
    with pytest.raises(PrunekitError, match="no linear layer consumes 'it:hidden'"):
        score(model, (alone,), Activation(), tokens())


class Named(nn.Linear):
    """Hands on its input by name."""

    def __call__(self, x):
        return super().__call__(input=x)


def test_a_layer_that_is_called_by_name_is_read_all_the_same():
    model, groups = FAMILIES["llama_mha"].model(), FAMILIES["llama_mha"].groups()
    expected = score(model, groups.of_kind("ffn_channel"), Activation(), tokens())
    for layer in model.model.layers:
        layer.mlp.down_proj.__class__ = Named
    found = score(model, groups.of_kind("ffn_channel"), Activation(), tokens())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("importance", [Activation(), Taylor()])
def test_a_model_that_is_not_of_transformers_is_refused(importance):
    family = next(iter(WIRINGS.values()))
    with pytest.raises(PrunekitError, match=r"a Wired is not a transformers model.*such as Magnitude\(\)"):
        score(family.model(), family.groups(), importance, tokens())


@pytest.mark.parametrize(
    ("model", "groups", "message"),
    [
        (None, [], "model=None is not allowed"),
        (nn.Linear(2, 2), None, "groups=None is not allowed; give Groups"),
        (
            nn.Linear(2, 2),
            ["model.layers.0.mlp:ffn_channel"],
            "groups\\[0\\]='model.layers.0.mlp:ffn_channel' is not allowed",
        ),
    ],
)
def test_what_is_no_model_and_no_group_is_refused(model, groups, message):
    with pytest.raises(PrunekitError, match=message):
        score(model, groups, Activation(), tokens())


def test_what_cannot_be_scored_is_refused():
    model = FAMILIES["llama_mha"].model()
    groups = discover(model)
    with pytest.raises(PrunekitError, match="needs a calibration set"):
        score(model, groups, Activation())
    with pytest.raises(PrunekitError, match=r"token ids 0 to 99, but the model knows 0 to 47"):
        score(model, groups, Activation(), torch.tensor([[0, 99]]))
    norms = CoupledGroup(
        "model.norm:hidden", "hidden", 64, (Member("model.norm.weight", 0, torch.arange(64)[:, None]),), True
    )
    with pytest.raises(PrunekitError, match="no linear layer consumes 'model.norm:hidden'"):
        score(model, (norms,), Activation(), tokens())
    assert IMPORTANCES["activation"]() == Activation()
