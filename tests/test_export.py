"""Exports that load without prunekit, shards in and out, and what travels along."""

import json
import random

import pytest
import torch
from checkpoint_helpers import cut, same_cut
from evaluation_helpers import byte_tokenizer, llama
from families import FAMILIES, GQA, MHA, ROUTED, logits, plan_keeping, relative_difference
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import prunekit as pk


def kept(model, kind, counts):
    """A model with these many units left in each layer, drawn at random."""
    groups, rng = pk.discover(model), random.Random(1)
    keep = {g.name: sorted(rng.sample(range(g.n_units), n)) for g, n in zip(groups.of_kind(kind), counts, strict=True)}
    return pk.prune(model, plan_keeping(groups, keep))


def test_padding_goes_no_wider_than_the_widest_layer(tmp_path):
    small = kept(FAMILIES["llama_mha"].model(), "ffn_channel", [17, 40])
    pk.export(small, tmp_path / "out", layout="padded")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights["model.layers.0.mlp.down_proj.weight"].shape == (64, 40)
    assert not weights["model.layers.0.mlp.down_proj.weight"][:, 17:].any()
    padded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert relative_difference(logits(padded), logits(small)) < FAMILIES["llama_mha"].tolerance


def test_padding_takes_the_next_head_count_that_the_family_reads(tmp_path):
    """Three heads do not divide a hidden size of 64, which LLaMA refuses; four do."""
    small = kept(FAMILIES["llama_mha"].model(), "kv_head", [3, 3])
    pk.export(small, tmp_path / "out", layout="padded")
    padded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert padded.config.num_attention_heads == 4 and torch.allclose(logits(padded), logits(small), rtol=1e-12)
    with pytest.raises(pk.PrunekitError, match=r"widths \(kv_head: 3 of 8 in each layer\); .*--layout padded"):
        pk.export(small, tmp_path / "plain")


def test_what_zeros_would_change_is_refused(tmp_path):
    """RMSNorm divides by the number of hidden channels, zeros included."""
    small = kept(FAMILIES["llama_mha"].model(), "hidden", [60])
    with pytest.raises(pk.PrunekitError, match="cannot be padded: its logits would change"):
        pk.export(small, tmp_path / "out", layout="padded")
    pk.save(small, tmp_path / "own")
    assert torch.equal(logits(pk.load(tmp_path / "own")[0]), logits(small)) and not (tmp_path / "out").exists()


