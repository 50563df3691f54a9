"""Massive activations: what units write adds up to the residual stream, and what is planted is found."""

import pytest
import torch
from evaluation_helpers import llama
from families import FAMILIES

import prunekit as pk
from prunekit.importance.ablation import ablated
from prunekit.knowledge.massive import written_by


@pytest.fixture
def model():
    torch.manual_seed(0)
    return llama().double().eval()


TOKENS = torch.arange(48).reshape(3, 16) % 29


def streams(model, tokens):
    with torch.no_grad():
        return model(tokens, output_hidden_states=True).hidden_states  # the last one has passed the final norm


def test_units_write_what_their_layer_adds_to_the_stream(model):
    groups = pk.discover(model)
    units = [g for g in groups.of_kind("kv_head", "ffn_channel") if g.layer == 0]
    before, after, *_ = streams(model, TOKENS[1:2])
    for position, channel in ((0, 3), (9, 5)):
        table = written_by(model, units, TOKENS[1:2], position=position, channel=channel)
        assert len(table) == sum(g.n_units for g in units)
        added = float((after - before)[0, position, channel])
        assert table["written"].sum() == pytest.approx(added, abs=1e-9)


def test_what_conv1d_layers_write_counts_too():
    model = FAMILIES["gpt2"].model()
    units = [g for g in pk.discover(model).of_kind("kv_head", "ffn_channel") if g.layer == 0]
    before, after, *_ = streams(model, TOKENS[:1])
    table = written_by(model, units, TOKENS[:1], position=4, channel=3)
    block = model.transformer.h[0]
    biases = float((block.attn.c_proj.bias + block.mlp.c_proj.bias)[3].detach())
    assert table["written"].sum() + biases == pytest.approx(float((after - before)[0, 4, 3]), abs=1e-9)


def test_tokens_that_a_model_puts_in_a_row_are_found():
    """OPT's FFN reads the tokens of all samples as one matrix."""
    model = FAMILIES["opt"].model()
    groups = pk.discover(model)
    units = [g for g in groups.of_kind("ffn_channel") if g.layer == 0]
    table = written_by(model, units, TOKENS[:1], position=4, channel=3)
    read = {}
    consumer = model.get_submodule(units[0].members[-1].parameter.rpartition(".")[0])
    hook = consumer.register_forward_pre_hook(lambda module, args: read.update(x=args[0].reshape(1, 16, -1)[0, 4]))
    with torch.no_grad():
        model(TOKENS[:1])
    hook.remove()
    expected = (read["x"] * consumer.weight[3]).detach()
    assert torch.allclose(torch.tensor(table.sort_values("unit")["written"].to_numpy()), expected)


def test_a_negative_peak_has_shares_that_are_positive(model):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[5, 7] = -1e6
    first = pk.massive_activations(model, pk.discover(model), TOKENS).writers.iloc[0]
    assert first["unit"] == 7 and first["share"] == pytest.approx(1, abs=0.01)


def test_a_second_batch_counts_on(model, monkeypatch):
    whole = pk.massive_activations(model, pk.discover(model), TOKENS).layers
    monkeypatch.setattr("prunekit.knowledge.massive.in_batches", lambda tokens: tokens.split(1))
    parts = pk.massive_activations(model, pk.discover(model), TOKENS).layers
    assert parts["largest"].tolist() == pytest.approx(whole["largest"].tolist())
    assert parts[["position", "channel"]].equals(whole[["position", "channel"]])
    assert parts["attention_to_first"].tolist() == pytest.approx(whole["attention_to_first"].tolist())


def test_a_model_without_whole_layers_is_refused(model):
    groups = pk.discover(model)
    with pytest.raises(pk.PrunekitError, match="0 whole layers were discovered"):
        pk.massive_activations(model, groups.without(g.name for g in groups.of_kind("layer")), TOKENS)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "bloom", "mixtral", "gemma3"])
def test_other_families(name):
    model = FAMILIES[name].model()
    found = pk.massive_activations(model, pk.discover(model), TOKENS)
    assert found.layers["attention_to_first"].between(0, 1).all() and len(found.writers) > 0


def test_a_planted_unit_is_found_and_attention_to_the_first_token_measured(model):
    plain = pk.massive_activations(model, pk.discover(model), TOKENS)
    layer = model.model.layers[1]
    with torch.no_grad():
        layer.mlp.down_proj.weight[5, 7] = 1e6
    groups = pk.discover(model)
    found = pk.massive_activations(model, groups, TOKENS)
    assert found.layer == 1 and found.n_tokens == TOKENS.numel()
    assert found.layers.loc[1, "channel"] == 5
    first = found.writers.iloc[0]
    assert (first["group"], first["unit"]) == ("model.layers.1.mlp:ffn_channel", 7)
    assert found.layers.loc[1, "n_massive"] > 0 == plain.layers.loc[1, "n_massive"]
    with ablated(model, groups["model.layers.1.mlp:ffn_channel"], [7]):
        assert pk.massive_activations(model, groups, TOKENS).layers.loc[1, "n_massive"] == 0
    after = streams(model, TOKENS)[1].abs()
    assert found.layers.loc[0, "largest"] == pytest.approx(float(after.max()))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = model(TOKENS, output_attentions=True).attentions
    shares = [float(w[:, :, 8:, 0].mean()) for w in attention]
    assert found.layers["attention_to_first"].tolist() == pytest.approx(shares)
    assert "unit 7 of" in repr(found) and "<table" in found._repr_html_()


def test_a_layer_can_be_asked_for(model):
    found = pk.massive_activations(model, pk.discover(model), TOKENS, layer=1)
    assert set(found.writers["group"]) == {"model.layers.1.mlp:ffn_channel", "model.layers.1.self_attn:kv_head"}


@pytest.mark.parametrize(
    ("tokens", "layer", "said"),
    [(TOKENS[:, :8], None, "8 tokens; give more than 8"), (TOKENS, 9, "layer=9 is not in the model; give one of 0, 1")],
)
def test_what_cannot_be_is_refused(model, tokens, layer, said):
    with pytest.raises(pk.PrunekitError, match=said):
        pk.massive_activations(model, pk.discover(model), tokens, layer=layer)
