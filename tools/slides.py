"""Slides: a notebook as reveal.js slides, by rule: `python tools/slides.py 00 07` writes build/slides/*.html.

A heading starts a slide, a code cell a slide below it, a folded answer appears at the next key press, and cells of
nothing but checks are left out. Where the tour executed a notebook, its outputs are on the slides.
"""

import argparse
import os
import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import nbformat
from nbconvert import SlidesExporter

ROOT = Path(__file__).parents[1]
FOLD = re.compile(r"<details><summary>(.*?)</summary>\s*(.+?)\s*</details>", re.S)


def pieces(cell: nbformat.NotebookNode) -> Iterator[tuple[str, str]]:
    """(kind of slide, source) of each part of a cell: split at headings and at folded answers."""
    if cell.cell_type == "code":
        code = [line for line in cell.source.splitlines() if line.strip() and not line.startswith("#")]
        checks = sum(line.startswith("assert") for line in code)
        yield ("skip" if 2 * checks > len(code) else "subslide"), cell.source
        return
    for part in re.split(r"^(?=#{1,3} )|(?=<details>)|(?<=</details>)\n", cell.source, flags=re.M):
        if part.strip():
            kind = "slide" if part.startswith("#") else "fragment" if FOLD.match(part) else "-"
            yield kind, FOLD.sub(r"**\1**\n\n\2", part)


def slides(book: nbformat.NotebookNode) -> str:
    """The notebook as one page of HTML."""
    made = nbformat.from_dict({**book, "cells": []})
    for cell in book.cells:
        for kind, source in pieces(cell):
            made.cells.append(deepcopy(cell))
            made.cells[-1].update(source=source, id=f"s{len(made.cells)}")
            made.cells[-1].metadata["slideshow"] = {"slide_type": kind}
    return SlidesExporter(reveal_scroll=True, reveal_theme="white").from_notebook_node(made)[0]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make slides from notebooks, executed by the tour or not.")
    parser.add_argument("numbers", nargs="*", default=[""], help="numbers of notebooks, such as 00 07; default: all")
    numbers, folder = parser.parse_args().numbers, Path(os.environ.get("PRUNEKIT_BUILD", "build"))
    (folder / "slides").mkdir(parents=True, exist_ok=True)
    paths = sorted(path for number in numbers for path in (ROOT / "notebooks").glob(f"{number}*_*.ipynb"))
    if not paths:
        parser.error(f"no notebook begins with {' or '.join(numbers)}; give numbers such as 00 or 07b")
    for path in paths:
        ran = folder / "notebooks" / path.name
        book = nbformat.read(ran if ran.is_file() else path, as_version=4)
        (out := folder / "slides" / f"{path.stem}.html").write_text(slides(book), encoding="utf-8")
        print(out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
