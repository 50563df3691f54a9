"""Documents from whatever somebody has: a file, a list, a data set, a string, or the embedded world."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunekit.errors import PrunekitError

DOCUMENT_SEPARATOR = "<|endoftext|>"
"""What TinyStories and many other plain-text corpora write between two documents."""

JOINT = "\n"
"""What stands between two documents in one stream of tokens; the embedded world was trained so."""

WORLD_DOCUMENTS = 2000  # about 80,000 tokens, generated in well under a second

TextSource = str | Path | Iterable[Any]

_ACCEPTED = (
    'a .txt, .json or .jsonl file, a string of text, documents (str, or records with a "text" field), '
    'a datasets.Dataset with a text column, or "world"'
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n{output}"
)


def read_documents(source: TextSource, *, separator: str | None = None) -> list[str]:
    """The documents that `source` holds, in order, empty ones left out.

    Args:
        source: a path to a .txt (one document), .jsonl or .json file (strings, or records with a `text`
            field, or Alpaca's `instruction`, `input`, `output`); a string of text; an iterable of documents;
            a `datasets.Dataset` with a text column; or `"world"`, `WORLD_DOCUMENTS` training documents of the
            embedded world. An existing file wins over the same string taken as text.
        separator: a marker that stands between documents inside one text, such as `DOCUMENT_SEPARATOR`;
            it is split off and does not come back. None leaves the text as it is.

    Returns:
        At least one document with something other than white space in it.

    Raises:
        PrunekitError: the file does not exist or cannot be read, a record has no text, or nothing is left.

    Source: the instruction template is Stanford Alpaca's, as LLM-Pruner's recovery uses it
        (Taori et al., 2023).
    """
    texts = _texts(source)
    if separator:
        texts = [piece.strip() for text in texts for piece in text.split(separator)]
    documents = [text for text in texts if text.strip()]
    if not documents:
        raise PrunekitError(f"{_shown(source)} holds no text; give {_ACCEPTED}")
    return documents


NO_TOKENIZER = (
    "a checkpoint that has no tokenizer gets one by tokenizer.json and tokenizer_config.json in its folder; where "
    "tokens were cut, that of the uncut model does not fit: plan.json lists under keep the old number of each new one"
)


def leading_bos(tokenizer: Any, asked: bool | None = None) -> int | None:
    """The token that stands first in every window of text: BOS, where the tokenizer puts it before a text by itself.

    Args:
        tokenizer: a transformers tokenizer.
        asked: True takes BOS also where the tokenizer does not add it, False takes none; None goes by the tokenizer.

    Returns:
        The id of BOS, or None where windows begin with text.

    Raises:
        PrunekitError: there is no tokenizer, or BOS is asked for and it has none.
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


def tokenize(documents: Sequence[str], tokenizer: Any, *, enough: int | None = None) -> Tensor:
    """One stream of tokens: the documents without any marker, one after the other, a line break between two.

    Args:
        documents: texts.
        tokenizer: a transformers tokenizer.
        enough: stop at the first document after which there are this many tokens; None reads all.

    Returns:
        int64 (n_tokens,).
    """
    ids: list[int] = []
    for number, document in enumerate(documents, start=1):
        ids.extend(encode(tokenizer, document if number == len(documents) else document + JOINT))
        if enough is not None and len(ids) >= enough:
            break
    return torch.tensor(ids, dtype=torch.long)


def text_width(width: int, bos: int | None) -> int:
    """Tokens of text in a window of `width` tokens, of which BOS is one where there is one."""
    return width if bos is None else width - 1


def begin_windows(tokens: Tensor, bos: int | None) -> Tensor:
    """BOS, where there is one, and then the text of each window: (…, n_tokens) → int64 (…, n_tokens + 1)."""
    return tokens if bos is None else torch.nn.functional.pad(tokens, (1, 0), value=bos)


def whole_windows(stream: Tensor, width: int, bos: int | None) -> Tensor:
    """A stream of tokens as windows side by side; what is left over at the end is dropped.

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


def _texts(source: TextSource) -> list[str]:
    """Texts before splitting, by the kind of source."""
    if isinstance(source, str | Path):
        file = _existing_file(source)
        if file is not None:
            return _read_file(file)
        if source == "world":
            from prunekit.world import documents

            return list(documents(WORLD_DOCUMENTS, split="train"))
        if _looks_like_path(source):
            raise PrunekitError(
                f'{str(source)!r} is not a file that exists; give a .txt, .json or .jsonl file, a text, or "world"'
            )
        return [str(source)]
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise PrunekitError(f"cannot read documents from {_shown(source)}; give {_ACCEPTED}")
    return [_text_of(record) for record in source]


def _existing_file(source: str | Path) -> Path | None:
    """The file of that name; None also for a text that no file system takes for a name."""
    try:
        path = Path(source).expanduser()
        return path if path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL byte, "~somebody"
        return None


def _looks_like_path(source: str | Path) -> bool:
    """Whether a string that is no existing file was still meant as one."""
    if isinstance(source, Path):
        return True
    if len(source) > 1024 or "\n" in source:
        return False
    known = Path(source).suffix in {".txt", ".json", ".jsonl"}
    one_word = not any(letter.isspace() for letter in source)
    return known or (one_word and (Path(source).suffix != "" or "/" in source or "\\" in source))


def _read_file(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            lines = text.split("\n")  # not splitlines: a JSON text may hold other line breaks
            return [_text_of(json.loads(line)) for line in lines if line.strip()]
        if path.suffix == ".json":
            records = json.loads(text)
            return [_text_of(record) for record in (records if isinstance(records, list) else [records])]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PrunekitError(f"cannot read {str(path)!r} as UTF-8 text: {error}") from error
    except PrunekitError as error:
        raise PrunekitError(f"{str(path)!r}: {error}") from error
    return [text]


def _text_of(record: Any) -> str:
    """The text of one record: itself, its `text`, or the filled-in instruction template."""
    if isinstance(record, str):
        return record
    if isinstance(record, Mapping):
        if isinstance(record.get("text"), str):
            return record["text"]
        if "instruction" in record and "output" in record:
            given = f"### Input:\n{record['input']}\n\n" if record.get("input") else ""
            return _ALPACA.format(instruction=record["instruction"], input=given, output=record["output"])
    fields = f"a record with {', '.join(map(str, record))}" if isinstance(record, Mapping) else _shown(record)
    raise PrunekitError(f'no text in {fields}; give strings, or records with a "text" field')


def _shown(value: object) -> str:
    """A value as it may stand in a message: short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({type(value).__name__})"
