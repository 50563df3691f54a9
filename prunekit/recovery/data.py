"""Recovery data: turns text or tokens into windows of tokens."""

from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from prunekit.account import MOST_TOKENS
from prunekit.documents import TextSource, at_least_one, documents_of
from prunekit.errors import PrunekitError
from prunekit.text import DOCUMENT_SEPARATOR, JOINT, leading_bos, tokenize, whole_windows


def token_windows(data: Tensor | TextSource, tokenizer: Any, seq_len: int, *, enough: int | None = None) -> Tensor:
    """Tokens to train on, as windows of one length.

    Documents are joined and cut into windows side by side; the rest at the end is dropped. BOS stands first
    in every window where the tokenizer adds it by itself, and nowhere else.

    Args:
        data: integers (n, length), used as they are; or anything that `prunekit.documents.documents_of` reads.
        tokenizer: needed if `data` is text. Without it token ids are joined as they are.
        seq_len: length of a window, BOS included, at least 2; not used where `data` is a tensor.
        enough: windows that are needed, for data that is streamed: it is read so far, and no further. None reads all.

    Returns:
        int64 (n_windows, seq_len) on the CPU.

    Raises:
        PrunekitError: text without a tokenizer, nothing in it, or fewer tokens than one window.
    """
    if isinstance(data, Tensor):
        return data
    if seq_len < 2:
        raise PrunekitError(f"seq_len={seq_len}: a window needs at least 2 tokens")
    bos = None if tokenizer is None else leading_bos(tokenizer)
    n_tokens = None if enough is None else enough * seq_len
    stream = torch.cat([torch.zeros(0, dtype=torch.long), *token_documents(data, tokenizer, bos, enough=n_tokens)])
    windows = whole_windows(stream, seq_len, bos)[:enough]
    if not len(windows):
        told = f"{len(stream)} tokens" if bos is None else f"{len(stream) + 1} tokens with BOS"
        raise PrunekitError(
            f"the recovery data has {told} and one window needs seq_len={seq_len}; give more text or a smaller seq_len"
        )
    return windows


def hold_out(windows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Windows to train on, and the last twentieth of them to measure on, at most about 1,024 tokens; or None.

    Args:
        windows: integers (n, seq_len), as `token_windows` gives them.
    """
    n = min(len(windows) // 20, max(1, MOST_TOKENS // windows.shape[1]))
    return (windows[:-n], windows[-n:]) if n else (windows, None)


def token_documents(
    data: Tensor | TextSource, tokenizer: Any, bos: int | None, *, enough: int | None = None
) -> list[Tensor]:
    """Each document as tokens, int64 (length,), without BOS at its beginning.

    Args:
        data: text, a data set, or integers (n, length) whose rows are documents.
        tokenizer: needed where `data` is text.
        bos: what `leading_bos` says of it.
        enough: tokens after which no further document is read; None reads all.

    Raises:
        PrunekitError: text without a tokenizer, or nothing in it.
    """
    found: list[Tensor] = []
    n_tokens = 0
    read = documents_of(data, tokenizer, separator=DOCUMENT_SEPARATOR)
    # a text that is the only one ends without the line break between two
    first = list(islice(read, 2))
    joint = JOINT * (len(first) > 1)
    for document in chain(first, read):
        tokens = tokenize([document if isinstance(document, Tensor) else document + joint], tokenizer, bos=bos)
        found.append(tokens)
        n_tokens += len(tokens)
        if enough is not None and n_tokens >= enough:
            break
    return at_least_one(found, data)
