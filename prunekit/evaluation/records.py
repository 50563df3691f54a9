"""Reads rows of published data sets from local files or the hub, each with its place for messages."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit.errors import PrunekitError, reason
from prunekit.file_records import records_in

STEMS = {
    "train": ("train",),
    "dev": ("dev",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}  # split → what files of it are called


@dataclass(frozen=True)
class Record:
    """One row of a data set.

    Attributes:
        fields: column → value.
        place: where it stands, for messages: file and line, or data set and row.
    """

    fields: Mapping[str, Any]
    place: str

    def text(self, *path: str) -> str:
        """The text at a column, or at a nested column.

        Raises:
            PrunekitError: the column is missing or not text.
        """
        value = self.value(*path)
        if not isinstance(value, str):
            raise self.error(f"{'.'.join(path)!r} is {value!r:.40} and no text")
        return value

    def texts(self, *path: str) -> list[str]:
        """The list of texts at a column.

        Raises:
            PrunekitError: the column is missing or not a list of texts.
        """
        value = self.value(*path)
        if not isinstance(value, list | tuple) or not value or not all(isinstance(text, str) for text in value):
            raise self.error(f"{'.'.join(path)!r} is {value!r:.40}, not a list of texts")
        return list(value)

    def label(self, value: Any, allowed: Sequence[Any]) -> int:
        """The place of a label among those allowed, which may also be written as text.

        Raises:
            PrunekitError: it is not one of them.
        """
        texts = [str(one) for one in allowed]
        if str(value) not in texts:
            raise self.error(f"the label is {value!r:.40}; it must be one of {', '.join(map(repr, allowed))}")
        return texts.index(str(value))

    def value(self, *path: str) -> Any:
        """The value at a column, or at a nested column.

        Raises:
            PrunekitError: there is no such column.
        """
        found: Any = self.fields
        for depth, name in enumerate(path):
            if not isinstance(found, Mapping) or name not in found:
                raise self.error(f"{'.'.join(path[: depth + 1])!r} is missing; it has {_shown(self.fields)}")
            found = found[name]
        return found

    def error(self, what: str) -> PrunekitError:
        """An error that names this row."""
        return PrunekitError(f"{self.place}: {what}")


def read_hub(path: str, config: str | None, split: str) -> Iterator[Record]:
    """Rows of a split of a data set on the hub.

    Raises:
        PrunekitError: it cannot be read: no network, no such data set.
    """
    import datasets

    try:
        rows = datasets.load_dataset(path, config, split=split)
    except Exception as error:  # the library raises errors of a dozen kinds
        raise PrunekitError(
            f"cannot read {path!r} ({config or 'default'}, {split}) from the hub ({reason(error)}); without a "
            "network, give data_dir= (--data-dir) with the files"
        ) from error
    for number, fields in enumerate(rows):
        yield Record(fields, f"{path} ({split}), row {number}")


def read_files(folder: Path, split: str) -> Iterator[Record] | None:
    """Rows of a split from JSON lines or Parquet files in a folder; None if there are no such files.

    Labels in a separate file (PIQA's `valid-labels.lst` beside `valid.jsonl`) become the column `label`.

    Raises:
        PrunekitError: several files could be meant; or, as rows are read, a line is malformed.
    """
    for stem in STEMS[split]:
        for ending in (".jsonl", ".parquet"):
            files = _files_of(folder, stem, ending)
            if files:
                return _read(files)
    return None


def _files_of(folder: Path, stem: str, ending: str) -> list[Path]:
    """The file of that name, else the parts of a split, else the only file whose name contains the stem as a word."""
    if (folder / f"{stem}{ending}").is_file():
        return [folder / f"{stem}{ending}"]
    files = sorted(folder.glob(f"*{ending}"))
    alike = [
        file for file in files if stem in file.name.removesuffix(ending).replace("_", "-").replace(".", "-").split("-")
    ]
    pieces = [file for file in alike if "-of-" in file.name]
    if len(alike) > 1 and len(pieces) < len(alike):
        raise PrunekitError(
            f"{', '.join(file.name for file in alike)} in {str(folder)!r} could each be meant; rename the one to read "
            f"to {stem}{ending}"
        )
    return alike


def _read(files: Sequence[Path]) -> Iterator[Record]:
    for file in files:
        labels_file = file.with_name(f"{file.stem}-labels.lst")
        labels = labels_file.read_text(encoding="utf-8").split() if labels_file.is_file() else None
        for number, (place, fields) in enumerate(records_in(file)):
            if not isinstance(fields, dict):
                raise PrunekitError(f"{place}: {fields!r:.40} is no JSON object with columns")
            if labels is not None and "label" not in fields:
                if number >= len(labels):
                    raise PrunekitError(f"{place}: {labels_file.name} ends after {len(labels)} labels; give one a line")
                fields["label"] = labels[number]
            yield Record(fields, place)


def read_csv(file: Path, columns: Sequence[str]) -> Iterator[Record]:
    """Rows of a CSV file without a header.

    Raises:
        PrunekitError: a row has another number of columns.
    """
    with file.open(encoding="utf-8", newline="") as opened:
        reader = csv.reader(opened)
        for row in reader:
            place = f"{file}, line {reader.line_num}"
            if len(row) != len(columns):
                raise PrunekitError(f"{place}: {len(row)} columns; {len(columns)} are needed: {', '.join(columns)}")
            yield Record(dict(zip(columns, row, strict=True)), place)


def folders_of(data_dir: str | Path, names: Sequence[str]) -> list[Path]:
    """Folders with these names, in a folder or one level below, in the order of the names.

    Raises:
        PrunekitError: the folder does not exist.
    """
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise PrunekitError(f"data_dir={str(data_dir)!r} is no folder; give one that holds a folder a task")
    found = [folder for name in names for folder in (root / name, *sorted(root.glob(f"*/{name}"))) if folder.is_dir()]
    return list(dict.fromkeys(found))


def _shown(fields: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, fields)) or "no columns"
