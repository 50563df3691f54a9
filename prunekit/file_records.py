"""Reads records from a file; the format follows from its name and first bytes."""

import codecs
import gzip
import io
import json
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import pandas as pd

from prunekit.errors import PrunekitError, reason

FORMATS = ".txt, .json, .jsonl, .ndjson, .csv, .tsv or .parquet, each also as .gz"


def records_in(path: Path) -> Iterator[tuple[str, Any]]:
    """Records of a file one after the other; lines and Parquet are read lazily.

    The kind goes by the suffix, in capitals or not, before a `.gz`; Parquet also by its first bytes. A .json file may
    hold JSON lines. Any other text file is one text.

    Args:
        path: a file that exists.

    Yields:
        (place, record): where it stands, for messages, such as `"a.jsonl, line 3"`, and the record: a mapping with a
        value a column, whatever a line of JSON holds, or the whole text.

    Raises:
        PrunekitError: the file cannot be read as what its name says, by file and line.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes] or [""]
    kind = suffixes[-2] if suffixes[-1] == ".gz" and len(suffixes) > 1 else suffixes[-1]
    try:
        with _opened(path) as file:
            first = file.read(4096)
            file.seek(0)
            if kind == ".parquet" or first.startswith(b"PAR1"):
                yield from _parquet(file, path)
                return
            wide = first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            encoding = "utf-16" if wide else "utf-8-sig"  # UTF-8 with a byte order mark or without
            if encoding != "utf-16" and b"\0" in first:
                raise PrunekitError(f"cannot read {str(path)!r}: it is no text; give {FORMATS}")
            with io.TextIOWrapper(file, encoding) as text:
                yield from _READERS.get(kind, _prose)(text, path)
    except (OSError, EOFError, UnicodeError, zlib.error) as error:
        raise PrunekitError(f"cannot read {str(path)!r} as text: {reason(error)}; give {FORMATS}, in UTF-8") from error


def _opened(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(path)) if packed else path.open("rb")


def _prose(text: IO[str], path: Path) -> Iterator[tuple[str, str]]:
    yield str(path), text.read()


def _lines(text: IO[str], path: Path) -> Iterator[tuple[str, Any]]:
    """One JSON value per line."""
    for number, line in enumerate(text, start=1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                yield place, json.loads(line)
            except (ValueError, RecursionError) as error:  # no JSON, numbers too long, too deep
                raise PrunekitError(f"{place}: this is no JSON ({reason(error)}); give one object a line") from error


def _json(text: IO[str], path: Path) -> Iterator[tuple[str, Any]]:
    """A list of records, one record, or JSON lines, which often have this suffix."""
    content = text.read()
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") != "Extra data":
            raise PrunekitError(
                f"cannot read {str(path)!r} as JSON ({reason(error)}); give a list of objects, or one object a line"
            ) from error
        yield from _lines(io.StringIO(content), path)
        return
    several = isinstance(found, list)
    for number, record in enumerate(found if several else [found], start=1):
        yield (f"{path}, record {number}" if several else str(path)), record


def _table(text: IO[str], path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a table with a header line; all values are text."""
    header = text.readline()
    text.seek(0)
    separator = max("\t,;" if ".tsv" in path.name.lower() else ",;\t", key=header.count)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header, which lose their end
            table = pd.read_csv(text, sep=separator, dtype=str, keep_default_na=False, index_col=False)
    except (ValueError, pd.errors.ParserError, pd.errors.ParserWarning) as error:  # also an empty file
        line = re.search(r"line (\d+)", str(error))
        where = f" (line {line[1]})" if line else ""
        raise PrunekitError(
            f"cannot read {str(path)!r} as a table{where}: give a header line with the names of the columns, and as "
            "many values a row, each with a separator in quotes"
        ) from error
    for number, row in enumerate(table.to_dict("records"), start=1):
        yield f"{path}, row {number}", cast(dict[str, str], row)


def _parquet(file: IO[bytes], path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        rows = (row for batch in ParquetFile(file).iter_batches() for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield f"{path}, row {number}", row
    except ArrowException as error:
        raise PrunekitError(
            f"cannot read {str(path)!r} as Parquet: it is cut short, damaged, or something else; restore it from its "
            "source"
        ) from error


_READERS: dict[str, Callable[[IO[str], Path], Iterator[tuple[str, Any]]]] = {
    ".json": _json,
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".csv": _table,
    ".tsv": _table,
}
