"""Rows of published data sets from local files or the hub, and the questions that they hold.

Questions have lm-evaluation-harness's prompts.
"""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit.errors import PrunekitError, reason
from prunekit.file_records import records_in
from prunekit.questions import Question

# Split → what files of it are called.
STEMS = {"train": ("train",), "dev": ("dev",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}


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
                columns = ", ".join(map(repr, self.fields)) or "no columns"
                raise self.error(f"{'.'.join(path[: depth + 1])!r} is missing; it has {columns}")
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
    rows = load_hub(f"{path!r} ({config or 'default'}, {split})", "the files", path, config, split=split)
    for number, fields in enumerate(rows):
        yield Record(fields, f"{path} ({split}), row {number}")


def load_hub(what: str, files: str, *args: Any, **options: Any) -> Any:
    """A data set of the hub.

    Args:
        what: it is, for messages.
        files: that can be given in its place, for messages.
        args: of `datasets.load_dataset`.
        options: of the same.

    Raises:
        PrunekitError: it cannot be read: no network, no such data set.
    """
    import datasets

    try:
        return datasets.load_dataset(*args, **options)
    except Exception as error:  # the library raises errors of a dozen kinds
        raise PrunekitError(
            f"cannot read {what} from the hub ({reason(error)}); without a network, give data_dir= (--data-dir) with "
            f"{files}"
        ) from error


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


LETTERS = ("A", "B", "C", "D")  # of MMLU's choices


def _question(context: str, choices: Iterable[str], answer: int, domain: str) -> Question:
    """A question whose choices follow the context after a space."""
    return Question(context, tuple(f" {choice}" for choice in choices), answer, domain)


def read_boolq(row: Record) -> Question:
    """SuperGLUE has `label`; the data set's own form has a truth value `answer`."""
    said = "label" in row.fields
    label = row.label(row.value("label"), (0, 1)) if said else row.label(row.value("answer"), (False, True))
    context = f"{row.text('passage')}\nQuestion: {row.text('question')}?\nAnswer:"
    return _question(context, ("no", "yes"), label, "reading")


def read_piqa(row: Record) -> Question:
    """A goal and two solutions."""
    context = f"Question: {row.text('goal')}\nAnswer:"
    return _question(context, (row.text("sol1"), row.text("sol2")), row.label(row.value("label"), (0, 1)), "physics")


def read_hellaswag(row: Record) -> Question:
    """The context in two parts, or whole as `ctx`, whose second sentence begins with a capital already."""
    parts = "ctx_a" in row.fields
    context = f"{row.text('ctx_a')} {row.text('ctx_b').capitalize()}" if parts else row.text("ctx")
    endings = [_clean(ending) for ending in row.texts("endings")]
    label = row.label(row.value("label"), range(len(endings)))
    return _question(_clean(f"{row.text('activity_label')}: {context}"), endings, label, "script")


def _clean(text: str) -> str:
    """The text without WikiHow's markup. Source: lm-evaluation-harness, `hellaswag/utils.py`."""
    return re.sub("\\[.*?\\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def read_winogrande(row: Record) -> Question:
    """The choices fill the gap, and the text after it is scored."""
    sentence, options = row.text("sentence"), (row.text("option1"), row.text("option2"))
    before, gap, after = sentence.partition("_")
    if not gap:
        raise row.error(f"'sentence' has no gap _: {sentence[:60]!r}")
    label = row.label(row.value("answer"), (1, 2))
    contexts = tuple(before + option for option in options)
    return Question("", (f" {after.strip()}",) * 2, label, "coreference", contexts=contexts)


def read_arc(row: Record) -> Question:
    """Choices with letters or numbers, of which `answerKey` names one."""
    return _labelled(row, f"Question: {row.text('question')}\nAnswer:")


def read_openbookqa(row: Record) -> Question:
    """The beginning of a sentence, and its ends."""
    return _labelled(row, row.text("question_stem"))


def _labelled(row: Record, context: str) -> Question:
    """Choices that have letters or numbers beside them."""
    label = row.label(row.text("answerKey").strip(), row.texts("choices", "label"))
    choices = row.texts("choices", "text")
    if label >= len(choices):
        raise row.error(f"{len(choices)} texts for {len(row.texts('choices', 'label'))} labels in 'choices'")
    return _question(context, choices, label, "science")


def read_mmlu(row: Record) -> Question:
    """The hub has a list of choices and a number; the original files four columns and a letter."""
    original = "A" in row.fields
    choices = [row.text(letter) for letter in LETTERS] if original else row.texts("choices")
    if len(choices) != len(LETTERS):
        raise row.error(f"{len(choices)} choices; there are {len(LETTERS)}")
    label = row.label(row.value("answer"), LETTERS if original else range(len(LETTERS)))
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
    return _question(f"{row.text('question').strip()}\n{listed}\nAnswer:", LETTERS, label, "")


def read_lambada(row: Record) -> Question:
    """One choice, the last word: correct if each of its tokens is the greedy choice."""
    whole = f"{row.text('context')} {row.text('continuation')}" if "continuation" in row.fields else row.text("text")
    context, gap, word = whole.rpartition(" ")
    if not gap:
        raise row.error(f"a single word has no context: {whole[:60]!r}")
    return Question(context, (f" {word}",), 0, "last word")
