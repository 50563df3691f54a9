"""The book: README, docs and executed notebooks as one HTML site with contents and search: `python tools/book.py`.

Sphinx builds it. The notebooks are those that the tour executed; one that it did not run stands there without outputs.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from sphinx.cmd.build import main as sphinx
from teaching import answers

ROOT = Path(__file__).parents[1]
PAGES = ("docs", "benchmarks/results", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE")
CONTENTS = """
```{{toctree}}
:hidden:
:caption: {caption}
{pages}
```
"""


def gather(notebooks: Path, executed: Path, source: Path) -> None:
    """Put the pages of the book into a new folder, in the layout of the repository, so that their links hold."""
    shutil.rmtree(source, ignore_errors=True)
    for name in PAGES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name)
        else:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    (source / "notebooks").mkdir()
    for path in sorted(notebooks.glob("[0-9][0-9]*_*.ipynb")):
        ran = executed / path.name
        shutil.copy(ran if ran.is_file() else path, source / "notebooks" / path.name)
    (source / "docs/teaching").mkdir(exist_ok=True)
    (source / "docs/teaching/answers.md").write_text(answers(notebooks), encoding="utf-8")
    parts = {
        "The notebooks": source.glob("notebooks/*.ipynb"),
        "For teachers": source.glob("docs/teaching/*.md"),
        "The library": source.glob("docs/*.md"),
    }
    listed = {
        caption: [path.relative_to(source).as_posix() for path in sorted(found)] for caption, found in parts.items()
    }
    listed["The library"] += ["CONTRIBUTING.md", "CHANGELOG.md"]
    contents = [CONTENTS.format(caption=caption, pages="\n".join(pages)) for caption, pages in listed.items()]
    (source / "index.md").write_text((ROOT / "README.md").read_text(encoding="utf-8") + "".join(contents), "utf-8")


def build(notebooks: Path, executed: Path, out: Path) -> int:
    """Write the site to `out/html`; 0 where every page and every link is right."""
    gather(notebooks, executed, out / "source")
    settings = ["-c", str(ROOT / "docs"), "-W", "--keep-going", "-q", "-E"]
    return sphinx([*settings, str(out / "source"), str(out / "html")])


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build README, docs and notebooks as one HTML site.")
    folder = Path(os.environ.get("PRUNEKIT_BUILD", "build"))
    parser.add_argument("--notebooks", type=Path, default=ROOT / "notebooks", help="folder of the series")
    parser.add_argument("--executed", type=Path, default=folder / "notebooks", help="notebooks that the tour executed")
    parser.add_argument("--out", type=Path, default=folder / "book", help="output")
    args = parser.parse_args()
    code = build(args.notebooks, args.executed, args.out)
    print(f"see {args.out / 'html' / 'index.html'}" if code == 0 else "book: see the lines above", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
