"""Printable answers, made from the notebooks and their exercises: `python tools/teaching.py`. The book has them too."""

import argparse
import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
BUILD = Path(os.environ.get("PRUNEKIT_BUILD", "build"))
# Estimates for headings that do not say it themselves, as "Exercise 1 (easy, 5 minutes)" does.
EFFORT = {
    "easy, 5 minutes": "query_rows pick",
    "medium, 10 minutes": "norm_factor keep_units attention_rule",
    "hard, 15 minutes": "half_space_step",
}
INTRODUCTION = """# Answers

For the teacher, to print. `python tools/teaching.py` makes this page from the notebooks and from `notebooks/exercises`.
A hint is what the check answers to one mistake; … in it stands for a value. Some efforts are our estimates.
"""


def exercises_of(book: nbformat.NotebookNode) -> Iterator[tuple[str, str]]:
    """Name and heading of each exercise, in the order of the notebook: a cell that calls `check_NAME` names it."""
    heading = "Exercise"
    for cell in book.cells:
        found = re.search(r"^#+ +(Exercise.*)$", cell.source, re.M)
        if cell.cell_type == "markdown" and found:
            heading = found[1]
        elif cell.cell_type == "code":
            for name in re.findall(r"\bex_\w+\.check_(\w+)\(", cell.source):
                yield name, heading


def with_effort(name: str, heading: str) -> str:
    """The heading, followed by difficulty and time, whether it gives them or not."""
    said = re.search(r"\*?\(((?:easy|medium|hard)[^)]*)\)\*?", heading)
    estimates = [effort for effort, names in EFFORT.items() if name in names.split()]
    effort = said[1] if said else next(iter(estimates), "effort not estimated")
    return f"{heading.replace(said[0], '').strip() if said else heading} ({effort})"


def text_of(node: ast.AST) -> str:
    """A literal text as it reads, with … for values put into it; "" for anything else."""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or "…" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def literals(node: ast.AST) -> Iterator[str]:
    """Sentences inside a function in the order of the source; the parts of an f-string are not taken apart."""
    if len(text_of(node).split()) > 4:
        yield text_of(node)
    elif not isinstance(node, ast.JoinedStr):
        for child in ast.iter_child_nodes(node):
            yield from literals(child)


def hints_of(name: str, functions: dict[str, ast.FunctionDef], seen: set[str]) -> Iterator[str]:
    """What the check `name` can answer, and the functions of its module that it calls."""
    if name in seen:
        return
    seen.add(name)
    for statement in functions[name].body[bool(ast.get_docstring(functions[name])) :]:
        yield from literals(statement)
    for called in ast.walk(functions[name]):
        if isinstance(called, ast.Call) and isinstance(called.func, ast.Name) and called.func.id in functions:
            yield from hints_of(called.func.id, functions, seen)


def solution_and_hints(module: Path, name: str) -> str:
    """Markdown of the solution's source and of each hint."""
    source = module.read_text(encoding="utf-8")
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    solution = ast.get_source_segment(source, functions[f"solution_{name}"])
    hints = ["- " + re.sub(r"([*_<|])", r"\\\1", hint) for hint in hints_of(f"check_{name}", functions, set())]
    return "\n".join([f"```python\n{solution}\n```", "", "What the check says:", "", *hints, ""])


def questions_of(book: nbformat.NotebookNode) -> str:
    """Markdown of the questions at the end, with their answers unfolded."""
    cells = [cell.source for cell in book.cells if cell.source.startswith("## Questions to answer")]
    fold = r"<details><summary>.*?</summary>\s*(.+?)\s*</details>"
    return "#" + re.sub(fold, r"*Answer.* \1", "\n".join(cells), flags=re.S)


def answers(notebooks: Path) -> str:
    """The page, in Markdown; its links are for the folder docs/teaching."""
    parts = [INTRODUCTION]
    for path in sorted(notebooks.glob("[0-9][0-9]*_*.ipynb")):
        book = nbformat.read(path, as_version=4)
        title = book.cells[0].source.splitlines()[0].removeprefix("# ")
        parts.append(f"## [{title}](../../notebooks/{path.name})\n")
        for name, heading in exercises_of(book):
            parts.append(f"### {with_effort(name, heading)}\n")
            parts.append(solution_and_hints(notebooks / "exercises" / f"ex_{path.name.split('_')[0]}.py", name))
        parts.append(questions_of(book) + "\n")
    return "\n".join(parts)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write the answers to all exercises and questions as one page.")
    parser.add_argument("--out", type=Path, default=BUILD / "teaching/answers.md", help="output")
    out = parser.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(answers(ROOT / "notebooks"), encoding="utf-8")
    print(out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
