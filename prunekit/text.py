"""Tokenizes text: joins documents into one stream, cuts windows, and adds BOS."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prunekit.documents import read_documents as read_documents  # its name of old
from prunekit.errors import PrunekitError

DOCUMENT_SEPARATOR = "<|endoftext|>"
"""Separator between documents in TinyStories and many other corpora."""

JOINT = "\n"
"""Separator between documents in a stream of tokens, as in the embedded world's training."""


NO_TOKENIZER = (
    "a checkpoint that has no tokenizer gets one by tokenizer.json and tokenizer_config.json in its folder; where "
    "tokens were cut, that of the uncut model does not fit: plan.json lists under keep the old number of each new one"
)


def leading_bos(tokenizer: Any, asked: bool | None = None) -> int | None:
    """The first token of every window of text: BOS if the tokenizer adds it by itself.

    Args:
        tokenizer: a transformers tokenizer.
        asked: True always uses BOS, False never; None follows the tokenizer.

    Returns:
        The id of BOS, or None where windows begin with text.

    Raises:
        PrunekitError: no tokenizer, or BOS requested from a tokenizer without one.
    """
    if tokenizer is None:
        raise PrunekitError(f"tokenizer=None, and text needs one; {NO_TOKENIZER}")
    bos: int | None = tokenizer.bos_token_id
    if asked and bos is None:
        raise PrunekitError("bos=True, but this tokenizer has no BOS token; give bos=None or bos=False")
    if asked is None and bos is not None:
        bare, marked = encode(tokenizer, "a"), tokenizer("a", verbose=False)["input_ids"]
        asked = marked[: len(bare) + 1] == [bos, *bare]  # compared with the bare text: "a" itself may be unknown
    return bos if asked else None


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text alone, without the markers that the tokenizer would add."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def tokenize(
    documents: Sequence[str | Tensor],
    tokenizer: Any,
    *,
    enough: int | None = None,
    bos: int | None = None,
    known: Mapping[str, list[int]] | None = None,
) -> Tensor:
    """One stream of tokens: the documents one after the other, a line break between two texts.

    Args:
        documents: texts, or tokens, int64 (length,).
        tokenizer: a transformers tokenizer; not used where all are tokens.
        enough: stop at the first document after which there are this many tokens; None reads all.
        bos: the token that windows begin with; where a document begins with it too, as a chat template may write it,
            it is left out there. None leaves all tokens.
        known: tokens of texts, with the line break behind them, that were tokenized before.

    Returns:
        int64 (n_tokens,).

    Raises:
        PrunekitError: text, and no tokenizer.
    """
    ids: list[int] = []
    for number, document in enumerate(documents, start=1):
        joint = JOINT * (number < len(documents))
        told = known.get(document + joint) if known and isinstance(document, str) else None
        found = token_ids(document, tokenizer, joint) if told is None else told
        ids.extend(found[1:] if bos is not None and found[:1] == [bos] else found)
        if enough is not None and len(ids) >= enough:
            break
    return torch.tensor(ids, dtype=torch.long)


def token_ids(document: str | Tensor, tokenizer: Any, joint: str = "") -> list[int]:
    """Tokens of a document: its own, or those of its text with what joins it to the next.

    Raises:
        PrunekitError: text, and no tokenizer.
    """
    if isinstance(document, Tensor):
        found: list[int] = document.tolist()
        return found
    if tokenizer is None:
        raise PrunekitError(f"the data is text: give tokenizer=tokenizer, or token ids; {NO_TOKENIZER}")
    return encode(tokenizer, document + joint)


def text_width(width: int, bos: int | None) -> int:
    """Tokens of text in a window of `width` tokens, of which BOS is one where there is one."""
    return width if bos is None else width - 1


def begin_windows(tokens: Tensor, bos: int | None) -> Tensor:
    """BOS, where there is one, and then the text of each window: (…, n_tokens) → int64 (…, n_tokens + 1)."""
    return tokens if bos is None else torch.nn.functional.pad(tokens, (1, 0), value=bos)


def whole_windows(stream: Tensor, width: int, bos: int | None) -> Tensor:
    """A stream of tokens as windows without overlap; the rest is dropped.

    Args:
        stream: int64 (n_tokens,), without BOS.
        width: tokens a window, BOS included.
        bos: what `leading_bos` says.

    Returns:
        int64 (n_windows, width), BOS first in each.
    """
    step = text_width(width, bos)
    n_windows = len(stream) // step
    return begin_windows(stream[: n_windows * step].view(n_windows, step), bos)