def test_widths_beyond_heads_and_channels_are_said_where_the_family_can(tmp_path):
    small = kept(FAMILIES["llama_mha"].model(), "hidden", [56])  # eight heads divide it
    pk.export(small, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.config.hidden_size == 56 and torch.equal(logits(plain), logits(small))


def cut_by(model, keep):
    return pk.prune(model, plan_keeping(pk.discover(model), keep))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_neox", "stablelm"])  # six dimensions do not turn; no eight heads stand to six
def test_dimensions_of_heads_are_not_said_as_numbers_of_heads(name, tmp_path):
    model = FAMILIES[name].model(dtype=torch.float32)
    groups = [g for g in pk.discover(model).of_kind("head_dim") if g.n_units == 6]
    small = cut_by(model, {g.name: list(range(5 - g.layer)) for g in groups})
    pk.save(small, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["per_layer_config"] == {}
    assert torch.equal(logits(pk.load(tmp_path / "out")[0]), logits(small))


@pytest.mark.slow
def test_layers_and_blocks_that_went_are_saved_as_never_there_or_as_skipped(tmp_path):
    """Cuts made before a layer goes are told under the names that its followers have after."""
    one = cut_by(llama(num_hidden_layers=4), {"model.layers.2.mlp:ffn_channel": list(range(9))})
    two = cut_by(one, {"model.layers.1:layer": []})
    three = cut_by(two, {"model.layers.2.self_attn:block": [], "model.layers.1.mlp:ffn_channel": [1, 2, 5]})
    pk.save(three, tmp_path / "own")
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    assert config["per_layer_config"] == {"1": {"intermediate_size": 3}, "2": {"skip": ["self_attn"]}}
    again = pk.load(tmp_path / "own")[0]
    assert len(again.model.layers) == 3 and torch.equal(logits(again), logits(three))
    pk.export(again, tmp_path / "padded", layout="padded")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "padded")
    assert torch.allclose(logits(plain), logits(three), atol=1e-5)


def test_a_model_without_some_of_its_layers_is_a_plain_checkpoint(tmp_path):
    small = cut_by(llama(num_hidden_layers=4), {"model.layers.0:layer": [], "model.layers.2:layer": []})
    pk.save(small, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.config.num_hidden_layers == 2 and torch.equal(logits(plain), logits(small))


NUMBERED = {
    "gpt2": {"n_embd": 64, "n_layer": 5, "n_head": 8, "scale_attn_by_inverse_layer_idx": True, "n_positions": 64},
    "diffllama": {"intermediate_size": 96},
    "qwen2_moe": {**ROUTED, "shared_expert_intermediate_size": 56, "mlp_only_layers": [0, 3]},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NUMBERED)
def test_what_follows_from_a_layers_number_stays_when_layers_go_in_two_cuts(name, tmp_path):
    """Scales, and lists of numbers of layers, are those of the model that has all its layers."""
    options = {**GQA, "num_hidden_layers": 5, **NUMBERED[name]}
    small = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **options)).eval()
    small.config._experts_implementation = "eager"
    for gone in (1, 0):
        groups = pk.discover(small)
        (layer,) = [g.name for g in groups.of_kind("layer") if g.layer == gone]
        ffn = next(g.name for g in groups.of_kind("ffn_channel") if g.layer == 2)
        small = pk.prune(small, plan_keeping(groups, {layer: [], ffn: list(range(8 * (gone + 1)))}))
    pk.save(small, tmp_path / "out")
    assert torch.equal(logits(pk.load(tmp_path / "out")[0]), logits(small))
    said = json.loads((tmp_path / "out" / "config.json").read_text())["per_layer_config"]
    assert [said[number] for number in "01"] == [{"skip": ["layer"]}] * 2 and list(said) == ["0", "1", "2", "3"]


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [[2, 5, *range(9, 40)], range(30)])  # from the middle and the end, from the end
def test_a_vocabulary_that_went_along_with_an_uneven_cut_is_saved(tokens, tmp_path):
    model = llama(vocab_size=48, bos_token_id=5, eos_token_id=[7, 9], pad_token_id=2)
    small = cut_by(cut_by(model, {"vocabulary": list(tokens), "model.layers.0.mlp:ffn_channel": list(range(9))}),
                   {"vocabulary": list(range(20)), "model.layers.1.mlp:ffn_channel": [0, 3]})  # fmt: skip
    pk.save(small, tmp_path / "own")
    pk.export(small, tmp_path / "padded", layout="padded")
    for folder in ("own", "padded"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        ids = torch.arange(20)[None]
        assert torch.allclose(again(ids).logits, small(ids).logits, atol=1e-5) and again.config.vocab_size == 20
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        assert all(getattr(again.config, name) == getattr(small.config, name) for name in names)
    assert json.loads((tmp_path / "own" / "config.json").read_text())["base_config"]["vocab_size"] == 48


@pytest.mark.slow
def test_a_tied_vocabulary_of_another_family_too(tmp_path):
    cuts = {"transformer.wte:vocabulary": list(range(4, 40)), "transformer.h.0.mlp:ffn_channel": list(range(9))}
    small = cut_by(FAMILIES["gpt2"].model(dtype=torch.float32), cuts)
    pk.save(small, tmp_path / "own")
    again, ids = pk.load(tmp_path / "own")[0], torch.arange(36)[None]
    assert torch.equal(again(ids).logits, small(ids).logits) and again.config.vocab_size == 36


@pytest.mark.slow
@pytest.mark.parametrize("ffn", [{}, {"model.layers.0.mlp:ffn_channel": list(range(9))}])
def test_special_tokens_go_where_the_family_wants_a_number(ffn, tmp_path):
    options = {"pad_token_id": 3, "bos_token_id": 4, "cls_token_id": 4, "sep_token_id": 40}
    config = AutoConfig.for_model("modernbert-decoder", **MHA, **options)
    small = cut_by(AutoModelForCausalLM.from_config(config).eval(), {"vocabulary": list(range(3, 30)), **ffn})
    pk.save(small, tmp_path / "out")
    again, ids = pk.load(tmp_path / "out")[0], torch.arange(27)[None]
    assert torch.equal(again(ids).logits, small(ids).logits)
    assert [getattr(again.config, name) for name in options] == [0, 1, 1, -1]


@pytest.mark.parametrize("layout", ["plain", "padded"])
def test_an_even_model_is_exported_as_it_is(layout, tmp_path):
    small = same_cut("qwen3", False)
    pk.export(small, tmp_path / "out", layout=layout)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert plain.num_parameters() == small.num_parameters() and torch.equal(logits(plain), logits(small))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A plain checkpoint of its family" in card and "filled up with zeros" not in card
    assert ("nothing had to be filled up" in card) == (layout == "padded")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keep", "said"),
    [
        ({"model.layers.0.mlp:ffn_channel": range(9)}, ["ffn_channel: 9 to 96 of 96 in each layer"]),
        ({"model.layers.0.self_attn:block": (), "model.layers.0.mlp:block": ()}, ["self_attn: 1 went", "mlp: 1 went"]),
        (
            {f"model.layers.{layer}.self_attn:head_dim": range(3) for layer in (0, 1)},
            ["head_dim: 3 of 4 in each layer"],
        ),
        (
            {"model.layers.0.self_attn:block": (), "model.layers.1.mlp:ffn_channel": range(7)},
            ["ffn_channel: 7 to 96 of 96 in each layer", "self_attn: 1 went"],
        ),
    ],
)
def test_the_card_says_which_widths_the_family_has_no_words_for(keep, said, tmp_path):
    small = cut_by(FAMILIES["llama_mha"].model(), {name: list(units) for name, units in keep.items()})
    pk.save(small, tmp_path / "own")
    assert f"cannot express its widths ({'; '.join(said)}), so" in (tmp_path / "own" / "README.md").read_text()
    assert json.loads((tmp_path / "own" / "config.json").read_text())["not_plain"] == said


