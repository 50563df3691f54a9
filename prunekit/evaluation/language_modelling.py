"""Perplexity, with its protocol beside the number."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from prunekit.errors import PrunekitError
from prunekit.evaluation.likelihood import Span, max_positions
from prunekit.evaluation.scoring import log_likelihoods
from prunekit.evaluation.windows import cut_windows, split_documents
from prunekit.text import TextSource, read_documents

PROTOCOLS = ("windows", "documents")
WINDOW = 128  # LLM-Pruner's window for WikiText-2 and PTB


@dataclass(frozen=True)
class PerplexityResult:
    """A perplexity and how it was measured.

    Attributes:
        value: exp(nll / n_tokens).
        nll: summed negative log-likelihood of all scored tokens, in nats.
        n_tokens: tokens that were scored.
        n_windows: forward passes over a window each.
        protocol: `"windows"` over the whole text, or `"documents"` one by one.
        window: tokens a window at most; None where documents were never split.
        stride: tokens by which windows advance; None where they do not overlap.
        separator: what the text was split at; None where it was not.
        bos: whether the tokenizer's BOS token stood before the text (before each document).
    """

    value: float
    nll: float
    n_tokens: int
    n_windows: int
    protocol: str
    window: int | None
    stride: int | None
    separator: str | None
    bos: bool

    @property
    def description(self) -> str:
        """The protocol in words."""
        start = ", BOS first" if self.bos else ", no BOS"
        if self.protocol == "documents":
            split = f", split at {self.separator!r}" if self.separator else ""
            return f"document by document{split}{start} in each, at most {self.window or 'all'} tokens at a time"
        overlap = f"strided by {self.stride}" if self.stride else "non-overlapping"
        return f"{overlap} windows of {self.window} over the whole text{start}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def __repr__(self) -> str:
        return f"PerplexityResult({self.value:.4g}; {self.n_tokens:,} tokens; {self.description})"


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    text_or_path: TextSource,
    *,
    window: int | None = None,
    stride: int | None = None,
    protocol: str = "windows",
    separator: str | None = None,
    bos: bool = True,
    batch_size: int = 16,
) -> float:
    """How surprised a model is by a text: exp of the mean negative log-likelihood a token.

    Arguments, errors and source are those of `measure_perplexity`, which also returns the protocol.

    Returns:
        The perplexity; 1 is certainty, the size of the vocabulary is a blind guess.
    """
    return measure_perplexity(
        model,
        tokenizer,
        text_or_path,
        window=window,
        stride=stride,
        protocol=protocol,
        separator=separator,
        bos=bos,
        batch_size=batch_size,
    ).value


def measure_perplexity(
    model: nn.Module,
    tokenizer: Any,
    text_or_path: TextSource,
    *,
    window: int | None = None,
    stride: int | None = None,
    protocol: str = "windows",
    separator: str | None = None,
    bos: bool = True,
    batch_size: int = 16,
) -> PerplexityResult:
    """Perplexity of a text, with its protocol.

    Every token is counted that is scored, and no other: the first token of a non-overlapping window, and of
    a document, has no context and is not. The last window counts however short it is.

    Args:
        model: a causal language model of `transformers`.
        tokenizer: the model's own tokenizer.
        text_or_path: a text, the path of a file that holds one, or whatever else `prunekit.text.read_documents`
            takes (several documents are joined by an empty line for `"windows"`); `"world"` is the embedded
            world's validation text.
        window: tokens a window; None for 128 over a whole text, and for as many as the model takes in documents.
        stride: tokens by which windows advance, in [1, window]; None for no overlap.
        protocol: `"windows"` over the whole text, `"documents"` one by one (longer ones are cut into windows).
        separator: marker between documents, split off; only for `"documents"`.
        bos: put the tokenizer's BOS token, where it has one, before the text (before each document). No other
            marker is ever added.
        batch_size: rows of about 128 tokens a forward pass; it does not change the result.

    Returns:
        A `PerplexityResult`.

    Raises:
        PrunekitError: the text is empty, shorter than one window, or the path is missing; the window does not
            fit the model; the protocol, stride or separator is not allowed; the model's loss is not finite.

    Source: non-overlapping windows of 128, LLM-Pruner (Ma et al. 2023), section 4. Theirs has the mean over
    windows and drops the last short one; here it is the mean over tokens, all of them.
    """
    check_protocol(protocol, separator)
    window = choose_window(model, window, protocol)
    bos = bos and tokenizer.bos_token_id is not None
    documents = read_texts(text_or_path, protocol, separator)
    sequences = [encode(tokenizer, document, bos) for document in documents]
    widths = [max(len(tokens), 2) if window is None else window for tokens in sequences]
    spans = [span for pair in zip(sequences, widths, strict=True) for span in cut_windows(*pair, stride)]
    check_length(sequences, spans, protocol, window)
    nll = -log_likelihoods(model, spans, batch_size=batch_size, progress="perplexity").sums.sum().item()
    n_tokens = sum(span.n_scored for span in spans)
    strided = stride if stride != window else None
    value = math.exp(nll / n_tokens) if nll / n_tokens < 700 else math.inf
    return PerplexityResult(value, nll, n_tokens, len(spans), protocol, window, strided, separator, bos)


def encode(tokenizer: Any, text: str, bos: bool) -> list[int]:
    """Token ids of a text with no marker but, where asked, BOS."""
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [tokenizer.bos_token_id, *tokens] if bos else tokens


def read_texts(source: TextSource, protocol: str, separator: str | None) -> list[str]:
    """The texts to score one by one: the whole as one, or its documents.

    `"world"` is the embedded world's held-out text, not the documents that its model was trained on.
    """
    if isinstance(source, str) and source == "world":
        from prunekit.world import validation_text

        source = validation_text()
    documents = read_documents(source)
    return split_documents(documents, separator) if protocol == "documents" else ["\n\n".join(documents)]


def check_protocol(protocol: str, separator: str | None) -> None:
    """Refuses an unknown protocol, and a separator where none is used."""
    if protocol not in PROTOCOLS:
        raise PrunekitError(f"protocol={protocol!r}; it is one of {', '.join(map(repr, PROTOCOLS))}")
    if separator is not None and protocol != "documents":
        raise PrunekitError(f"separator={separator!r} splits documents; give protocol='documents' with it")


def choose_window(model: nn.Module, window: int | None, protocol: str) -> int | None:
    """The window to use: the one given where it fits, else the protocol's own."""
    limit = max_positions(model)
    if window is not None and limit is not None and window > limit:
        raise PrunekitError(
            f"window={window}, but this model takes at most {limit} tokens; give window={limit} or less"
        )
    if window is not None or protocol == "documents":
        return limit if window is None else window
    return min(WINDOW, limit or WINDOW)


def check_length(sequences: Sequence[list[int]], spans: Sequence[Span], protocol: str, window: int | None) -> None:
    """Refuses a text with less than one window, or documents in which nothing can be scored."""
    n_tokens = sum(map(len, sequences))
    if protocol == "windows" and window is not None and n_tokens < window:
        raise PrunekitError(
            f"the text has {n_tokens} tokens, less than one window of {window}; "
            f"give a longer text, or window={max(n_tokens, 2)} or less"
        )
    if not spans:
        raise PrunekitError("every document is a single token, and the first token is never scored; give longer ones")
