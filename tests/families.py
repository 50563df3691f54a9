"""Tiny random models of every family under test, with what their configurations imply."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from prunekit.discovery import Groups
from prunekit.pruning import PruningPlan

VOCABULARY = 48
COMMON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": VOCABULARY}


@dataclass(frozen=True)
class Family:
    """A model builder and the number of units in each layer that its configuration implies."""

    name: str
    build: Callable[[str], nn.Module]
    kv_heads: int | None
    query_heads: int | None
    channels: int
    hidden: tuple[int, ...] = (64,)
    ranks: int = 0

    def model(self, attention: str = "sdpa", dtype: torch.dtype = torch.float64) -> nn.Module:
        """Random weights, norms and biases too, so that nothing is right by accident."""
        torch.manual_seed(7)
        model = self.build(attention).to(dtype).eval()
        for p in model.parameters():
            with torch.no_grad():
                p.add_(torch.randn_like(p) * 0.05)
        return model


def _llama(**changes: object) -> Callable[[str], nn.Module]:
    options = {**COMMON, "intermediate_size": 96, **changes}
    return lambda attention: LlamaForCausalLM(LlamaConfig(**options, attn_implementation=attention))


def _peft(attention: str) -> nn.Module:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    return get_peft_model(_llama(num_key_value_heads=4)(attention), config)


def _opt(width: int) -> Callable[[str], nn.Module]:
    options = {**COMMON, "ffn_dim": 96, "word_embed_proj_dim": width, "max_position_embeddings": 64}
    return lambda attention: OPTForCausalLM(OPTConfig(**options, attn_implementation=attention))


def _qwen3(attention: str) -> nn.Module:
    options = {**COMMON, "intermediate_size": 96, "num_key_value_heads": 4, "head_dim": 8}
    return Qwen3ForCausalLM(Qwen3Config(**options, attn_implementation=attention))


def _gpt2(attention: str) -> nn.Module:
    options = {"n_embd": 64, "n_layer": 2, "n_head": 8, "vocab_size": VOCABULARY, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**options, attn_implementation=attention))


def _bloom(attention: str) -> nn.Module:
    return BloomForCausalLM(BloomConfig(hidden_size=64, n_layer=2, n_head=8, vocab_size=VOCABULARY))


def _neox(attention: str) -> nn.Module:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**COMMON, intermediate_size=96, attn_implementation=attention))


FAMILIES = {
    family.name: family
    for family in (
        Family("llama_mha", _llama(), 8, None, 96),
        Family("llama_gqa", _llama(num_key_value_heads=4), 4, 8, 96),
        Family("llama_mqa", _llama(num_key_value_heads=1), None, 8, 96),
        Family("llama_tied", _llama(num_key_value_heads=2, tie_word_embeddings=True), 2, 8, 96),
        Family("llama_biased", _llama(attention_bias=True, mlp_bias=True), 8, None, 96),
        # hidden = FFN = vocabulary, heads = head size: nothing can be told apart by its size
        Family("llama_equal", _llama(intermediate_size=64, vocab_size=64), 8, None, 64),
        Family("qwen3", _qwen3, 4, 8, 96),
        Family("gpt2", _gpt2, 8, None, 256),
        Family("opt", _opt(64), 8, None, 96),
        Family("opt_projected", _opt(32), 8, None, 96, hidden=(32, 64)),
        Family("bloom", _bloom, None, None, 256),
        Family("gpt_neox", _neox, 8, None, 96),
        Family("llama_peft", _peft, 4, 8, 96, ranks=4),
    )
}


def tokens(batch: int = 2, seq: int = 9) -> Tensor:
    """Random token ids (batch, seq)."""
    return torch.randint(0, VOCABULARY, (batch, seq), generator=torch.Generator().manual_seed(3))


def plan_keeping(groups: Groups, keep: dict[str, list[int]]) -> PruningPlan:
    """A plan that keeps these units, its parameter counts left unsaid."""
    return PruningPlan(keep, {name: groups[name].n_units for name in keep}, groups.n_parameters, groups.n_parameters)


def zero_units(model: nn.Module, groups: Groups, plan: PruningPlan) -> nn.Module:
    """Zero in place all that a plan removes, read from the groups alone."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in plan.keep:
            for member in groups[name].members:
                index = member.index[plan.removed(name)].flatten()
                parameters[member.parameter].index_fill_(member.dim, index, 0)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Logits (batch, seq, vocabulary) on `tokens()`."""
    return model(tokens()).logits


def relative_difference(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a - b).norm() / b.norm())
