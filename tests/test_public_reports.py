"""What people reported to the trackers of tools like this one, tried here: each right, or refused by name."""

import copy
import json
import warnings

import pytest
import torch
from evaluation_helpers import TEXT, byte_tokenizer
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import prunekit as pk
from prunekit.errors import PrunekitError

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 96,
    "vocab_size": 258,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.1,
}
IDS = torch.randint(3, 250, (3, 16), generator=torch.Generator().manual_seed(0))


def tiny(kind="llama", **more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **more})).eval()


def cut(model, ratio=0.2, importance=None, calib=None, **options):
    groups = pk.discover(model)
    units = groups.of_kind(*options.get("kinds", ("kv_head", "ffn_channel")))
    return pk.prune(
        model, pk.plan(groups, pk.score(model, units, importance or pk.Magnitude(), calib), ratio, **options)
    )


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids).logits.float()


def same_greedy(model):
    """Whether tokens from a cache are those without one."""
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    with_cache = model.generate(IDS, use_cache=True, **options)
    return with_cache.equal(model.generate(IDS, use_cache=False, **options)) and with_cache.shape == (3, 22)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_heads_of_llama_3_go_and_the_forward_pass_stays(attention):
    """horseee/LLM-Pruner#69: after heads of a GQA model went, attention was reshaped to the old hidden size."""
    model = tiny(attn_implementation=attention)
    half, fewer = (cut(model, ratio, of="units", kinds=("kv_head",)) for ratio in (0.5, 0.25))
    assert half.config.num_key_value_heads == 2 and half.config.num_attention_heads == 4
    assert fewer.model.layers[0].self_attn.o_proj.weight.shape == (64, 48)  # 6 heads of 8: no divisor of 64
    for small in (half, fewer):
        assert logits(small).isfinite().all() and same_greedy(small)


def test_qwen_2_is_scored_by_gradients_with_its_cache_on():
    """VainF/Torch-Pruning#461: no gradients reached Qwen2.5 while use_cache was on; then its heads were miscounted."""
    model = tiny("qwen2")
    model.config.use_cache = True
    small = cut(model, 0.25, pk.Taylor(), IDS, of="units")
    attention = small.model.layers[0].self_attn
    assert attention.num_key_value_groups == 2 and small.config.use_cache is True
    assert attention.q_proj.bias.shape == (48,) and attention.k_proj.bias.shape == (24,)
    assert same_greedy(small)


@pytest.mark.filterwarnings("ignore:the calibration set has")
@pytest.mark.parametrize(
    ("kind", "method"), [("llama", "wanda"), ("mistral", "wanda"), ("mistral", "sparsegpt"), ("llama", "sparsellm")]
)
def test_layers_are_made_sparse_whatever_mask_they_are_given(kind, method):
    """locuslab/wanda#67 and #51: the attention mask of a layer's inputs was None, as with SDPA and sliding windows."""
    model = tiny(kind, **({"sliding_window": 8} if kind == "mistral" else {}))
    sparse = pk.sparsify(model, IDS, method, 0.5)
    zeros = [(layer.mlp.up_proj.weight == 0).float().mean().item() for layer in sparse.model.layers]
    assert zeros == pytest.approx([0.5] * 4, abs=0.02) and logits(sparse).isfinite().all()


def test_heads_of_keys_and_queries_lose_the_same_rotary_pairs():
    """aim-uofa/LoRAPrune#6: keys of a GQA model kept another head size than queries, and rotary embeddings broke."""
    small = cut(tiny(), 0.0589, kinds=("head_dim",))
    for layer in small.model.layers:
        query, key = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
        assert len(query) == 2 * len(key) and len(key) % 8 == 0 and len(key) <= 32
    assert logits(small).isfinite().all() and same_greedy(small)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_scored_on_the_processor(dtype):
    """horseee/LLM-Pruner#22: float16 on a CPU ended in an error of a matrix product."""
    model = tiny().to(dtype)
    small = cut(model, 0.2, pk.Taylor(), IDS)
    assert {p.dtype for p in small.parameters()} == {dtype} and logits(small).isfinite().all()


