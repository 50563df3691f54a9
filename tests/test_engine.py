"""llama.cpp itself on exported GGUF files: the same tokens as transformers, dense, evenly and unevenly cut."""

import runpy

import pytest
import torch
from evaluation_helpers import llama
from families import plan_keeping
from shared import ROOT
from test_gguf import SCALED, halved, uneven, words

import prunekit as pk

PYTHON = ROOT / ".venv-llamacpp" / "bin" / "python"
NEW_TOKENS = 24
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="needs llama.cpp: make .venv-llamacpp/.installed"),
]
ask = runpy.run_path(str(ROOT / "benchmarks" / "engine_llamacpp.py"))["ask"]


def following(model, prompts):
    """Tokens of highest probability that follow each prompt."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in prompts]


def check_same(model, tokenizer, prompts, folder):
    """Up to where llama.cpp ends a text, which it does before more than one token in five."""
    pk.export(model, folder, layout="gguf", tokenizer=tokenizer)
    theirs = ask(PYTHON, folder / "model.gguf", prompts, NEW_TOKENS)["tokens"]
    ours = following(model, prompts)
    assert [tokens[: len(found)] for tokens, found in zip(ours, theirs, strict=True)] == theirs
    assert sum(map(len, theirs)) > len(prompts) * NEW_TOKENS / 5


def two_of_three_heads():
    """A number of heads that does not divide the hidden size."""
    model = llama(head_dim=8, num_key_value_heads=4)
    groups = pk.discover(model)
    return pk.prune(model, plan_keeping(groups, {g.name: [0, 1, 3] for g in groups.of_kind("kv_head")}))


def fewer_of_all():
    """Layers, hidden channels, query heads and FFN channels."""
    model = llama(head_dim=8, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2)
    groups = pk.discover(model)
    heads = {g.name: [0, 2, 3, 4, 6, 7] if g.layer else [1, 2, 5, 6] for g in groups.of_kind("query_head")}
    keep = {groups.of_kind("hidden")[0].name: list(range(3, 31)), **heads}
    small = pk.prune(model, plan_keeping(groups, keep))
    groups = pk.discover(small)
    return pk.prune(small, plan_keeping(groups, {"model.layers.1:layer": []}))


@pytest.mark.parametrize(
    "make",
    [
        lambda: llama(head_dim=8),
        lambda: llama(head_dim=8, tie_word_embeddings=True),
        lambda: halved(llama(head_dim=8)),
        uneven,
        two_of_three_heads,
        fewer_of_all,
        lambda: halved(llama(head_dim=8, rope_parameters=SCALED["linear"])),
        lambda: uneven(rope_parameters=SCALED["llama3"]),
    ],
    ids=["dense", "tied", "even", "uneven", "odd heads", "of all kinds", "linear rope", "uneven, rope of LLaMA 3"],
)
def test_a_tiny_model_gives_the_same_tokens(make, tmp_path):
    prompts = [[5, 6, 7], [100, 200, 30, 40, 50], [9], list(range(60, 120))]  # the last beyond a rope's first range
    model = make()
    model.resize_token_embeddings(260)
    check_same(model, words(), prompts, tmp_path / "out")


@pytest.mark.parametrize("way", ["even", "uneven"])
def test_a_cut_real_model_gives_the_same_tokens(way, shared, tmp_path):
    model, tokenizer = pk.load(shared / "models" / "stories260K")
    groups = pk.discover(model)
    by = 0 if way == "even" else 1
    keep = {g.name: list(range(1 + by * (g.layer % 2), g.n_units)) for g in groups.of_kind("kv_head", "ffn_channel")}
    texts = ("Once upon a time", "Lily saw a big dog and", "The sun was")
    check_same(pk.prune(model, plan_keeping(groups, keep)), tokenizer, tokenizer(list(texts)).input_ids, tmp_path / "o")
