"""GGUF, llama.cpp's form of a model: reads the header of a file before any weight, and writes a tokenizer's words.

A file holds names and values of settings, a vocabulary, and tensors, most of them quantized in blocks.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunekit.errors import PrunekitError, need, reason, warn
from prunekit.pruning.cuts import tokens_went

SUFFIX = ".gguf"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_RESTORE = "restore it from its source"
FILE = "model.gguf"


@dataclass(frozen=True)
class GgufHeader:
    """The header of a GGUF file.

    Attributes:
        architecture: in llama.cpp's words, such as `"llama"`.
        sizes: tensor name → how many numbers it holds.
        kinds: of the tensors, in llama.cpp's words, such as `"F32"` or `"Q4_1"`.
        vocabulary: the kind of tokenizer that the file holds, such as `"gpt2"`; None where it holds none.
    """

    architecture: str
    sizes: Mapping[str, int]
    kinds: frozenset[str]
    vocabulary: str | None

    @property
    def dtype(self) -> torch.dtype:
        """The type that its weights were stored in: float32 where some are quantized, else that of its matrices."""
        halves = [kind for kind in ("BF16", "F16") if kind in self.kinds and self.kinds <= _DTYPES.keys()]
        return _DTYPES[halves[0] if halves else "F32"]


def gguf_package(why: str) -> Any:
    """llama.cpp's own Python package.

    Raises:
        PrunekitError: it is not installed, and `why` needs it.
    """
    need("gguf", "gguf", why=why)
    import gguf

    return gguf


def read_header(path: Path) -> GgufHeader:
    """The header of a file that can be dequantized.

    Raises:
        PrunekitError: the gguf package is missing; the file is cut short or damaged, is one part of several, or holds
            tensors of a type that cannot be dequantized, which is named.
    """
    gguf = gguf_package(f"reading {path.name!r}")
    try:
        reader = gguf.GGUFReader(path)
        sizes = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
        kinds = {tensor.tensor_type for tensor in reader.tensors}
        named = ("general.architecture", "split.count", "tokenizer.ggml.model")
        fields = [reader.fields.get(name) for name in named]
        architecture, parts, vocabulary = (None if field is None else field.contents() for field in fields)
    except Exception as error:  # numpy's, struct's or the package's own, by where the file ends
        raise PrunekitError(
            f"{str(path)!r} cannot be read ({reason(error)}): it is cut short, damaged, or newer than "
            f"the gguf package that is installed; {_RESTORE}"
        ) from error
    if isinstance(parts, int) and parts > 1:
        raise PrunekitError(
            f"{str(path)!r} is one of {parts} parts of a model; join them first: llama-gguf-split --merge"
        )
    refused = sorted(kind.name for kind in kinds if not _can_be_dequantized(gguf, kind))
    if refused:
        raise PrunekitError(
            f"{str(path)!r} holds tensors of type {', '.join(refused)}, which cannot be dequantized; give the same "
            "model in another type, such as Q8_0, Q4_K or F16, or the checkpoint that it was made from"
        )
    known = vocabulary if vocabulary not in (None, "none", "no_vocab") else None
    return GgufHeader(str(architecture), sizes, frozenset(kind.name for kind in kinds), known)


def _can_be_dequantized(gguf: Any, kind: Any) -> bool:
    """Tried on one block of zeros."""
    _, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, n_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


# --- the vocabulary, where llama.cpp is known to read it --------------------------------------------------------------

_SPLITTINGS = {  # regular expression of a Split, None for the one that ByteLevel has built in → llama.cpp's name
    None: "gpt-2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "llama-bpe",
}


class NoVocabulary(UserWarning):
    """A GGUF file was written without the words of its tokens."""


def add_vocabulary(gguf: Any, writer: Any, folder: Path, model: Any) -> list[str]:
    """The words of a BPE tokenizer, or none and the reason, with a warning."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    lacking = _lacking(tokenizer, model)
    if tokenizer is None or lacking:
        writer.add_tokenizer_model("none")
        remark = f"{FILE} holds no vocabulary: {lacking}"
        warn(remark, NoVocabulary)
        return [f"{remark}."]
    by_bytes = _by_bytes(tokenizer)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    words, kinds = _words(gguf.TokenType, tokenizer, model.config.vocab_size)
    writer.add_tokenizer_model("gpt2" if by_bytes else "llama")
    writer.add_tokenizer_pre(_splitting(tokenizer) if by_bytes else "default")  # of SentencePiece, it is not read
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
    return []


def _lacking(tokenizer: dict[str, Any] | None, model: Any) -> str | None:
    """Why the file of a model cannot hold a tokenizer's words; None where it can."""
    if tokenizer is None:
        return "there is no tokenizer.json; give it token ids"
    own = ("NORMAL", "BYTE")  # others were added to an uncut model's words, and are left out
    numbers = [number for number, _, kind in _numbered(tokenizer) if kind in own or tokens_went(model)]
    if max(numbers, default=-1) >= model.config.vocab_size:
        return (
            f"the tokenizer has tokens beyond the {model.config.vocab_size} of this model, so it is another's, such as "
            "that of the model before tokens went; give it token ids in their new numbers"
        )
    advice = "give it token ids, made with the tokenizer.json beside"
    if tokenizer["model"]["type"] != "BPE":
        return f"llama.cpp is not known to read a {tokenizer['model']['type']} tokenizer; {advice}"
    if _by_bytes(tokenizer) and _splitting(tokenizer) is None:
        return f"llama.cpp is not known to split texts as this tokenizer does; {advice}"
    if _by_bytes(tokenizer) and not tokenizer["model"]["merges"]:
        return f"llama.cpp reads no byte-level tokenizer without merges; {advice}"
    return None


def _by_bytes(tokenizer: dict[str, Any]) -> bool:
    return not tokenizer["model"].get("byte_fallback")


def _splitting(tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name for how a byte-level tokenizer splits a text into words; None where it has none."""
    whole = tokenizer.get("pre_tokenizer") or {}
    *splits, last = whole.get("pretokenizers", [whole])
    found = [split.get("pattern", {}).get("Regex", "") for split in splits] + [None] * last.get("use_regex", True)
    level = last.get("type") == "ByteLevel" and not last["add_prefix_space"] and not tokenizer.get("normalizer")
    return _SPLITTINGS.get(found[0]) if level and len(found) == 1 else None


def _numbered(tokenizer: dict[str, Any]) -> Iterator[tuple[int, str, str]]:
    """Number, word and kind of every token; what was added comes last and counts."""
    vocabulary = tokenizer["model"].get("vocab", {})
    if isinstance(vocabulary, list):  # Unigram: words with scores, by their numbers
        vocabulary = {word: number for number, (word, _) in enumerate(vocabulary)}
    for word, number in vocabulary.items():
        yield number, word, "BYTE" if len(word) == 6 and word.startswith("<0x") else "NORMAL"
    for added in tokenizer.get("added_tokens", []):
        yield added["id"], added["content"], "CONTROL" if added["special"] else "USER_DEFINED"


def _words(types: Any, tokenizer: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every word by its number, with its kind; numbers that the tokenizer leaves open are unused."""
    found = {number: (word, types[kind]) for number, word, kind in _numbered(tokenizer)}
    rows = [found.get(number, (f"<unused {number}>", types.UNUSED)) for number in range(size)]
    return [word for word, _ in rows], [int(kind) for _, kind in rows]
