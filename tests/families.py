"""Tiny random models of the families that must be found whole, with the units that their configurations imply.

What is not a number in the options of a model is told beside them.
"""

import random
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from prunekit.discovery import Groups, discover
from prunekit.pruning import PruningPlan

Units = dict[str, tuple[int, ...]]  # kind → units of each group; "~" behind a kind: inexact
Options = dict[str, object]

VOCABULARY = 48
ALIGNMENT = 64  # bytes, of the memory that torch allocates on CPUs
COMMON = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": VOCABULARY}
COUNTED = ("kv_head", "query_head", "expert", "ffn_channel", "rank", "hidden", "block", "layer")
BOTH, EAGER = ("eager", "sdpa"), ("eager",)


@dataclass(frozen=True, eq=False)
class Family:
    """A model and what its configuration implies.

    Attributes:
        name: of the family and its variant.
        build: attention implementation → model.
        layers: the units in each layer.
        spanning: the units that lie in no one layer.
        attentions: implementations that the family has.
        dtype: that it runs in and is compared in.
        tolerance: relative difference that rounding may make.
        ordered: True where every head has a slope (ALiBi) or a norm of its own, so that heads cannot change places.
        locked: piece of a parameter's name → piece of the reason that must be given for it.
    """

    name: str
    build: Callable[[str], nn.Module]
    layers: tuple[Units, ...]
    spanning: Units = field(default_factory=lambda: {"hidden~": (64,)})
    attentions: tuple[str, ...] = BOTH
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-12
    ordered: bool = False
    locked: dict[str, str] = field(default_factory=dict)

    def model(self, attention: str = "sdpa", dtype: torch.dtype | None = None) -> nn.Module:
        """Random weights, norms, biases and stored buffers, so that nothing is right by accident."""
        torch.manual_seed(7)
        model = self.build(attention if attention in self.attentions else "eager").to(dtype or self.dtype).eval()
        if hasattr(model, "config"):
            model.config._experts_implementation = "eager"  # the others have no float64, and no odd widths
        stored = [b for b in model.state_dict(keep_vars=True).values() if not b.requires_grad and b.is_floating_point()]
        for tensor in (*model.parameters(), *stored):
            with torch.no_grad():
                tensor.add_(torch.randn_like(tensor) * 0.05)
        return model

    @cache  # noqa: B019 - lives as long as the session
    def groups(self, attention: str = "sdpa") -> Groups:
        """What discovery finds; found once."""
        return discover(self.model(attention))

    def implied(self) -> dict[int | None, Units]:
        """Layer → units, by the configuration; None for what lies in no one layer."""
        return {None: _tidy(self.spanning), **{i: _tidy(units) for i, units in enumerate(self.layers)}}

    def repeats(self) -> int:
        """Query heads of each KV head, by the configuration."""
        units = {kind.rstrip("~"): n for kind, n in {**self.spanning, **self.layers[-1]}.items() if n}
        return units["query_head"][0] // units["kv_head"][0] if "query_head" in units else 1


def _tidy(units: Units) -> Units:
    return {kind: tuple(sorted(sizes)) for kind, sizes in units.items() if sizes}


def found(groups: Groups) -> dict[int | None, Units]:
    """Layer → units, as discovered, of the kinds that configurations imply."""
    units: dict[int | None, Units] = {layer: {} for layer in (None, 0, 1)}
    for g in groups.of_kind(*COUNTED):
        kind = g.kind + ("" if g.exact else "~")
        units[g.layer][kind] = (*units[g.layer].get(kind, ()), g.n_units)
    return {layer: _tidy(kinds) for layer, kinds in units.items()}


MHA = {**COMMON, "intermediate_size": 96}
GQA = {**MHA, "num_key_value_heads": 4}
MQA = {**MHA, "num_key_value_heads": 1}
SIZED = {**GQA, "head_dim": 8}
PADDED = {"pad_token_id": 0}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 8, "vocab_size": VOCABULARY, "n_positions": 64}
# hidden = FFN = vocabulary, heads = head size: nothing can be told apart by its size
EQUAL = {"intermediate_size": 64, "vocab_size": 64}
FALCON = {**MHA, "ffn_hidden_size": 96, "alibi": False, "new_decoder_architecture": False}
EXPERTS = {"num_experts_per_tok": 2}
LOCAL = {**EXPERTS, "num_local_experts": 4}
ROUTED = {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 40}

MULTI_QUERY: Units = {"kv_head": (1,), "query_head": (8,)}
FOUR_EXPERTS: Units = {"expert~": (4,)}
NO_LAYER: Units = {"block": (1,)}  # the FFN is no module of its own
HEADS = ("kv_head", "query_head")


