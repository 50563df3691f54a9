"""Block influence: worked out from hidden states, of layers that do nothing, and what is refused."""

import pytest
import torch
from families import FAMILIES, tokens

from prunekit import BlockInfluence, PrunekitError, discover, plan, plan_in_steps, prune, score


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "bloom", "gpt_neox"])
def test_it_is_what_hidden_states_say(name):
    model = FAMILIES[name].model()
    layers = discover(model).of_kind("layer")
    found = score(model, layers, BlockInfluence(), tokens())
    lists = layers[0].name.removesuffix(".0:layer")
    seen = []
    hook = model.get_submodule(f"{lists}.1").register_forward_hook(
        lambda _, args, kwargs, y: seen.extend([args[0] if args else kwargs["hidden_states"], y]), with_kwargs=True
    )
    with torch.no_grad():
        model(tokens())
    hook.remove()
    before, after = seen[0], seen[1] if isinstance(seen[1], torch.Tensor) else seen[1][0]
    expected = 1 - torch.cosine_similarity(before, after, dim=-1).mean()
    torch.testing.assert_close(found[f"{lists}.1:layer"], expected[None], check_dtype=False)


def test_a_layer_that_does_nothing_has_none():
    model = FAMILIES["llama_mha"].model()
    layer = model.model.layers[1]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_(), layer.mlp.down_proj.weight.zero_()
    found = score(model, discover(model).of_kind("layer"), BlockInfluence(), tokens())
    assert abs(float(found["model.layers.1:layer"])) < 1e-12 < float(found["model.layers.0:layer"])


@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "gemma2", "bloom", "gpt_neox"])
def test_of_a_block_it_is_the_turn_between_the_stream_before_and_behind_it(name):
    """The stream is read where the next part of the layer takes it; in parallel layers blocks follow their order."""
    model = FAMILIES[name].model()
    blocks = discover(model).of_kind("block")
    found = score(model, blocks, BlockInfluence(), tokens())
    seen = layer_streams(model, name, 1)
    for block, before, after in zip([g for g in blocks if g.layer == 1], seen, seen[1:], strict=False):
        expected = 1 - torch.cosine_similarity(before, after, dim=-1).mean()
        torch.testing.assert_close(found[block.name], expected[None], check_dtype=False, rtol=1e-9, atol=1e-12)
    assert torch.equal(found[blocks[0].name], score(model, blocks[:1], BlockInfluence(), tokens())[blocks[0].name])


def layer_streams(model, name, number):
    """The residual stream in front of a layer, between its blocks and behind it, from what its modules return."""
    paths = {
        "llama_gqa": ("model.layers.{}", "post_attention_layernorm"),
        "gemma2": ("model.layers.{}", "pre_feedforward_layernorm"),
        "gpt2": ("transformer.h.{}", "ln_2"),
        "bloom": ("transformer.h.{}", "post_attention_layernorm"),
        "gpt_neox": ("gpt_neox.layers.{}", "attention"),
    }
    path, between = paths[name]
    layer, seen = model.get_submodule(path.format(number)), {}
    first = lambda result: result if isinstance(result, torch.Tensor) else result[0]  # noqa: E731
    hooks = [
        layer.register_forward_hook(
            lambda _, args, kwargs, y: seen.update(front=(*args, *kwargs.values())[0], behind=first(y)),
            with_kwargs=True,
        ),
        layer.get_submodule(between).register_forward_hook(
            lambda _, args, kwargs, y: seen.update(given=(*args, *kwargs.values())[0], returned=first(y)),
            with_kwargs=True,
        ),
    ]
    with torch.no_grad():
        model(tokens())
    for hook in hooks:
        hook.remove()
    middle = seen["front"] + seen["returned"] if name == "gpt_neox" else seen["given"]
    return [seen["front"], middle, seen["behind"]]


def test_a_block_that_does_nothing_has_none_and_the_weights_stay():
    model = FAMILIES["llama_mha"].model()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = score(model, discover(model).of_kind("block"), BlockInfluence(), tokens())
    nothing = [name for name, value in found.items() if abs(float(value)) < 1e-12]
    assert nothing == ["model.layers.0.self_attn:block", "model.layers.1.mlp:block"]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_blocks_go_alone_and_one_at_a_time():
    model = FAMILIES["llama_mha"].model()
    groups = discover(model)
    scores = score(model, groups.of_kind("block"), BlockInfluence(), tokens())
    options = {"of": "units", "kinds": ("block",)}
    made = plan(groups, scores, 0.5, **options)
    assert sum(not units for units in made.keep.values()) == 2
    attention = groups.without(g.name for g in groups.of_kind("block") if "mlp" in g.name)
    alone = plan(attention, scores, 0.5, **options)
    assert [name for name, units in alone.keep.items() if not units] == [
        min(alone.keep, key=lambda name: float(scores[name]))
    ]
    steps = plan_in_steps(model, BlockInfluence(), 0.5, tokens(), n_steps=2, **options)
    first = plan(groups, scores, 0.25, **options)
    small = prune(model, first, measure=False)
    left = discover(small).of_kind("block")
    again = score(small, left, BlockInfluence(), tokens())
    worth = {g.name: float(again[g.name]) / sum(p.numel() for p in parameters_of(small, g)) for g in left}
    gone = {name for name, units in steps.keep.items() if not units}
    assert gone == {
        *(name for name, units in first.keep.items() if not units),
        min(worth, key=lambda name: worth[name]),
    }
    assert prune(model, steps, measure=False)(tokens()).logits.isfinite().all()


def parameters_of(model, group):
    named = dict(model.named_parameters())
    return [named[name] for name in {member.parameter for member in group.members}]


def test_what_has_none_is_refused():
    model = FAMILIES["llama_mha"].model()
    groups = discover(model)
    with pytest.raises(
        PrunekitError, match=r"is no whole layer or block, so it has no block influence; choose groups.of_kind"
    ):
        score(model, groups.of_kind("ffn_channel"), BlockInfluence(), tokens())
    with pytest.raises(PrunekitError, match="reads tokens, not"):
        BlockInfluence().unit_scores(model, groups.of_kind("layer"), "tokens")
