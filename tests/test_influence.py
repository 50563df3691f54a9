"""Block influence: worked out from hidden states, of layers that do nothing, and what is refused."""

import pytest
import torch
from families import FAMILIES, tokens

from prunekit import BlockInfluence, PrunekitError, discover, score


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


def test_what_has_none_is_refused():
    model = FAMILIES["llama_mha"].model()
    groups = discover(model)
    with pytest.raises(
        PrunekitError, match=r"is not a whole layer, so it has no block influence; choose groups.of_kind"
    ):
        score(model, groups.of_kind("block"), BlockInfluence(), tokens())
    with pytest.raises(PrunekitError, match="reads tokens, not"):
        BlockInfluence().unit_scores(model, groups.of_kind("layer"), "tokens")
