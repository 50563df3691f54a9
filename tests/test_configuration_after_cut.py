"""After a cut, configuration and modules agree: `transformers` and peft save the model exactly, or refuse by name."""

import copy
import json

import pytest
import torch
from evaluation_helpers import llama
from families import FAMILIES, logits, plan_keeping
from other_families import UNLISTED
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

import prunekit as pk

NAMES = (
    "llama_gqa", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "mistral", "phi3", "gpt2", "gpt_neox", "opt", "bloom",
    "mixtral", "qwen2_moe", "olmo", "qwen3_moe", "gpt_oss",
)  # fmt: skip
FORMS = ("channels", "heads", "experts", "layer", "hidden", "vocabulary", "uneven")
# What a family's configuration has no field for, or does not take: heads that do not divide the hidden size.
UNSAID = {
    *((name, "uneven") for name in NAMES),
    ("bloom", "channels"), ("gpt_neox", "heads"), ("gpt2", "heads"), ("opt", "heads"), ("bloom", "heads"),
}  # fmt: skip


def cut(name, form):
    """A model of which a half of these units is left, in every layer alike unless it is uneven."""
    model = {**FAMILIES, **UNLISTED}[name].model(dtype=torch.float32)
    groups = pk.discover(model)
    kinds = {"heads": "kv_head", "uneven": "ffn_channel", "channels": "ffn_channel", "experts": "expert"}
    chosen = groups.of_kind(kinds.get(form, form))
    if not chosen:
        pytest.skip(f"no {form} in {name}")
    keep = {g.name: list(range(1, 1 + g.n_units // 2 - (form == "uneven") * g.layer)) for g in chosen}
    return pk.prune(model, plan_keeping(groups, {chosen[0].name: []} if form == "layer" else keep))
