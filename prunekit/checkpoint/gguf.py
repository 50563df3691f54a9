"""A plain LLaMA as a GGUF file, written with llama.cpp's own Python package and proved by reading it back.

Only the `llama` architecture, which knows one width: what `prunekit.export` hands on is even already.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from prunekit.checkpoint.padded import relative_difference, tolerance
from prunekit.errors import PrunekitError

FILE = "model.gguf"
ARCHITECTURE = "llama"
_SPLITTINGS = {  # regular expression of a Split, None for the one that ByteLevel has built in → llama.cpp's name
    None: "gpt-2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "llama-bpe",
}
_KINDS = {  # dtype → GGUF's name for a matrix, and for a file, of it
    torch.float32: ("F32", "ALL_F32"),
    torch.float16: ("F16", "MOSTLY_F16"),
    torch.bfloat16: ("BF16", "MOSTLY_BF16"),
}


def write_gguf(model: Any, config: Any, folder: Path) -> None:  # noqa: ANN401
    """Write `model.gguf`, with the vocabulary of the tokenizer that stands in the folder already.

    Args:
        model: whose weights to write.
        config: a plain configuration that says its widths.
        folder: to write into.

    Raises:
        PrunekitError: the gguf package is missing, GGUF's `llama` cannot say this model, or what is read back gives
            other logits.
    """
    gguf = _package()
    _check(model, config)
    writer = gguf.GGUFWriter(folder / FILE, ARCHITECTURE)
    _add_sizes(writer, config)
    writer.add_file_type(gguf.LlamaFileType[_KINDS[model.dtype][1]])
    _add_vocabulary(gguf, writer, folder, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.named_parameters():
        _add_tensor(gguf, writer, names.get_name(name, (".weight", ".bias")), name, _interleaved(name, tensor, config))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    _prove(model, folder)


def _package() -> Any:  # noqa: ANN401
    try:
        import gguf
    except ImportError:
        raise PrunekitError("layout='gguf' needs the gguf package; pip install 'prunekit[gguf]'") from None
    return gguf


def _check(model: Any, config: Any) -> None:  # noqa: ANN401
    rope = config.to_dict().get("rope_parameters") or {}
    if config.model_type != ARCHITECTURE or rope.get("rope_type") != "default":
        what = f"{config.model_type!r} with rope {rope.get('rope_type')!r}"
        raise PrunekitError(f"a GGUF file is written of {ARCHITECTURE!r} with rope 'default' only, and this is {what}")
    if model.dtype not in _KINDS:
        known = ", ".join(map(str, _KINDS))
        raise PrunekitError(f"GGUF has no {model.dtype}; convert the model to one of {known}")


def _add_sizes(writer: Any, config: Any) -> None:  # noqa: ANN401
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(config.head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _interleaved(name: str, tensor: Tensor, config: Any) -> Tensor:  # noqa: ANN401
    """Query and key rows in llama.cpp's order: rotary pairs stand side by side, not half a head apart."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)  # (head, half, pair) → (head, pair, half)


def _add_tensor(gguf: Any, writer: Any, wanted: str | None, name: str, tensor: Tensor) -> None:  # noqa: ANN401
    if wanted is None:
        raise PrunekitError(f"GGUF's {ARCHITECTURE!r} has no place for {name}; this model cannot be written")
    kind = gguf.GGMLQuantizationType[_KINDS[tensor.dtype][0] if tensor.dim() > 1 else "F32"]
    data = gguf.quants.quantize(tensor.detach().float().cpu().numpy(), kind)
    writer.add_tensor(wanted, data, raw_dtype=kind)


def _add_vocabulary(gguf: Any, writer: Any, folder: Path, config: Any) -> None:  # noqa: ANN401
    """The words of a BPE tokenizer; of any other, or where texts are split otherwise, the file holds none."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"model": {"type": "none"}}
    pre = _splitting(tokenizer)
    if tokenizer["model"]["type"] != "BPE" or pre is None:
        writer.add_tokenizer_model("none")
        return
    by_bytes = not tokenizer["model"].get("byte_fallback")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    words, kinds = _words(gguf.TokenType, tokenizer, config.vocab_size)
    writer.add_tokenizer_model("gpt2" if by_bytes else "llama")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    if by_bytes:
        writer.add_token_merges(merges)
    else:  # a score in a merge's place: what is merged first scores highest
        rank = {merge.replace(" ", "", 1): number for number, merge in reversed(list(enumerate(merges)))}
        writer.add_token_scores([-float(rank.get(word, len(merges))) for word in words])
    gguf.SpecialVocab(folder, special_token_types=("bos", "eos", "unk", "pad"), n_vocab=len(words)).add_to_gguf(
        writer, quiet=True
    )


def _splitting(tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name for how a BPE tokenizer splits a text into words; None, with a warning, where it has none."""
    if tokenizer["model"]["type"] != "BPE" or tokenizer["model"].get("byte_fallback"):
        return "default"  # not read there: words of SentencePiece, or none at all
    whole = tokenizer.get("pre_tokenizer") or {}
    *splits, last = whole.get("pretokenizers", [whole])
    found = [split.get("pattern", {}).get("Regex", "") for split in splits] + [None] * last.get("use_regex", True)
    by_bytes = last.get("type") == "ByteLevel" and not last["add_prefix_space"] and not tokenizer.get("normalizer")
    if by_bytes and len(found) == 1 and found[0] in _SPLITTINGS:
        return _SPLITTINGS[found[0]]
    warnings.warn(
        "model.gguf holds no vocabulary: llama.cpp is not known to split texts as this tokenizer does; give it token "
        "ids, made with the tokenizer.json beside",
        stacklevel=2,
    )
    return None


def _words(types: Any, tokenizer: dict[str, Any], size: int) -> tuple[list[str], list[int]]:  # noqa: ANN401
    """Every word by its number, with its kind; numbers that the tokenizer leaves open are unused."""
    found = {number: (word, types.NORMAL) for word, number in tokenizer["model"]["vocab"].items()}
    for number, (word, _) in found.items():
        if len(word) == 6 and word.startswith("<0x"):
            found[number] = (word, types.BYTE)
    for added in tokenizer.get("added_tokens", []):
        found[added["id"]] = (added["content"], types.CONTROL if added["special"] else types.USER_DEFINED)
    rows = [found.get(number, (f"<unused {number}>", types.UNUSED)) for number in range(size)]
    return [word for word, _ in rows], [int(kind) for _, kind in rows]


def _prove(model: Any, folder: Path) -> None:  # noqa: ANN401
    try:
        again = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    except Exception as error:  # whatever the reader refuses
        raise PrunekitError(f"the GGUF file cannot be read back ({error}); save with layout='plain'") from error
    difference = relative_difference(again, model)
    if not difference <= tolerance(model.dtype):
        raise PrunekitError(
            f"read back from GGUF this model gives other logits (by a factor of {difference:.1g}): it has parts that "
            f"GGUF's {ARCHITECTURE!r} does not know, such as biases; save with layout='plain'"
        )
