"""The texts of the papers' perplexities by name: WikiText-2, PTB and C4."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit.checks import FilePath, checked
from prunekit.documents import read_documents
from prunekit.errors import PrunekitError, reason
from prunekit.evaluation.records import Record, folders_of


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
            "wikitext2",
            {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"},
            "text",
            "\n\n",
            ("wikitext2/test.txt", "wikitext2/wiki.test.raw", "wikitext2/wiki.test.tokens"),
        ),
        StandardText(
            "ptb",
            {"path": "ptb-text-only/ptb_text_only", "revision": "refs/convert/parquet", "split": "test"},
            "sentence",
            " ",
            ("ptb/ptb.test.txt", "ptb/test.txt"),
        ),
        StandardText(
            "c4",
            {
                "path": "allenai/c4",
                "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
                "split": "validation",
            },
            "text",
            " ",
            ("c4/validation.jsonl", "calibration/c4_demo.jsonl"),
            1100,
        ),
    )
}


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
    import datasets

    try:
        rows = datasets.load_dataset(**text.hub)
    except Exception as error:  # the library raises errors of a dozen kinds
        raise PrunekitError(
            f"cannot read {text.hub['path']!r} from the hub ({reason(error)}); without a network, give data_dir= "
            f"(--data-dir) with {text.files[0]} in it"
        ) from error
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