def test_a_head_that_is_no_longer_the_embedding_is_saved(tmp_path):
    """huggingface/transformers#45127: the configuration still said tied, and the trained head was lost on loading."""
    model = tiny(tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 1.5)
    for number, whole in enumerate((model, cut(model))):
        pk.save(whole, tmp_path / str(number))
        again, _ = pk.load(tmp_path / str(number))
        torch.testing.assert_close(logits(again), logits(whole))
        assert again.config.tie_word_embeddings is False and whole.config.tie_word_embeddings is True
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "0")
    torch.testing.assert_close(logits(again), logits(model))


def test_an_adapter_on_a_tied_head_is_refused():
    """huggingface/peft#2018: merging an adapter of lm_head changed the embedding that shares its weight."""
    model = tiny("gemma2", tie_word_embeddings=True)
    with pytest.raises(PrunekitError, match="lm_head"):
        pk.recover(model, pk.LoRA(targets=("lm_head",), max_steps=1), IDS)


def test_tied_weights_are_saved_once_after_training(tmp_path):
    """huggingface/transformers#33807, huggingface/accelerate#2684: shared tensors stopped the saving of Gemma 2."""
    small = cut(tiny("gemma2", tie_word_embeddings=True))
    trained = pk.recover(small, pk.FullTuning(max_steps=2, batch_size=2), IDS)
    pk.save(trained, tmp_path / "out")
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert sum("lm_head" in name or "embed_tokens" in name for name in names) == 1
    torch.testing.assert_close(logits(pk.load(tmp_path / "out")[0]), logits(trained))