def native(
    name: str,
    model_type: str,
    options: Options,
    units: Units | None = None,
    *,
    last: Units | None = None,
    spanned: Iterable[str] = (),
    **details: object,
) -> Family:
    """A family that transformers carries.

    Args:
        name: of family and variant.
        model_type: as in its configuration.
        options: of its configuration.
        units: in each layer, where the options do not say so by the usual names.
        last: in the last layer, where it differs.
        spanned: kinds over whose units a norm takes its statistics, so that they are inexact.
        details: of the `Family`.
    """

    def build(attention: str) -> nn.Module:
        config = AutoConfig.for_model(model_type, **options)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention)

    kv = options.get("num_key_value_heads", 8)
    sizes = {"kv_head": (kv,), "query_head": (8,) if kv < 8 else (), "block": (1, 1), "layer": (1,),
             "ffn_channel": (options.get("intermediate_size", 4 * 64),), **(units or {})}  # fmt: skip
    layers = ({f"{kind}~" if kind in spanned else kind: n for kind, n in {**sizes, **more}.items()}
              for more in ({}, last or {}))  # fmt: skip
    return Family(name, build, tuple(layers), **details)


def wrapped(family: Family, targets: list[str], rank: int = 4) -> Family:
    """The family with a LoRA adapter over these layers."""
    config = LoraConfig(r=rank, target_modules=targets, init_lora_weights=False)
    layers = tuple({**units, "rank": (rank,) * len(targets)} for units in family.layers)
    return replace(
        family, name=f"{family.name.split('_')[0]}_peft", layers=layers,
        build=lambda attention: get_peft_model(family.build(attention), replace(config)),
    )  # fmt: skip


def named(*families: Family) -> dict[str, Family]:
    """Families by name."""
    return {family.name: family for family in families}


LLAMA = native("llama_gqa", "llama", GQA)
GPT2 = native("gpt2", "gpt2", GPT)
PHI3 = native("phi3", "phi3", {**GQA, **PADDED})
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

