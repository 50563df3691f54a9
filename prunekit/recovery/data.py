"""Recovery data: whatever somebody has → windows of tokens."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from prunekit.errors import PrunekitError
from prunekit.text import DOCUMENT_SEPARATOR, TextSource, read_documents, tokenize


def token_windows(data: Tensor | TextSource, tokenizer: Any, seq_len: int) -> Tensor:
    """Tokens to train on, as windows of one length.

    Documents are tokenised one by one (with BOS where the tokenizer adds it), joined, and cut into windows
    side by side; what is left over at the end is dropped.

    Args:
        data: integers (n, length), taken as they are; a `datasets.Dataset` with `input_ids` or a text
            column; or anything that `prunekit.text.read_documents` reads.
        tokenizer: needed where `data` is text.
        seq_len: length of a window, at least 2; not used where `data` is a tensor.

    Returns:
        int64 (n_windows, seq_len) on the CPU.

    Raises:
        PrunekitError: text without a tokenizer, nothing in it, or fewer tokens than one window.
    """
    if isinstance(data, Tensor):
        return data
    if seq_len < 2:
        raise PrunekitError(f"seq_len={seq_len}: a window needs at least 2 tokens")
    stream = torch.cat([torch.zeros(0, dtype=torch.long), *token_documents(data, tokenizer)])
    n_windows = len(stream) // seq_len
    if n_windows < 1:
        raise PrunekitError(
            f"the recovery data has {len(stream)} tokens and one window needs seq_len={seq_len}; "
            "give more text or a smaller seq_len"
        )
    return stream[: n_windows * seq_len].view(n_windows, seq_len)


def token_documents(data: TextSource, tokenizer: Any) -> list[Tensor]:
    """Each document as tokens, int64 (length,).

    Raises:
        PrunekitError: text without a tokenizer, or nothing in it.
    """
    if "input_ids" in (getattr(data, "column_names", None) or ()):
        rows: Iterable[Any] = data  # type: ignore[assignment]
        return [torch.as_tensor(row["input_ids"], dtype=torch.long) for row in rows]
    if tokenizer is None:
        raise PrunekitError("the recovery data is text: give tokenizer=tokenizer, or token ids")
    return [tokenize([text], tokenizer) for text in read_documents(data, separator=DOCUMENT_SEPARATOR)]