def test_sampling_options_that_contradict_each_other_do_not_stop_saving(tmp_path):
    """huggingface/transformers#29988: Vicuna's own generation options (a temperature, no sampling) cannot be saved."""
    folder = tmp_path / "in"
    tiny().save_pretrained(folder)
    options = {"temperature": 0.9, "top_p": 0.6, "do_sample": False, "bos_token_id": 0, "eos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(options))
    model, _ = pk.load(folder)
    small = cut(model)
    pk.save(small, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["temperature"] == 0.9 and logits(pk.load(tmp_path / "out")[0]).equal(logits(small))
    pk.prune_checkpoint(folder, tmp_path / "streamed", pk.Magnitude(), 0.2)
    assert logits(pk.load(tmp_path / "streamed")[0]).isfinite().all()


@pytest.mark.filterwarnings("ignore:the calibration set has")
@pytest.mark.parametrize("method", ["sparsegpt", "sparsellm"])
def test_fewer_tokens_than_inputs_and_dead_inputs_are_solved(method):
    """BaiTheBest/SparseLLM#20, vllm-project/llm-compressor#142: the matrix of inputs was not positive-definite."""
    model = tiny()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[:40] = 0  # inputs of down_proj that are always 0
    sparse = pk.sparsify(model, IDS[:1, :4], method, 0.5)
    assert all(p.isfinite().all() for p in sparse.parameters()) and logits(sparse).isfinite().all()


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_experts_that_no_token_reaches_stay_finite(method):
    """casper-hansen/AutoAWQ#755, ModelCloud/GPTQModel#1680: experts without a calibration token became NaN."""
    model = tiny("mixtral", num_local_experts=8, num_experts_per_tok=1)
    calib = IDS[:1, :3]  # at most three experts of eight in a layer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparse = pk.sparsify(model, calib, method, 0.5)
    assert all(p.isfinite().all() for p in sparse.parameters()) and logits(sparse).isfinite().all()
    told = [*sparse.sparsity_report.remarks, *sparse.sparsity_report.left.values()]
    assert any("expert" in line or "token" in line for line in told), told
    groups = pk.discover(model)
    scores = pk.score(model, groups.of_kind("expert", "ffn_channel"), pk.Taylor(), calib)
    assert all(values.isfinite().all() for values in scores.values())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padding_on_the_left_changes_no_answer_of_a_cut_model(kind):
    """ndif-team/nnsight#673, huggingface/transformers#18478: rows with padding on the left were predicted wrongly."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} if kind == "gpt2" else {}
    small = cut(tiny(kind, **sizes), 0.1, kinds=("ffn_channel",))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    alone = small.generate(IDS[:1, :7], **options)[:, 7:]
    ids = torch.cat([torch.full((1, 9), 1), IDS[:1, :7]], 1)
    batch = torch.cat([ids, IDS[1:2]])
    mask = torch.ones_like(batch)
    mask[0, :9] = 0
    assert small.generate(batch, attention_mask=mask, **options)[:1, 16:].equal(alone)


def test_layers_of_gemma_3_go_with_their_kinds(tmp_path):
    """arcee-ai/mergekit#537: the number of layers of Gemma 3 was not set where the configuration is nested."""
    model = tiny("gemma3_text", num_hidden_layers=7, sliding_window=8, layer_types=None)
    small = cut(model, 0.2655, kinds=("layer",))
    left = len(small.model.layers)
    assert left < 7 and small.config.num_hidden_layers == left == len(small.config.layer_types)
    pk.save(small, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(again), logits(small))
    assert same_greedy(small)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused():
    """EuroEval/EuroEval#52: a tokenizer larger than the embedding ended in an IndexError."""
    model, tokenizer = tiny(vocab_size=200), byte_tokenizer()
    for work in (
        lambda: pk.perplexity(model, tokenizer, TEXT * 2),
        lambda: pk.recover(model, pk.LoRA(max_steps=1, seq_len=16), TEXT * 2, tokenizer=tokenizer),
        lambda: cut(model, 0.2, pk.Taylor(), pk.calibration_set(TEXT * 2, tokenizer, n_samples=2, seq_len=16)),
    ):
        with pytest.raises(PrunekitError, match="another tokenizer|this tokenizer belongs to another model"):
            work()


def test_an_embedding_with_more_rows_than_the_tokenizer_keeps_them(tmp_path):
    """arcee-ai/mergekit#425: rows that pad the vocabulary (Qwen2.5) were cut away on saving."""
    model, tokenizer = tiny("qwen2", vocab_size=320, tie_word_embeddings=True), byte_tokenizer()
    small = cut(model)
    pk.save(small, tmp_path / "out", tokenizer=tokenizer)
    again, found = pk.load(tmp_path / "out")
    assert len(again.get_input_embeddings().weight) == again.config.vocab_size == 320 > len(found)


def test_one_long_text_is_drawn_from_without_a_warning(recwarn):
    """abx393/llm-pruning-calibration-data#1: one long text was called longer than the model's maximum."""
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 64
    calib = pk.calibration_set(TEXT * 50, tokenizer, n_samples=4, seq_len=32)
    assert calib.shape == (4, 32) and not [w for w in recwarn if "maximum" in str(w.message)]


def test_a_tokenizer_without_padding_will_do(tmp_path):
    """huggingface/transformers#22312: LLaMA's tokenizer has no padding token, and batches failed."""
    tokenizer, model = byte_tokenizer(), tiny()
    assert isinstance(tokenizer, PreTrainedTokenizerFast) and tokenizer.pad_token is None
    texts = [TEXT[:40], TEXT, TEXT[:90]] * 4
    small = pk.recover(cut(model), pk.LoRA(max_steps=1, seq_len=16), texts, tokenizer=tokenizer)
    report = pk.evaluate(small, tokenizer, ["perplexity"], text=texts)
    assert report is not None and tokenizer.pad_token is None


def test_the_merged_weights_of_a_bfloat16_model_are_what_was_trained():
    """huggingface/peft#1388: a merge in bfloat16 gave another loss than the adapter that was trained."""
    model = tiny().to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    recovered = pk.recover(model, pk.LoRA(max_steps=20, batch_size=3, learning_rate=1e-2), IDS)
    assert all(p.dtype == torch.bfloat16 for p in recovered.parameters())
    change = recovered.loss_change
    assert change.after < change.before - 0.1  # what was merged is what lowered the loss
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