FAMILIES = named(
    native("llama_mha", "llama", MHA),
    LLAMA,
    native("llama_mqa", "llama", MQA),
    native("llama_tied", "llama", {**MHA, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    native("llama_biased", "llama", {**MHA, "attention_bias": True, "mlp_bias": True}),
    native("llama_equal", "llama", {**MHA, **EQUAL}),
    native("mistral", "mistral", SIZED),
    native("qwen2", "qwen2", {**GQA, "tie_word_embeddings": True}),
    native("qwen2_mha", "qwen2", {**MHA, "num_key_value_heads": 8}),
    native("qwen2_mqa", "qwen2", MQA),
    native("qwen3", "qwen3", SIZED),
    native("qwen3_equal", "qwen3", {**SIZED, **EQUAL}),
    native("gemma", "gemma", SIZED),
    native("gemma_mqa", "gemma", {**SIZED, **MQA}),
    native("gemma2", "gemma2", SIZED, attentions=EAGER),
    native("gemma3", "gemma3_text", SIZED),
    native("phi", "phi", MHA),
    native("phi_gqa", "phi", {**GQA, "qk_layernorm": True}),
    native("phi3_mha", "phi3", {**MHA, **PADDED}),
    PHI3,
    native("phi3_equal", "phi3", {**MHA, **EQUAL, **PADDED}),
    native("phi3_mqa", "phi3", {**MQA, **PADDED}),
    GPT2,
    native("gpt2_equal", "gpt2", {**GPT, "n_inner": 64, "vocab_size": 64}, {"ffn_channel": (64,)}),
    native("gptj", "gptj", {**GPT, "rotary_dim": 4}, attentions=EAGER),
    native("bigcode", "gpt_bigcode", GPT, MULTI_QUERY),
    native("bigcode_mha", "gpt_bigcode", {**GPT, "multi_query": False}),
    native("opt", "opt", {**COMMON, "ffn_dim": 96, "max_position_embeddings": 64},
           {"ffn_channel": (96,), **NO_LAYER}),
    native("opt_projected", "opt", {**COMMON, "ffn_dim": 96, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
           {"ffn_channel": (96,), **NO_LAYER}, spanning={"hidden~": (64,), "hidden": (32,)}),
    native("bloom", "bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 8, "vocab_size": VOCABULARY},
           attentions=EAGER, ordered=True),
    native("gpt_neox", "gpt_neox", MHA),
    native("gpt_neox_serial", "gpt_neox", {**MHA, "use_parallel_residual": False, "tie_word_embeddings": True}),
    native("falcon", "falcon", {**FALCON, "multi_query": True}, MULTI_QUERY),
    # heads lie between the key and value of their group: no query head can go without making that tensor ragged
    native("falcon_new", "falcon", {**FALCON, "num_kv_heads": 4, "new_decoder_architecture": True},
           {"kv_head": (4,)}),
    native("falcon_mha", "falcon", {**FALCON, "multi_query": False, "parallel_attn": False, "bias": True}),
    native("falcon_alibi", "falcon", {**FALCON, "alibi": True, "multi_query": False, "parallel_attn": False},
           ordered=True),
    native("glm", "glm", {**SIZED, **PADDED}),
    native("glm4", "glm4", {**SIZED, **PADDED}),
    native("olmo", "olmo", GQA),
    native("olmo2", "olmo2", GQA, spanned=HEADS),
    native("stablelm", "stablelm", GQA),
    native("stablelm_qk", "stablelm", {**GQA, "qk_layernorm": True, "use_parallel_residual": True}, ordered=True),
    native("cohere", "cohere", GQA),
    native("cohere_qk", "cohere", {**GQA, "use_qk_norm": True}),
    native("granite", "granite", GQA),
    native("starcoder2", "starcoder2", GQA),
    native("smollm3", "smollm3", {**SIZED, **PADDED}),
    native("mpt", "mpt", {"d_model": 64, "n_layers": 2, "n_heads": 8, "vocab_size": VOCABULARY, "max_seq_len": 64},
           attentions=EAGER, ordered=True),
    native("mixtral", "mixtral", {**GQA, **LOCAL}, FOUR_EXPERTS),
    native("qwen2_moe", "qwen2_moe", {**GQA, **ROUTED, "shared_expert_intermediate_size": 56},
           {**FOUR_EXPERTS, "ffn_channel": (40, 56)}),
    wrapped(LLAMA, LINEAR),
    wrapped(PHI3, ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    wrapped(GPT2, ["c_attn", "c_fc"]),
)  # fmt: skip


def tokens(batch: int = 2, seq: int = 9) -> Tensor:
    """Random token ids (batch, seq)."""
    return torch.randint(0, VOCABULARY, (batch, seq), generator=torch.Generator().manual_seed(3))


def plan_keeping(groups: Groups, keep: dict[str, list[int]]) -> PruningPlan:
    """A plan that keeps these units, its parameter counts left unsaid."""
    return PruningPlan(keep, {name: groups[name].n_units for name in keep}, groups.n_parameters, groups.n_parameters)


def random_units(family: Family, groups: Groups, seed: int, share: float | None = None) -> dict[str, list[int]]:
    """Units to keep of every group of heads and channels that is exact: a random number of them, or all but a share.

    Heads are KV heads with all that is theirs, or query heads, as many of each KV head.
    """
    rng, keep = random.Random(seed), {}
    heads = rng.choice([kind for kind in HEADS if any(g.n_units > 1 and g.exact for g in groups.of_kind(kind))] or [""])
    for g in groups.of_kind(heads, "ffn_channel"):
        size = family.repeats() if g.kind == "query_head" else g.n_units
        n = max(1, round(size * (1 - share))) if share else rng.randint(1, size)
        if g.exact and g.n_units > 1:
            keep[g.name] = [
                start + u for start in range(0, g.n_units, size) for u in sorted(rng.sample(range(size), n))
            ]
    return keep


def zero_units(model: nn.Module, groups: Groups, plan: PruningPlan) -> nn.Module:
    """Zero in place all that a plan removes, read from the groups alone."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in plan.keep:
            for member in groups[name].members:
                index = member.index[plan.removed(name)].flatten()
                parameters[member.parameter].index_fill_(member.dim, index, 0)
    return model


class Unrounded(TorchDispatchMode):
    """While open, what a model would cast to float32, as most do in norms and some in attention, becomes float64."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: Options | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket is torch.ops.aten.bmm:  # in older rotary embeddings one factor stays float32
            args = tuple(arg.double() for arg in args)
        return func(*args, **kwargs | ({"dtype": torch.float64} if kwargs.get("dtype") is torch.float32 else {}))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Logits (batch, seq, vocabulary) on `tokens()`, without a cache; of a model of float64, in that from end to end.

    Weights that were mapped from a file are first moved to where torch would have put them: in what order a kernel sums
    may depend on how its operands are aligned.
    """
    for p in model.parameters():
        p.data = p.data.clone() if p.data_ptr() % ALIGNMENT else p.data
    with Unrounded() if next(model.parameters()).dtype == torch.float64 else nullcontext():
        return model(tokens(), **({"use_cache": False} if hasattr(model, "config") else {})).logits


@torch.no_grad()
def continued(model: nn.Module, use_cache: bool) -> Tensor:
    """Logits (batch, step, vocabulary) while a model goes on by itself with two prompts, the second padded."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    out = model.generate(
        input_ids=tokens(2, 5), attention_mask=mask, use_cache=use_cache,
        output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    return torch.stack(out.logits, 1)


def relative_difference(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a - b).norm() / b.norm())
