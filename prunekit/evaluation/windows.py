"""Which tokens are scored with which context: the protocols of perplexity, as lists of spans."""

from collections.abc import Sequence

from prunekit.errors import PrunekitError
from prunekit.evaluation.likelihood import Span


def cut_windows(tokens: Sequence[int], window: int, stride: int | None = None) -> list[Span]:
    """Windows over one token sequence, the last one as short as it comes out.

    Without a stride the windows do not overlap, and the first token of each has no context and is not
    scored. With a stride below the window, windows overlap, and every token but the very first is scored
    exactly once, with up to `window - 1` tokens of context and never fewer than `window - stride` where
    the text has them.

    Args:
        tokens: token ids of the whole sequence.
        window: tokens a window, at least 2.
        stride: tokens by which windows advance, in [1, window]; None or `window` for no overlap.

    Returns:
        Spans with at least one scored token each.

    Raises:
        PrunekitError: window or stride is outside its range.

    Source: LLM-Pruner's evaluation (windows of 128), which drops the last short window; here it counts.
    """
    stride = check_window(window, stride)
    spans, scored = [], 0
    for first in range(0, len(tokens), stride):
        piece = tuple(tokens[first : first + window])
        start = max(scored - first, 1)
        if start < len(piece):
            spans.append(Span(piece, start))
        scored = first + len(piece)
        if scored >= len(tokens):
            break
    return spans


def check_window(window: int, stride: int | None) -> int:
    """The stride to use, after checking both numbers."""
    if window < 2:
        raise PrunekitError(f"window={window}; a window takes at least 2 tokens, one of context and one to score")
    if stride is None:
        return window
    if not 1 <= stride <= window:
        raise PrunekitError(f"stride={stride}; it lies between 1 and the window, {window}, or is None for no overlap")
    return stride


def split_documents(documents: Sequence[str], separator: str | None) -> list[str]:
    """Documents split at a separator, white space around each removed, empty ones dropped.

    Raises:
        PrunekitError: the separator is empty or stands nowhere in the text.
    """
    if separator is not None:
        if not separator or not any(separator in document for document in documents):
            raise PrunekitError(
                f"separator={separator!r} does not occur in the text; "
                "name the marker that stands between documents, or separator=None"
            )
        documents = [part for document in documents for part in document.split(separator)]
    found = [document.strip() for document in documents if document.strip()]
    if not found:
        raise PrunekitError(f"nothing but {separator!r} stands in the text; give one that has documents")
    return found