@pytest.mark.slow
def test_half_precision_is_padded_within_its_own_rounding(tmp_path):
    small = cut("gpt2", uneven=True, dtype=torch.bfloat16)
    pk.export(small, tmp_path / "out", layout="padded")
    padded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert padded.dtype == torch.bfloat16 and (logits(padded) - logits(small)).norm() < 0.03 * logits(small).norm()


def test_saving_leaves_the_model_as_it_was(tmp_path):
    small = cut("llama_gqa", uneven=True).train()
    stages, before = small.config.prunekit, {n: p.clone() for n, p in small.named_parameters()}
    pk.save(small, tmp_path / "own")
    pk.export(small, tmp_path / "padded", layout="padded")
    assert small.training and small.config.prunekit == stages
    assert all(torch.equal(p, before[n]) for n, p in small.named_parameters())


@pytest.mark.parametrize(("name", "uneven"), [("llama_gqa", True), ("opt", True), ("llama_tied", False)])
def test_shards_go_out_and_come_in(name, uneven, tmp_path):
    small = same_cut(name, uneven)
    pk.save(small, tmp_path / "out", max_shard_size="40KB")
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    names = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(shards) > 2 and set(names.values()) == {p.name for p in shards}
    assert all(p.stat().st_size < 50_000 for p in shards)
    assert torch.equal(logits(pk.load(tmp_path / "out")[0]), logits(small))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), logits(small))


def test_tokenizer_generation_config_plan_and_figures_travel_along(tmp_path):
    model = llama(head_dim=8)
    model.generation_config = GenerationConfig(max_new_tokens=7, bos_token_id=0, eos_token_id=1)
    groups = pk.discover(model)
    plan = pk.plan(groups, pk.score(model, groups, pk.Magnitude()), 0.2, ranking="global")
    small = pk.prune(model, plan)
    report = pk.evaluate(small, byte_tokenizer(), "cost", cost_options={"seq_len": 8})
    pk.save(small, tmp_path / "one", tokenizer=byte_tokenizer(), plan=plan, report=report)
    again, tokenizer = pk.load(tmp_path / "one")
    pk.export(again, tmp_path / "two", layout="padded", plan=plan)  # the tokenizer is found beside the first
    for folder in (tmp_path / "one", tmp_path / "two"):
        padded, words = pk.load(folder)
        assert words("a cat")["input_ids"] == byte_tokenizer()("a cat")["input_ids"] == tokenizer("a cat")["input_ids"]
        assert padded.generation_config.max_new_tokens == 7
        assert pk.PruningPlan.load(folder / "plan.json") == plan
    card = (tmp_path / "one" / "README.md").read_text()
    assert f"| parameters | {plan.n_parameters:,} | {plan.n_parameters_kept:,} |" in card
    assert "ranking: global" in card and "needs prunekit to load" in card and "pk.load(" in card
    assert f"{small.num_parameters():,}" in card and "weight_bytes" in card
    assert pk.Report.load(tmp_path / "one" / "report.json")["parameters"] == small.num_parameters()
    assert "ffn_channel: " in card and "filled up with zeros" in (tmp_path / "two" / "README.md").read_text()


def test_a_card_of_ones_own_takes_the_place_of_the_made_one(tmp_path):
    pk.save(same_cut("llama_gqa", True), tmp_path / "out", files={"README.md": "mine"})
    assert (tmp_path / "out" / "README.md").read_text() == "mine"


def test_generation_with_a_cache_goes_on_alike(tmp_path):
    small = same_cut("gpt2", True)
    pk.save(small, tmp_path / "own")
    pk.export(small, tmp_path / "padded", layout="padded")
    ids = torch.tensor([[3, 5, 7]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = small.generate(ids, **options)
    for folder in ("own", "padded"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert torch.equal(again.generate(ids, **options), expected)


@pytest.mark.parametrize("write", [pk.save, pk.export])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "plan.json"])
def test_a_file_of_ones_own_takes_no_place_of_the_checkpoint(write, name, tmp_path):
    model = llama()
    plan = plan_keeping(pk.discover(model), {})
    with pytest.raises(pk.PrunekitError, match=f"{name}' is a part of the checkpoint itself; give yours another name"):
        write(model, tmp_path / "out", tokenizer=byte_tokenizer(), plan=plan, files={name: "mine"})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [pk.save, pk.export])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": {}}, r"plan=\{\} is not allowed; give a PruningPlan, as plan\(...\)"),
        ({"report": "x"}, r"report='x' is not a Report; give what evaluate\(\)"),
        ({"files": ["a"]}, "is not allowed; give a dictionary, each value a text"),
        ({"files": {"a": 1}}, r"files\['a'\]=1 is not allowed; give a text"),
    ],
)
def test_what_is_no_plan_report_or_text_is_refused(write, options, message, tmp_path):
    with pytest.raises(pk.PrunekitError, match=message):
        write(llama(), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())
