"""Scores and pruned sets must be those of LLM-Pruner's own code on its small LLaMA."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from shared import shared_path
from test_importance import llama_groups
from transformers import LlamaConfig, LlamaForCausalLM

from prunekit.importance import Magnitude, Taylor, score

LAYERS, HEADS, D_HEAD = 4, 4, 32
VARIANTS = {
    "param_first": Taylor("element", "first"),
    "param_second": Taylor("element", "second"),
    "param_mix": Taylor("element", "mixed"),
    "vectorize": Taylor("vector", "first"),
    "param_first+mean": Taylor(reduction="mean"),
    "param_first+max": Taylor(reduction="max"),
    "param_first+prod": Taylor(reduction="prod"),
    "param_first+first": Taylor(reduction="first"),
    "param_first+second": Taylor(reduction="second"),
    "l1": Magnitude(1),
    "l2": Magnitude(2),
}


@pytest.fixture(scope="module")
def oracle():
    with np.load(shared_path("oracles", "llm_pruner", "scores.npz"), allow_pickle=False) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        hidden_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=344,
        vocab_size=800,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    weights = load_file(shared_path("oracles", "llm_pruner", "model.safetensors"))
    print(model.load_state_dict(weights, strict=True))
    return model


def worst_difference(scores, oracle, variant):
    """Largest relative difference over all groups of a variant."""
    worst = 0.0
    for layer in range(LAYERS):
        for ours, theirs in (("self_attn:kv_head", "self_attn.q_proj"), ("mlp:ffn_channel", "mlp.gate_proj")):
            expected = oracle[f"{variant}/model.layers.{layer}.{theirs}"]
            actual = scores[f"model.layers.{layer}.{ours}"].double()
            worst = max(worst, float(((actual - expected) / expected).abs().max()))
    return worst


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_agree_with_the_reference(model, oracle, variant):
    scores = score(model, llama_groups(model), VARIANTS[variant], oracle["calib_ids"])
    worst = worst_difference(scores, oracle, variant)
    print(f"{variant}: largest relative difference {worst:.1e}")
    assert worst < (1e-3 if variant == "vectorize" else 1e-5)


def test_the_same_units_are_pruned(model, oracle):
    scores = score(model, llama_groups(model), VARIANTS["param_first"], oracle["calib_ids"])
    for layer in range(LAYERS):
        head = scores[f"model.layers.{layer}.self_attn:kv_head"].argsort()[: HEADS // 4]
        rows = (head[:, None] * D_HEAD + torch.arange(D_HEAD)).flatten().sort().values
        assert rows.equal(oracle[f"pruned_idx/model.layers.{layer}.self_attn.q_proj"].sort().values)
        channels = scores[f"model.layers.{layer}.mlp:ffn_channel"].argsort()[: 344 // 4].sort().values
        assert channels.equal(oracle[f"pruned_idx/model.layers.{layer}.mlp.gate_proj"].sort().values)
