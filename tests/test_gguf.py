"""A GGUF file of an even LLaMA, read back by the gguf package and by transformers."""

import sys

import pytest
import torch
from checkpoint_helpers import same_cut
from evaluation_helpers import TEXT, byte_tokenizer, llama
from families import FAMILIES, logits, plan_keeping, relative_difference
from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import prunekit as pk
from prunekit import PrunekitError
from prunekit.checkpoint import gguf_writing

interleaved = gguf_writing._interleaved


def words():
    """One token a byte, and two merges, without which neither transformers nor llama.cpp reads a vocabulary."""
    vocabulary = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"]
    merges = [("t", "h"), ("th", "e")]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def halved(model):
    groups = pk.discover(model)
    keep = {g.name: list(range(1, 1 + g.n_units // 2)) for g in groups.of_kind("kv_head", "ffn_channel")}
    return pk.prune(model, plan_keeping(groups, keep))


def uneven(**changes):
    """Other numbers of heads and channels in each layer."""
    model = llama(head_dim=8, num_hidden_layers=3, num_key_value_heads=4, num_attention_heads=8, **changes)
    groups = pk.discover(model)
    keep = {g.name: list(range(1, g.n_units - g.layer)) for g in groups.of_kind("kv_head", "ffn_channel")}
    return pk.prune(model, plan_keeping(groups, keep))


def read(folder, **options):
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", **options).eval()


@pytest.mark.parametrize("name", ["llama_mha", "llama_gqa", "llama_tied"])
def test_logits_are_the_same_after_reading_back(name, tmp_path):
    small = same_cut(name, False)
    pk.export(small, tmp_path / "out", layout="gguf")
    again = read(tmp_path / "out")
    assert relative_difference(logits(again), logits(small)) < 1e-6
    assert again.config.num_attention_heads == 4 and again.config.head_dim == 8
    assert "model.gguf" in (tmp_path / "out" / "README.md").read_text()


def test_the_file_holds_the_widths_and_no_more_tensors_than_the_model(tmp_path):
    small = same_cut("llama_gqa", False)
    pk.export(small, tmp_path / "out", layout="gguf")
    reader = GGUFReader(tmp_path / "out" / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama" and fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.feed_forward_length"] == 48 and fields["llama.attention.key_length"] == 8
    assert sum(int(t.n_elements) for t in reader.tensors) == small.num_parameters()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_stay_halves(dtype, tmp_path):
    small = halved(llama(head_dim=8))
    for p in small.parameters():  # .to() would round the rotary frequencies too, which no checkpoint holds
        p.data = p.data.to(dtype)
    pk.export(small, tmp_path / "out", layout="gguf")
    assert relative_difference(logits(read(tmp_path / "out")), logits(small).float()) < 0.03
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert kinds["blk.0.ffn_up.weight"] == {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    assert kinds["blk.0.attn_norm.weight"] == "F32"  # llama.cpp wants vectors whole


def test_uneven_widths_stand_layer_by_layer(tmp_path):
    small = uneven()
    pk.export(small, tmp_path / "out", layout="gguf")  # which compares logits
    reader = GGUFReader(tmp_path / "out" / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "deci" and fields["deci.attention.key_length"] == 8
    assert fields["deci.attention.head_count"] == [6, 4, 2] and fields["deci.attention.head_count_kv"] == [3, 2, 1]
    assert fields["deci.feed_forward_length"] == [47, 46, 45]
    assert sum(int(t.n_elements) for t in reader.tensors) == small.num_parameters()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "llama.cpp reads and `transformers` does not" in card and "xllamacpp" in card
    with pytest.raises(PrunekitError, match="architecture 'deci', which transformers does not"):
        pk.load(tmp_path / "out")


def test_heads_that_transformers_cannot_count_are_counted_in_gguf(tmp_path):
    model = llama(head_dim=8, num_key_value_heads=4)
    groups = pk.discover(model)
    small = pk.prune(model, plan_keeping(groups, {g.name: [0, 1, 3] for g in groups.of_kind("kv_head")}))
    pk.export(small, tmp_path / "out", layout="gguf")
    fields = GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["general.architecture"].contents() == "llama"  # as wide in every layer
    assert fields["llama.attention.head_count"].contents() == 3


LONG = {"rope_theta": 10_000.0, "factor": 4.0}
SCALED = {
    "linear": {"rope_type": "linear", **LONG},
    "llama3": {"rope_type": "llama3", **LONG, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32},
}  # fmt: skip


@pytest.mark.parametrize("rope", SCALED)
def test_a_scaled_rope_is_a_tensor_of_factors(rope, tmp_path):
    small = halved(llama(head_dim=8, rope_parameters=SCALED[rope]))
    pk.export(small, tmp_path / "out", layout="gguf")  # which compares logits
    factors = {t.name: t.data for t in GGUFReader(tmp_path / "out" / "model.gguf").tensors}["rope_freqs.weight"]
    assert factors.max() == pytest.approx(4) and factors.min() == pytest.approx(4 if rope == "linear" else 1)
    assert f"(rope '{rope}') llama.cpp reads" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(PrunekitError, match=r"would be left out, perhaps rope_freqs\.weight"):
        pk.load(tmp_path / "out")


def _damaged(*given):
    tensor = interleaved(*given)
    return tensor.flip(0)


def test_uneven_widths_are_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_writing, "_interleaved", _damaged)
    with pytest.raises(PrunekitError, match="read back from GGUF this model gives other logits"):
        pk.export(uneven(), tmp_path / "out", layout="gguf")
    assert not list(tmp_path.iterdir())


def test_a_byte_level_vocabulary_travels_along(tmp_path):
    tokenizer = words()
    pk.export(llama(vocab_size=260), tmp_path / "out", layout="gguf", tokenizer=tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    bare = {"add_special_tokens": False}
    assert again(TEXT, **bare)["input_ids"] == tokenizer(TEXT, **bare)["input_ids"]
    fields = GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("bos", "eos")] == [0, 1]


def test_a_vocabulary_without_merges_which_llama_cpp_refuses_stays_outside_the_file(tmp_path):
    with pytest.warns(UserWarning, match="llama.cpp reads no byte-level tokenizer without merges"):
        pk.export(llama(), tmp_path / "out", layout="gguf", tokenizer=byte_tokenizer())


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def splitting(split):
    """A byte tokenizer that splits texts in a way of its own first."""
    tokenizer = words()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return tokenizer


def test_llama_3s_splitting_is_told_by_its_name(tmp_path):
    pk.export(
        llama(vocab_size=260),
        tmp_path / "out",
        layout="gguf",
        tokenizer=splitting(pre_tokenizers.Split(Regex(LLAMA_3), "isolated")),
    )
    assert GGUFReader(tmp_path / "out" / "model.gguf").fields["tokenizer.ggml.pre"].contents() == "llama-bpe"


@pytest.mark.parametrize("split", [pre_tokenizers.Split(Regex(r"\w+"), "isolated"), pre_tokenizers.Digits()])
def test_a_splitting_that_llama_cpp_has_no_name_for_leaves_the_vocabulary_out_and_says_so(split, tmp_path):
    reason = "model.gguf holds no vocabulary: llama.cpp is not known to split texts as"
    with pytest.warns(UserWarning, match=reason):
        pk.export(llama(vocab_size=260), tmp_path / "out", layout="gguf", tokenizer=splitting(split))
    assert reason in (tmp_path / "out" / "README.md").read_text()
    fields = GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "none" and "tokenizer.ggml.pre" not in fields


def test_a_real_model_and_its_sentencepiece_vocabulary(shared, tmp_path):
    model, tokenizer = pk.load(shared / "models" / "stories260K")
    small = halved(model)
    pk.export(small, tmp_path / "out", layout="gguf", tokenizer=tokenizer)
    assert relative_difference(logits(read(tmp_path / "out")), logits(small)) < 1e-6
    again = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    text = "Once upon a time, there was a little girl named Lily. She had a big, red ball!"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_vocabulary_of_whole_words_stays_outside_the_file(tmp_path):
    model, tokenizer = pk.load("world")
    with pytest.warns(UserWarning, match="llama.cpp is not known to read a WordLevel tokenizer"):
        pk.export(model, tmp_path / "out", layout="gguf", tokenizer=tokenizer)
    fields = GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["tokenizer.ggml.model"].contents() == "none" and "tokenizer.ggml.tokens" not in fields
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("again", [False, True])  # a plain checkpoint keeps no record of what was cut
def test_the_words_of_the_uncut_vocabulary_stay_outside_the_file(again, tmp_path):
    tokenizer = byte_tokenizer()
    model = llama(head_dim=8)
    groups = pk.discover(model)
    kept = list(range(9, len(tokenizer)))
    small = pk.prune(model, plan_keeping(groups, {groups.of_kind("vocabulary")[0].name: kept}))
    if again:
        pk.save(small, tmp_path / "plain")
        small, _ = pk.load(tmp_path / "plain")
    with pytest.warns(UserWarning, match=f"beyond the {len(kept)} of this model.* before tokens went"):
        pk.export(small, tmp_path / "out", layout="gguf", tokenizer=tokenizer)
    assert "tokenizer.ggml.tokens" not in GGUFReader(tmp_path / "out" / "model.gguf").fields


def test_reading_back_shows_no_progress(tmp_path, capsys):
    pk.export(llama(vocab_size=260), tmp_path / "out", layout="gguf", tokenizer=words())
    assert "onvert" not in capsys.readouterr().err


def test_a_token_added_to_an_uncut_model_is_left_out_and_the_others_stay(tmp_path):
    tokenizer = words()
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<added>"})
    pk.export(llama(vocab_size=size), tmp_path / "out", layout="gguf", tokenizer=tokenizer)
    found = GGUFReader(tmp_path / "out" / "model.gguf").fields["tokenizer.ggml.tokens"].contents()
    assert len(found) == size and "<added>" not in found


def _without_gguf(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)


def _long_rope():
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    return llama(rope_parameters=scaled)


def _cut_of_kind(kind, keep):
    model = llama(head_dim=8)
    groups = pk.discover(model)
    return pk.prune(model, plan_keeping(groups, {g.name: keep for g in groups.of_kind(kind)[:2]}))


def _without_blocks():
    return _cut_of_kind("block", [])


def _narrow_heads():
    return _cut_of_kind("head_dim", [0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_without_blocks, r"\(self_attn: 1 went; mlp: 1 went\); export with layout='padded'"),
        (_narrow_heads, r"\(head_dim: .* in each layer\); export with layout='padded'"),
        (lambda: llama(hidden_act="gelu"), "has hidden_act='silu', and this model has 'gelu'"),
        (
            lambda: same_cut("qwen3", False),
            "'llama' with a rope of 'default', 'linear', 'llama3' only, and this is 'qwen3'",
        ),
        (lambda: same_cut("gpt2", True), "only, and this is 'gpt2'"),  # not its widths
        (_long_rope, "only, and this is 'llama' with rope 'dynamic'"),
        (lambda: FAMILIES["llama_gqa"].model(), "GGUF has no torch.float64; convert the model"),
        (lambda: same_cut("llama_biased", False), "gives other logits .* such as biases"),
    ],
)
def test_what_gguf_cannot_say_is_refused_by_name(make, message, tmp_path):
    with pytest.raises(PrunekitError, match=message):
        pk.export(make(), tmp_path / "out", layout="gguf")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    _without_gguf(monkeypatch)
    with pytest.raises(PrunekitError, match=r"pip install 'prunekit\[gguf\]'"):
        pk.export(llama(), tmp_path / "out", layout="gguf")
    assert not list(tmp_path.iterdir())
