"""Reads documents from files, lists, tables, data sets, chats, token ids, or the embedded world."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from prunekit.errors import PrunekitError
from prunekit.file_records import FORMATS, records_in

WORLD_DOCUMENTS = 2000  # about 80,000 tokens, generated in well under a second

TextSource = str | Path | Iterable[Any]
Document = str | Tensor  # a text, or its tokens, int64 (length,)

_ACCEPTED = (
    f"a file ({FORMATS}), a string of text, documents (str, or records), a DataFrame or datasets.Dataset with records, "
    'token ids, or "world"; a record has a "text", an "instruction" and "output", a "prompt" and "completion", '
    '"messages", "conversations" or "input_ids"'
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n{output}"
)
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}  # ShareGPT's → the usual
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
        raise PrunekitError(f"{_shown(source)} holds token ids, and text is needed here; give the text")
    return at_least_one(texts, source)


def at_least_one(documents: list[Any], source: object) -> list[Any]:
    """The documents.

    Raises:
        PrunekitError: the source has no documents.
    """
    if not documents and isinstance(source, Iterator):
        raise PrunekitError(
            f"{_shown(source)} holds no text; where it was read before, give a list, a file or a data set: an iterator "
            "can be read only once"
        )
    if not documents:
        raise PrunekitError(f"{_shown(source)} holds no text; give {_ACCEPTED}")
    return documents


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
        Texts with something in them, and tokens, int64 (length,) with length > 0.
    """
    for place, record in _records(source):
        for document in _documents_in(record, tokenizer, place):
            if isinstance(document, Tensor):
                if len(document):
                    yield document
                continue
            pieces = [piece.strip() for piece in document.split(separator)] if separator else [document]
            yield from (piece for piece in pieces if piece.strip())


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
        raise PrunekitError(f"cannot read documents from {_shown(source)}{splits}; give {_ACCEPTED}")
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


def _documents_in(record: Any, tokenizer: Any, place: str) -> Sequence[Document]:
    """The documents of one record; a batch of tokens has several."""
    if isinstance(record, str):
        return [record]
    if isinstance(record, Mapping):
        if "input_ids" in record:
            return _token_rows(record["input_ids"], record.get("attention_mask"), place)
        text = _text_of(record, tokenizer, place)
        if text is not None:
            return [text]
    elif isinstance(record, list | tuple) and record and isinstance(record[0], Mapping):
        return _documents_in({"messages": record}, tokenizer, place)
    elif isinstance(record, Tensor | np.ndarray | list | tuple):
        return _token_rows(record, None, place)
    fields = f"a record with {', '.join(map(str, record))}" if isinstance(record, Mapping) else _shown(record)
    raise PrunekitError(f"{_at(place)}no text in {fields}; give {_ACCEPTED}")


def _token_rows(ids: Any, mask: Any, place: str) -> list[Tensor]:
    """Rows of tokens, without padding."""
    try:
        tokens, real = torch.as_tensor(ids), torch.as_tensor(1 if mask is None else mask).bool()
        rows = tokens.expand(1, -1) if tokens.ndim == 1 else tokens
        kept = real.expand_as(rows)
    except (TypeError, ValueError, RuntimeError):
        rows = kept = torch.zeros(0)
    if rows.ndim != 2 or rows.is_floating_point() or rows.dtype == torch.bool:
        raise PrunekitError(
            f"{_at(place)}no text and no tokens in {_shown(ids)}; token ids are integers (length,) or (n, length)"
        )
    return [row[there].long().cpu() for row, there in zip(rows, kept, strict=True)]


def _text_of(record: Mapping[str, Any], tokenizer: Any, place: str) -> str | None:
    """The text of a record with columns; None where no column is known."""
    if isinstance(record.get("text"), str):
        return str(record["text"])
    if isinstance(record.get("instruction"), str) and isinstance(record.get("output"), str):
        given = f"### Input:\n{record['input']}\n\n" if record.get("input") else ""
        return _ALPACA.format(instruction=record["instruction"], input=given, output=record["output"])
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + completion
    if isinstance(prompt, list | tuple) and isinstance(completion, list | tuple):
        return _text_of({"messages": [*prompt, *completion]}, tokenizer, place)
    for column, role, content in (("messages", "role", "content"), ("conversations", "from", "value")):
        turns = record.get(column)
        if isinstance(turns, list | tuple | np.ndarray):  # of a Parquet file that pandas has read
            return _written([_turn(turn, role, content, place) for turn in turns], tokenizer, place)
    return None


def _turn(turn: Any, role: str, content: str, place: str) -> Mapping[str, Any]:
    """One turn of a chat as templates read it."""
    for by, text in ((role, content), ("role", "content")):
        if isinstance(turn, Mapping) and isinstance(turn.get(by), str) and text in turn:
            return {**turn, "role": _ROLES.get(turn[by], turn[by]), "content": turn[text]}
    raise PrunekitError(f"{_at(place)}a turn of a chat is {_shown(turn)}; give one with {role!r} and {content!r}")


def _written(turns: list[Any], tokenizer: Any, place: str) -> str:
    """A chat in the tokenizer's own template."""
    if not getattr(tokenizer, "chat_template", None):
        missing = "no tokenizer was given" if tokenizer is None else "this tokenizer has no chat template"
        raise PrunekitError(
            f"{_at(place)}a chat is written in the tokenizer's template, and {missing}; give a tokenizer with one "
            "(tokenizer.chat_template = ...), or the text"
        )
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception as error:  # templates raise exceptions of any type, such as for roles that do not alternate
        raise PrunekitError(f"{_at(place)}the tokenizer's chat template refuses this chat: {error}") from error


def _at(place: str) -> str:
    return f"{place}: " if place else ""


def _shown(value: object) -> str:
    """A value for a message: short, on one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:60]}… ({type(value).__name__})"
