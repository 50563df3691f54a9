"""Recovery data: whatever somebody has → windows of tokens."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from prunekit.account import MOST_TOKENS
from prunekit.errors import PrunekitError
from prunekit.text import (
    DOCUMENT_SEPARATOR,
    JOINT,
    NO_TOKENIZER,
    TextSource,
    leading_bos,
    read_documents,
    tokenize,
    whole_windows,
)


def token_windows(data: Tensor | TextSource, tokenizer: Any, seq_len: int) -> Tensor:
    """Tokens to train on, as windows of one length.

    Documents are joined and cut into windows side by side; what is left over at the end is dropped. BOS stands first
    in every window where the tokenizer adds it by itself, and nowhere else.

    Args:
        data: integers (n, length), taken as they are; a `datasets.Dataset` with `input_ids` or a text
            column; or anything that `prunekit.text.read_documents` reads.
        tokenizer: needed where `data` is text. Without it `input_ids` are joined as they are.
        seq_len: length of a window, BOS included, at least 2; not used where `data` is a tensor.

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
    stream = torch.cat([torch.zeros(0, dtype=torch.long), *token_documents(data, tokenizer, bos)])
    windows = whole_windows(stream, seq_len, bos)
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


def token_documents(data: Tensor | TextSource, tokenizer: Any, bos: int | None) -> list[Tensor]:
    """Each document as tokens, int64 (length,), without BOS at its beginning.

    Args:
        data: text, a data set, or integers (n, length) whose rows are documents.
        tokenizer: needed where `data` is text.
        bos: what `leading_bos` says of it.

    Raises:
        PrunekitError: text without a tokenizer, or nothing in it.
    """
    if isinstance(data, Tensor):
        return [_without(bos, row) for row in data.cpu().long()]
    if "input_ids" in (getattr(data, "column_names", None) or ()):
        rows: Iterable[Any] = data  # type: ignore[assignment]
        return [_without(bos, torch.as_tensor(row["input_ids"], dtype=torch.long)) for row in rows]
    if tokenizer is None:
        raise PrunekitError(f"the recovery data is text: give tokenizer=tokenizer, or token ids; {NO_TOKENIZER}")
    documents = read_documents(data, separator=DOCUMENT_SEPARATOR)
    return [tokenize([text + JOINT * (len(documents) > 1)], tokenizer) for text in documents]


def _without(bos: int | None, row: Tensor) -> Tensor:
    return row[1:] if bos is not None and row[:1].eq(bos).any() else row
