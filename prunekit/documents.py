"""Reads documents from files, lists, tables, data sets, chats, token ids, or the embedded world."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from prunekit.annotations import is_texts, shown
from prunekit.errors import PrunekitError
from prunekit.file_records import FORMATS, records_in
from prunekit.text import TextWithReplies, answered, written_chat

WORLD_DOCUMENTS = 2000  # about 80,000 tokens, generated in well under a second

logger = logging.getLogger("prunekit")

TextSource = str | Path | Iterable[Any]
Document = str | Tensor  # a text, or its tokens, int64 (length,)

_ACCEPTED = (
    f"a file ({FORMATS}), a string of text, documents (str, or records), a DataFrame or datasets.Dataset with records, "
    'batches of these, token ids, or "world"; a record has a "text", an "instruction" and "output", a "prompt" and '
    '"completion", "messages", "conversations" or "input_ids"'
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
_LISTS = list | tuple | np.ndarray  # the last of a Parquet file that pandas has read
_TEXT_FILES = {".txt", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"}


def read_documents(source: TextSource, *, separator: str | None = None, tokenizer: Any = None) -> list[str]:
    """Reads the documents of a source as texts, in order, without empty ones.

    Args:
        source: a path to a file (.txt is one document; .json, .jsonl, .ndjson, .csv, .tsv, .parquet hold records; each
            may be a .gz); a string of text; an iterable, a DataFrame or a `datasets.Dataset` of records; or `"world"`,
            `WORLD_DOCUMENTS` training documents of the embedded world. An existing file wins over the same string taken
            as text. A record is a string, or has a `text`, or Alpaca's `instruction`, `input` and `output`, or a
            `prompt` and `completion`, or a chat: `messages` with `role` and `content`, or `conversations` with `from`
            and `value`.
        separator: a marker that stands between documents inside one text, such as `DOCUMENT_SEPARATOR`;
            it is removed. None does not split the text.
        tokenizer: a transformers tokenizer; chats are written in its template.

    Returns:
        At least one document with something other than white space in it.

    Raises:
        PrunekitError: the file does not exist or cannot be read, a record has no text or is tokens, a chat and no
            template, or nothing is left.

    Source: the instruction template is Stanford Alpaca's, as LLM-Pruner's recovery uses it
        (Taori et al., 2023).
    """
    documents = list(documents_of(source, tokenizer, separator=separator))
    texts = [document for document in documents if isinstance(document, str)]
    if len(texts) < len(documents):
        raise PrunekitError(f"{shown(source, 80)} holds token ids, and text is needed here; give the text")
    return at_least_one(texts, source)


def at_least_one(documents: list[Any], source: object) -> list[Any]:
    """The documents.

    Raises:
        PrunekitError: the source has no documents.
    """
    if documents:
        return documents
    once = "where it was read before, give a list, a file or a data set: an iterator can be read only once"
    advice = once if isinstance(source, Iterator) else f"give {_ACCEPTED}"
    raise PrunekitError(f"{shown(source, 80)} holds no text; {advice}")


def is_stream(source: object) -> bool:
    """Whether a source has no known length, such as a generator or a streamed data set."""
    if isinstance(source, str | Path) or not isinstance(source, Iterable):
        return False
    try:
        return len(source) < 0  # type: ignore[arg-type]
    except TypeError:  # no length, as a DataLoader over a stream
        return True


def documents_of(source: TextSource, tokenizer: Any = None, *, separator: str | None = None) -> Iterator[Document]:
    """Documents of a source one after the other, read lazily.

    Arguments and errors are those of `read_documents`; here also token ids are documents: integers (n, length), a
    list of lists of integers, records with `input_ids`, or batches of any of these, such as a DataLoader gives. Where
    a record has an `attention_mask`, padding is left out.

    Yields:
        Texts with something in them, and tokens, int64 (length,) with length > 0. A text that says which part of it
        replies is a `TextWithReplies`, and is not split.
    """
    return iter(Reading(source, tokenizer, separator=separator))


class Reading:
    """Documents of a source, as `documents_of` gives them, and what was read so far.

    Attributes:
        columns: columns that were read, or how else a record was understood; empty for plain texts.
        n_documents: documents that were given out.
    """

    def __init__(self, source: TextSource, tokenizer: Any = None, *, separator: str | None = None) -> None:
        if separator == "":
            raise PrunekitError("separator='' splits nothing; name the marker between documents, or give None")
        self.columns: dict[str, None] = {}  # in the order in which they were met
        self.n_documents = 0
        self._source = source
        self._documents = self._read(tokenizer, separator)

    def __iter__(self) -> Iterator[Document]:
        return self._documents

    def _read(self, tokenizer: Any, separator: str | None) -> Iterator[Document]:
        for place, record in _records(self._source):
            columns, documents = _documents_in(record, tokenizer, f"{place}: " if place else "")
            self.columns |= dict.fromkeys([columns] if columns else [])
            for document in documents:
                for piece in _pieces(document, separator):
                    self.n_documents += 1
                    yield piece

    def say(self, use: str, n_tokens: int) -> None:
        """Log what was read.

        Args:
            use: what for, such as `"calibration"`.
            n_tokens: tokens that it takes, or draws from.
        """
        documents = f"{self.n_documents:,} document{'s' * (self.n_documents != 1)}"
        columns = f" (from {', '.join(self.columns)})" if self.columns else ""
        logger.info("%s read %s%s of %s: %s tokens", use, documents, columns, _named(self._source), f"{n_tokens:,}")


def _pieces(document: Document, separator: str | None) -> Sequence[Document]:
    """A document in the parts that a separator makes of it, without empty ones."""
    if isinstance(document, Tensor):
        return [document] if len(document) else []
    if separator is None or isinstance(document, TextWithReplies):  # in a chat the separator ends a turn
        return [document] if document.strip() else []
    return [piece.strip() for piece in document.split(separator) if piece.strip()]


def _records(source: Any) -> Iterator[tuple[str, Any]]:
    """(place, record) of a source; the place is empty if the source is not a file."""
    if isinstance(source, str | Path):
        file = _existing_file(source)
        if file is not None:
            return records_in(file)
        if source == "world":
            from prunekit.world import documents

            return (("", text) for text in documents(WORLD_DOCUMENTS, split="train"))
        if _looks_like_path(source):
            raise PrunekitError(
                f'{str(source)!r} is not a file that exists; give a file ({FORMATS}), a text, or "world"'
            )
        return iter([("", str(source))])
    if isinstance(source, pd.DataFrame):
        return (("", row) for row in source.to_dict("records"))
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        splits = f"; of its parts {', '.join(map(repr, source))} give one" if isinstance(source, Mapping) else ""
        raise PrunekitError(f"cannot read documents from {shown(source, 80)}{splits}; give {_ACCEPTED}")
    return (("", record) for record in source)


def _existing_file(source: str | Path) -> Path | None:
    """The file of that name; None if there is none or the text cannot be a file name."""
    try:
        path = Path(source).expanduser()
        return path if path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL byte, "~user"
        return None


def _looks_like_path(source: str | Path) -> bool:
    """Whether a string without an existing file looks like a file name."""
    if isinstance(source, Path):
        return True
    if len(source) > 1024 or "\n" in source:
        return False
    known = Path(source).suffix.lower() in {*_TEXT_FILES, ".gz"}
    one_word = not any(letter.isspace() for letter in source)
    return known or (one_word and (Path(source).suffix != "" or "/" in source or "\\" in source))


def _documents_in(record: Any, tokenizer: Any, at: str) -> tuple[str, Sequence[Document]]:
    """How a record was understood, and its documents; a batch has several."""
    if isinstance(record, str):
        return "", [record]
    if isinstance(record, Mapping):
        if "input_ids" in record:
            return "input_ids", _token_rows(record["input_ids"], record.get("attention_mask"), at)
        if is_texts(record.get("text")):  # a batch, as a DataLoader makes it
            return "text", record["text"]
        columns, found = _text_of(record, tokenizer, at)
        if found is not None:
            return columns, [found]
    elif isinstance(record, list | tuple) and record and isinstance(record[0], Mapping):
        return _documents_in({"messages": record}, tokenizer, at)
    elif is_texts(record):
        return "", record
    elif isinstance(record, Tensor | np.ndarray | list | tuple):
        return "", _token_rows(record, None, at)
    fields = f"a record with {', '.join(map(str, record))}" if isinstance(record, Mapping) else shown(record, 80)
    raise PrunekitError(f"{at}no text in {fields}; give {_ACCEPTED}")


def _token_rows(ids: Any, mask: Any, at: str) -> list[Tensor]:
    """Rows of tokens, without padding."""
    try:
        tokens, real = torch.as_tensor(ids), torch.as_tensor(1 if mask is None else mask).bool()
        rows = tokens.expand(1, -1) if tokens.ndim == 1 else tokens
        kept = real.expand_as(rows)
    except (TypeError, ValueError, RuntimeError):
        rows = kept = torch.zeros(0)
    if rows.ndim != 2 or rows.is_floating_point() or rows.dtype == torch.bool:
        raise PrunekitError(
            f"{at}no text and no tokens in {shown(ids, 80)}; token ids are integers (length,) or (n, length)"
        )
    return [row[there].long().cpu() for row, there in zip(rows, kept, strict=True)]


def _text_of(record: Mapping[str, Any], tokenizer: Any, at: str) -> tuple[str, str | None]:
    """The columns and the text of a record; None where no column is known."""
    if isinstance(record.get("text"), str):
        return "text", str(record["text"])
    if isinstance(record.get("instruction"), str) and isinstance(record.get("output"), str):
        given = f"### Input:\n{record['input']}\n\n" if record.get("input") else ""
        asked = _ALPACA.format(instruction=record["instruction"], input=given)
        return "instruction and output", answered(asked, record["output"])
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return "prompt and completion", answered(prompt, completion)
    if isinstance(prompt, _LISTS) and isinstance(completion, _LISTS):
        return "prompt and completion", _text_of({"messages": [*prompt, *completion]}, tokenizer, at)[1]
    for column, names in (("messages", ("role", "content")), ("conversations", ("from", "value"))):
        turns = record.get(column)
        if isinstance(turns, _LISTS):
            return column, written_chat(list(turns), tokenizer, names, at)
    return "", None


def _named(source: object) -> str:
    """A source in few words."""
    if isinstance(source, str | Path):
        text = str(source)
        return text if source == "world" or _existing_file(source) else f"a text of {len(text):,} characters"
    return f"a {type(source).__name__}"
