"""Families that may be locked in part, families that nothing was written for, and all of them together.

Where `locked` says so, `DIFFICULT` and `UNLISTED` ones fail closed.
"""

import torch
from families import (
    EAGER,
    EXPERTS,
    FAMILIES,
    FOUR_EXPERTS,
    GPT,
    GQA,
    HEADS,
    LOCAL,
    MHA,
    MULTI_QUERY,
    NO_LAYER,
    PADDED,
    ROUTED,
    SIZED,
    VOCABULARY,
    named,
    native,
)
from wirings import WIRINGS

PHASED = {**SIZED, **EXPERTS, "n_routed_experts": 4, "moe_intermediate_size": 40, "first_k_dense_replace": 1}

DIFFICULT = named(
    # queries, values and keys of each of four shards lie together
    native("codegen", "codegen", {**GPT, "rotary_dim": 4}, {"kv_head": ()}, attentions=EAGER,
           locked={f"transformer.h.{i}.attn.{name}": "without a rectangular shape"
                   for i in (0, 1) for name in ("qkv_proj.weight[dim 0]", "out_proj.weight[dim 1]")}),
    native("gpt_neo", "gpt_neo", {"hidden_size": 64, "num_layers": 2, "num_heads": 8, "vocab_size": VOCABULARY,
                                  "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64},
           attentions=EAGER),
    # it fills its masks with the smallest float32, so float64 is beyond it; sinusoids tell its channels apart
    native("xglm", "xglm", {"d_model": 64, "num_layers": 2, "attention_heads": 8, "ffn_dim": 96,
                            "vocab_size": VOCABULARY, "max_position_embeddings": 64},
           {"ffn_channel": (96,), **NO_LAYER}, spanning={}, attentions=EAGER, dtype=torch.float32, tolerance=1e-5,
           locked={"model.embed_tokens.weight[dim 1]": "model: is multiplied with or added to a constant"}),
    native("bitnet", "bitnet", GQA, spanned=(*HEADS, "ffn_channel")),
    # the latents of queries, keys and values are normed; experts are chosen in two groups, which must stay as large
    native("deepseek_v3", "deepseek_v3",
           {**MHA, **PHASED, "num_key_value_heads": 8, "n_group": 2, "topk_group": 1, "q_lora_rank": 24,
            "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
           {**MULTI_QUERY, "ffn_channel~": (24, 16)}, last={"ffn_channel": (40, 40)},
           locked={"model.layers.1.mlp.gate.weight[dim 0]": "is chosen from (topk) in 2 groups of 2"}),
    # the same in one group, and positions are chosen by value
    native("deepseek_v32", "deepseek_v32",
           {**MHA, **PHASED, "num_key_value_heads": 8, "n_group": 1, "topk_group": 1, "q_lora_rank": 24,
            "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "index_n_heads": 4,
            "index_head_dim": 16, "index_topk": 4},
           {"kv_head": (), "ffn_channel~": (24, 16)}, last={"ffn_channel": (40, 40), **FOUR_EXPERTS}, attentions=EAGER,
           locked={"model.layers.1.self_attn.indexer.weights_proj.weight[dim 0]": "topk is not understood"}),
    # its residual stream is float32 whatever the model is
    native("mamba", "mamba", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": VOCABULARY, "state_size": 8},
           {"kv_head": (), "ffn_channel": (), "block": (1,)}, attentions=EAGER, dtype=torch.float32, tolerance=1e-5,
           locked={"layers.0.mixer.in_proj.weight[dim 0]": "backbone.layers.0.mixer: convolution is not understood",
                   "layers.1.mixer.x_proj.weight[dim 0]": "backbone.layers.1.mixer.x_proj: is contracted"}),
    native("phimoe", "phimoe", {**GQA, **LOCAL}, {"ffn_channel": (), "block": (1,)}, spanning={},
           locked={"layers.0.mlp.router.weight[dim 0]": "model.layers.0.mlp"}),
)  # fmt: skip

UNLISTED = named(
    native("nemotron", "nemotron", SIZED),
    native("persimmon", "persimmon", MHA),
    native("exaone4", "exaone4", SIZED),
    native("helium", "helium", SIZED),
    native("ernie4_5", "ernie4_5", SIZED),
    native("cohere2", "cohere2", SIZED),
    native("apertus", "apertus", GQA),
    native("arcee", "arcee", GQA),
    native("seed_oss", "seed_oss", SIZED),
    native("hunyuan", "hunyuan_v1_dense", SIZED),
    native("ministral", "ministral", SIZED),
    native("biogpt", "biogpt", MHA, NO_LAYER),
    # sinusoids tell its channels apart
    native("ctrl", "ctrl", {**GPT, "dff": 96}, {"ffn_channel": (96,)}, spanning={}, attentions=EAGER,
           locked={"transformer.w.weight[dim 1]": "transformer: is multiplied with or added to a constant"}),
    # sizes read one by one; its attention returns a list, and a norm stands behind each sum, in the layer
    native("openai_gpt", "openai-gpt", GPT, {"block": (1,), "layer": ()}, attentions=EAGER),
    # masks that are expanded to all sequences
    native("modernbert", "modernbert-decoder", {**MHA, **PADDED, "max_position_embeddings": 64}),
    native("nanochat", "nanochat", SIZED),
    native("olmo3", "olmo3", GQA, spanned=HEADS),
    native("vaultgemma", "vaultgemma", SIZED, attentions=EAGER),
    native("lfm2", "lfm2", {**GQA, "block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"]},
           {"kv_head": (), "query_head": ()}, last={"kv_head": (4,), "query_head": (8,)}),
    # every expert gets every token, copied: neither they nor what is copied can be told apart; the shared one is found.
    # Positions turn its heads as complex numbers of float32.
    native("llama4", "llama4_text", {**SIZED, **LOCAL}, spanning={}, tolerance=1e-6,
           locked={f"model.layers.{i}.feed_forward.router.weight[dim 0]": "is chosen from by value" for i in (0, 1)}),
    native("gpt_oss", "gpt_oss", {**SIZED, **LOCAL}, FOUR_EXPERTS, attentions=EAGER),
    native("qwen3_moe", "qwen3_moe", {**SIZED, **ROUTED}, {**FOUR_EXPERTS, "ffn_channel": (40,)}),
    native("olmoe", "olmoe", {**GQA, **EXPERTS, "num_experts": 4}, FOUR_EXPERTS, spanned=HEADS),
    native("granitemoe", "granitemoe", {**GQA, **LOCAL}, FOUR_EXPERTS),
    # a buffer holds a bias on the scores by which experts are chosen, and goes with them
    native("glm4_moe", "glm4_moe", {**SIZED, **PHASED, "n_group": 1, "topk_group": 1}, {},
           last={"ffn_channel": (40, 40), **FOUR_EXPERTS}),
    native("minimax_m2", "minimax_m2", {**SIZED, **LOCAL}, FOUR_EXPERTS, spanned=HEADS),
)  # fmt: skip

EVERYONE = {**FAMILIES, **WIRINGS, **DIFFICULT, **UNLISTED}
