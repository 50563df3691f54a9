"""Texts for perplexity: published ones by name, and protocols that cut a text into windows of tokens with context."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.checks import FilePath, check_choice, checked
from prunekit.documents import Document, Reading, TextSource, at_least_one, read_documents
from prunekit.errors import PrunekitError
from prunekit.evaluation.likelihood import Span
from prunekit.evaluation.records import Record, folders_of, load_hub
from prunekit.models import max_positions
from prunekit.text import begin_windows, leading_bos, text_width, tokenize

PAPERS = "papers"
PROTOCOLS = ("windows", "documents", PAPERS)
WINDOW = 128  # LLM-Pruner's window for WikiText-2 and PTB


@dataclass(frozen=True)
class TextSpans:
    """A tokenized text for scoring.

    Attributes:
        spans: the windows, each with at least one scored token.
        window: tokens a window at most; None where documents were never split.
        bos: whether BOS stands first in every window.
    """

    spans: list[Span]
    window: int | None
    bos: bool


def read_spans(
    model: nn.Module,
    tokenizer: Any,
    source: TextSource,
    *,
    window: int | None = None,
    stride: int | None = None,
    protocol: str = "windows",
    separator: str | None = None,
    bos: bool | None = None,
) -> TextSpans:
    """A text cut into windows that a model scores.

    Arguments and errors are those of `measure_perplexity`, of which this is the half that needs no forward pass.
    """
    check_protocol(protocol, separator, stride, bos)
    window = choose_window(model, window, protocol)
    reading, documents = _read(source, protocol, separator, tokenizer)
    of_tokens = tokenizer is None and all(isinstance(document, Tensor) for document in documents)
    first = None if of_tokens and not bos else leading_bos(tokenizer, False if protocol == PAPERS else bos)
    sequences = [tokenize([document], tokenizer, bos=first).tolist() for document in documents]
    reading.say("perplexity", sum(map(len, sequences)))
    marks = 0 if first is None else 1
    lengths = [len(tokens) + marks for tokens in sequences]
    widths = [max(length, 2) if window is None else window for length in lengths]
    cut = [cut_windows(*pair, stride, first) for pair in zip(sequences, widths, strict=True)]
    spans = [span for several in cut for span in several]
    _check_length(sum(lengths), spans, None if protocol == "documents" else window)
    return TextSpans(spans, window, first is not None)


def whole_text(source: TextSource, tokenizer: Any) -> Document:
    """All that is to be scored as one text, or as token ids; chats in their template.

    `"world"` is the embedded world's held-out text, not the documents that its model was trained on.

    Raises:
        PrunekitError: what `documents_of` raises, or texts and token ids in one source.
    """
    return _read(source, "windows", None, tokenizer)[1][0]


def _read(source: TextSource, protocol: str, separator: str | None, tokenizer: Any) -> tuple[Reading, list[Document]]:
    if isinstance(source, str) and source == "world":
        from prunekit.world import validation_text

        source = validation_text()
    reading = Reading(source, tokenizer)
    documents = at_least_one(list(reading), source)
    tokens = [document for document in documents if isinstance(document, Tensor)]
    if tokens and len(tokens) < len(documents):
        raise PrunekitError("the data holds both texts and token ids; give one of the two")
    if tokens and separator is not None:
        raise PrunekitError(f"separator={separator!r} splits text, and the data is token ids; leave it out")
    if protocol == "documents":
        return reading, list(tokens) or split_documents(documents, separator)
    return reading, [torch.cat(tokens)] if tokens else ["\n\n".join(documents)]


def check_protocol(protocol: str, separator: str | None, stride: int | None, bos: bool | None) -> None:
    """Raises an error for an unknown protocol, or options that it does not allow."""
    check_choice("protocol", protocol, PROTOCOLS)
    if separator is not None and protocol != "documents":
        raise PrunekitError(f"separator={separator!r} splits documents; give protocol='documents' with it")
    if protocol == PAPERS and (bos or stride is not None):
        given = "bos=True" if bos else f"stride={stride}"
        raise PrunekitError(
            f"{given}, but the windows of protocol='papers' have no BOS and do not overlap; give protocol='windows' "
            "with it, or leave it out"
        )


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


def cut_windows(tokens: Sequence[int], window: int, stride: int | None = None, bos: int | None = None) -> list[Span]:
    """Windows over one token sequence; the last one may be shorter.

    Without a stride the windows do not overlap. With a stride below the window they do, and every token is scored
    exactly once, with up to `window - 1` tokens of context and never fewer than `window - stride` where the text has
    them. The first token of a window has no context and is not scored: that is BOS where it stands there, so that
    every token of the text is; else the first token of each window, or of the first one where windows overlap.

    Args:
        tokens: token ids of the whole sequence, without BOS.
        window: tokens a window, BOS included, at least 2.
        stride: tokens by which windows advance, in [1, window]; None or `window` for no overlap.
        bos: the token that stands first in every window; None for none.

    Returns:
        Spans with at least one scored token each.

    Raises:
        PrunekitError: the stride is outside its range.

    Source: LLM-Pruner's evaluation (windows of 128), which drops the last short window; here it counts.
    """
    width = text_width(window, bos)
    if stride is not None and not 1 <= stride <= window:
        raise PrunekitError(f"stride={stride}; it lies between 1 and the window, {window}, or is None for no overlap")
    stride = min(stride or window, width)
    marks, spans, scored = window - width, [], 0
    for first in range(0, len(tokens), stride):
        piece = begin_windows(torch.tensor(tokens[first : first + width]), bos)
        start = max(scored - first + marks, 1)
        if start < len(piece):
            spans.append(Span(tuple(piece.tolist()), start))
        scored = first + len(piece) - marks
        if scored >= len(tokens):
            break
    return spans


def split_documents(documents: Sequence[str], separator: str | None) -> list[Document]:
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
    found: list[Document] = [document.strip() for document in documents if document.strip()]
    if not found:
        raise PrunekitError(f"the text contains only {separator!r}; give a text with documents")
    return found


def _check_length(n_tokens: int, spans: Sequence[Span], window: int | None) -> None:
    """Raises an error for a text shorter than one window, or documents without a token to score."""
    if window is not None and n_tokens < window:
        raise PrunekitError(
            f"the text has {n_tokens} tokens, less than one window of {window}; "
            f"give a longer text, or window={max(n_tokens, 2)} or less"
        )
    if not spans:
        raise PrunekitError("every document is a single token, and the first token is never scored; give longer ones")


# --- published texts --------------------------------------------------------------------------------------------------

C4_PART = "en/c4-validation.00000-of-00008.json.gz"


@dataclass(frozen=True)
class StandardText:
    """A published text.

    Attributes:
        name: the name to ask for.
        hub: arguments of `datasets.load_dataset`.
        column: its texts there.
        between: what stands between two texts, where they are joined.
        files: names of its file in a folder of data, each tried in turn.
        limit: the first so many texts; None takes all.
    """

    name: str
    hub: dict[str, Any]
    column: str
    between: str
    files: tuple[str, ...]
    limit: int | None = None


TEXTS = {
    text.name: text
    for text in (
        StandardText(
            "wikitext2", {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"}, "text", "\n\n",
            ("wikitext2/test.txt", "wikitext2/wiki.test.raw", "wikitext2/wiki.test.tokens"),
        ),
        StandardText(
            "ptb", {"path": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet", "split": "test"},
            "sentence", " ", ("ptb/ptb.test.txt", "ptb/test.txt"),
        ),
        StandardText(
            "c4", {"path": "allenai/c4", "data_files": {"validation": C4_PART}, "split": "validation"},
            "text", " ", ("c4/validation.jsonl", "calibration/c4_demo.jsonl"), limit=1100,
        ),
    )
}  # fmt: skip


@checked
def standard_text(name: str, *, data_dir: FilePath | None = None) -> str:
    """A published text, joined as the papers join it, for `perplexity`.

    Args:
        name: `"wikitext2"` (the test set), `"ptb"` (the test set) or `"c4"` (the first 1,100 validation documents).
        data_dir: a folder that holds `wikitext2/test.txt`, `ptb/ptb.test.txt` or `c4/validation.jsonl`; None reads
            from the hub. A text file is read unchanged.

    Returns:
        The whole text.

    Raises:
        PrunekitError: there is no such text, or it cannot be read.

    Source: the loaders of SparseGPT and Wanda (`lib/data.py`), which join WikiText-2 by empty lines, and PTB and C4 by
    spaces. A local file may differ: `wiki.test.tokens` has `<unk>` for rare words.
    """
    if name not in TEXTS:
        raise PrunekitError(f"no text {name!r}; there are {', '.join(TEXTS)}; or give a text or a file of your own")
    text = TEXTS[name]
    texts = _from_hub(text) if data_dir is None else _from_files(text, data_dir)
    return text.between.join(texts[: text.limit])


def _from_hub(text: StandardText) -> list[str]:
    rows = load_hub(repr(text.hub["path"]), f"{text.files[0]} in it", **text.hub)
    return [Record(row, f"{text.hub['path']}, row {number}").text(text.column) for number, row in enumerate(rows)]


def _from_files(text: StandardText, data_dir: str | Path) -> list[str]:
    root = Path(data_dir).expanduser()
    folders_of(root, ())
    found = next((root / file for file in text.files if (root / file).is_file()), None)
    if found is None:
        raise PrunekitError(
            f"{text.name}: no file {root / text.files[0]}; give that ({' or '.join(text.files)}), or data_dir=None "
            f"to read {text.hub['path']} from the hub"
        )
    return read_documents(found)
