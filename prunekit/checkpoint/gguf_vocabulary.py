"""Writes the words of a model's tokenizer into a GGUF file, where llama.cpp is known to read them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prunekit.checkpoint.gguf import FILE
from prunekit.errors import warn
from prunekit.pruning.cuts import tokens_went

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
