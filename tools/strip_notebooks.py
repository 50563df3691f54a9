"""The form of notebooks that is committed: `python tools/strip_notebooks.py notebooks/*.ipynb` strips them in place."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import nbformat

from prunekit.files import write_text


def stripped(text: str) -> str:
    """A notebook's JSON without what running it left: outputs, counts, widget state, most metadata."""
    book = nbformat.reads(text, as_version=4)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    book.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    for cell in book.cells:
        cell.metadata = nbformat.from_dict({key: cell.metadata[key] for key in ("tags",) if key in cell.metadata})
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
    return nbformat.writes(book) + "\n"


def strip(path: Path) -> bool:
    """Strip a notebook in place; True where that changed it."""
    before = path.read_text(encoding="utf-8")
    after = stripped(before)
    if changed := after != before:
        write_text(path, after)
    return changed


def _existing(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return Path(text)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 1 where a notebook was changed, as hooks do, else 0."""
    parser = argparse.ArgumentParser(description="Strip notebooks of outputs, counts and widget state.")
    parser.add_argument("notebooks", type=_existing, nargs="+", metavar="NOTEBOOK")
    return int(any([strip(path) for path in parser.parse_args(argv).notebooks]))


if __name__ == "__main__":
    raise SystemExit(main())
