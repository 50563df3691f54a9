"""Every committed notebook: its form, its exercises, and that it runs from the first cell to the last.

`make lint` runs the tests whose name says `form`.
"""

import ast
import json
import re
import runpy
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from strip_notebooks import stripped

from prunekit.cli import notebook_runs, notebooks
from prunekit.cli.notebooks import SERIES as SERIES_NAMES

FOLDER = Path(__file__).parents[1] / "notebooks"
SERIES = sorted(FOLDER.glob(SERIES_NAMES))
EXERCISES = sorted((FOLDER / "exercises").glob("ex_[0-9][0-9]*.py"))
NAME = re.compile(r"(\d\d[a-z]?)_[a-z_]+")  # NN_verb_object, or NNb_verb_object for a notebook between two others
CELLS = 25  # at least
LINES = 12  # of a code cell; aim at 3 to 10
OPENING = ("objectives", "time", "hardware", "prerequisites")
QUESTIONS = range(3, 6)  # at the end of a notebook, each with a folded answer
RIGHT = "✓"  # how a check's answer begins when the exercise is solved

each_notebook = pytest.mark.parametrize("path", SERIES, ids=lambda path: path.stem)
each_exercise = pytest.mark.parametrize("path", EXERCISES, ids=lambda path: path.stem)


def number_of(path):
    return NAME.fullmatch(path.stem)[1]


# --- form -------------------------------------------------------------------------------------------------------------


def form_faults(text, number):
    """What is wrong with the form of notebook `number`, one line a fault."""
    book = nbformat.reads(text, as_version=4)
    code, prose = ([cell for cell in book.cells if cell.cell_type == kind] for kind in ("code", "markdown"))
    return [
        *(["not stripped: python tools/strip_notebooks.py"] if stripped(text) != text else []),
        *([f"{len(book.cells)} cells, less than {CELLS}"] if len(book.cells) < CELLS else []),
        *id_faults(text),
        *opening_faults(book.cells[0]),
        *(f"cell {cell.id}: {fault}" for cell in prose for fault in fold_faults(cell.source)),
        *question_faults([cell.source for cell in prose]),
        *(f"cell {cell.id}: {fault}" for cell in code for fault in code_faults(cell.source)),
        *exercise_faults("\n".join(cell.source for cell in code), number),
    ]


def id_faults(text):
    raw = json.loads(text)
    ids = [cell.get("id") for cell in raw["cells"]]
    return ["cells without an id of their own"] if None in ids or len(set(ids)) < len(ids) else []


def opening_faults(cell):
    if cell.cell_type != "markdown" or not cell.source.startswith("# "):
        return ["the first cell has no title"]
    return [f"the first cell does not say: {word}" for word in OPENING if word not in cell.source.lower()]


def fold_faults(source):
    """What a reader should not see before running the cells: answers, unless they are folded and render inside."""
    if re.search(r"^(\*\*|#+ )What you saw", source, re.M):
        yield "What you saw stands open: put it into <details>"
    whole = re.findall(r"^<details><summary>[^\n]+</summary>\n\n.+?\n\n</details>$", source, re.M | re.S)
    if not len(whole) == source.count("<details>") == source.count("</details>"):
        yield "<details><summary>…</summary>, a blank line, text, a blank line, </details>: one of them is missing"


def question_faults(texts):
    answers = [text.count("<details>") for text in texts if text.startswith("## Questions to answer\n")]
    if len(answers) != 1 or answers[0] not in QUESTIONS:
        yield f"no cell '## Questions to answer' with {min(QUESTIONS)} to {max(QUESTIONS)} folded answers"


def code_faults(source):
    lines = [line for line in source.splitlines() if line.strip()]
    if len(lines) > LINES:
        yield f"{len(lines)} lines, more than {LINES}"
    if "sys.path" in source:
        yield "sys.path: what a notebook needs is in the package"
    if re.search(r"^\s*[!%]", source, re.M):
        yield "a shell line or a magic"


def exercise_faults(code, number):
    if f"ex_{number}.check_" not in code:
        yield f"no exercise: from exercises import ex_{number}, then ex_{number}.check_…(answer)"
    if "assert " not in code:
        yield "nothing that was seen is asserted"


@each_notebook
def test_form(path):
    faults = form_faults(path.read_text(encoding="utf-8"), number_of(path))
    assert not faults, "\n".join([path.name, *faults])


FOLDED = "<details><summary>Answer</summary>\n\nSo it is.\n\n</details>"


def well_formed():
    opening = new_markdown_cell("# Title\n" + "\n\n".join(f"**{word.title()}** …" for word in OPENING), id="c0")
    questions = new_markdown_cell("## Questions to answer\n\n" + 3 * f"Why?\n\n{FOLDED}\n\n", id="questions")
    exercise = "from exercises import ex_07\nassert True\nex_07.check_sum(1)"
    cells = [new_code_cell(exercise if number == 1 else "x = 1", id=f"c{number}") for number in range(1, 25)]
    return new_notebook(cells=[opening, *cells, questions])


def spoil(what, book):
    first = book.cells[1]
    if what == "outputs":
        first.outputs = [nbformat.v4.new_output("stream", text="old")]
    elif what == "count":
        first.execution_count = 1
    elif what == "cells":
        book.cells = book.cells[:20]
    elif what == "title":
        book.cells[0].source = "Objectives, time, hardware"
    elif what == "hardware":
        book.cells[0].source = "# Title\nobjectives, time, prerequisites"
    else:
        first.source = what + "\n" + first.source


SPOILED = ["outputs", "count", "cells", "title", "hardware", "import sys; sys.path.append('..')", "!pip install x"]


@pytest.mark.parametrize("what", [*SPOILED, "%pip install x", "x = 1\n" * LINES], ids=lambda what: what[:12].strip())
def test_form_faults_are_seen(what):
    book = well_formed()
    assert not form_faults(stripped(nbformat.writes(book)), "07")
    text = stripped(nbformat.writes(book))
    book = nbformat.reads(text, as_version=4)
    spoil(what, book)
    assert form_faults(nbformat.writes(book) + "\n", "07")


@pytest.mark.filterwarnings("ignore::nbformat.warnings.DuplicateCellId")
def test_form_wants_ids_exercise_and_assertion():
    text = stripped(nbformat.writes(well_formed()))
    assert form_faults(text, "08") and form_faults(text.replace("assert True", "pass"), "07")
    assert form_faults(text.replace('"id": "c3"', '"id": "c2"'), "07")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Why?", "**What you saw.** It fell."),  # an answer that stands open
        ("</summary>\n\n", "</summary>\n"),  # Markdown inside does not render
        ("\n\n</details>", ""),  # the rest of the notebook is folded too
        ("## Questions to answer", "## Questions"),
        (FOLDED, ""),  # fewer than three answers
    ],
)
def test_form_wants_answers_folded(old, new):
    book = well_formed()
    book.cells[-1].source = book.cells[-1].source.replace(old, new, 1)
    assert form_faults(stripped(nbformat.writes(book)), "07")


@each_notebook
def test_form_small_models_run_on_one_thread(path):
    """In VS Code and plain JupyterLab too: two notebooks at once on all threads did not end in eight minutes."""
    real = path.name.startswith("12_")  # its model is large enough for more
    assert real or "torch.set_num_threads(1)" in path.read_text(encoding="utf-8")


def test_form_series_begins_at_zero_and_has_no_number_twice():
    """Numbers may be left out for notebooks to come."""
    numbers = [number_of(path) for path in SERIES]
    assert numbers[0] == "00" and len(set(numbers)) == len(numbers)


# --- exercises --------------------------------------------------------------------------------------------------------


def exercise_problems(path):
    """Each `check_X(answer)` says ✓ to `solution_X`, and to `stub_X` a hint."""
    defined = runpy.run_path(str(path))
    names = [name.removeprefix("check_") for name in defined if name.startswith("check_")]
    if not names:
        yield f"{path.name} has no check_ function"
    for name in names:
        check = defined[f"check_{name}"]
        told, hint = check(defined[f"solution_{name}"]), check(defined[f"stub_{name}"])
        if not told.startswith(RIGHT):
            yield f"check_{name}(solution_{name}) says: {told}"
        if hint.startswith(RIGHT) or len(hint) < 20:
            yield f"check_{name}(stub_{name}) gives no hint: {hint!r}"


@each_notebook
def test_notebook_has_an_exercise_file(path):
    assert (FOLDER / "exercises" / f"ex_{number_of(path)}.py").is_file()


@each_exercise
def test_solutions_pass_their_checks_and_stubs_get_hints(path):
    assert not list(exercise_problems(path))


@each_exercise
def test_exercise_file_is_documented(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("check", "problems"),
    [
        ("return '✓ right' if f() == 2 else 'a hint: count both of the two'", 0),
        ("return '✓ right'", 1),
        ("return 'a hint, whatever the answer'", 1),
        ("return '✓ right' if f() == 2 else 'no'", 1),
    ],
)
def test_exercise_problems_are_seen(tmp_path, check, problems):
    path = tmp_path / "ex_99.py"
    path.write_text(f"def check_a(f): {check}\ndef solution_a(): return 2\ndef stub_a(): return 1\n")
    assert len(list(exercise_problems(path))) == problems


def odd_answers(solution):
    """What readers write: answers that are right in another form, and others that must get a hint."""

    def as_array(*arguments):
        return np.asarray(solution(*arguments))

    def as_tensor(*arguments):
        value = solution(*arguments)
        words = np.asarray(value).dtype.kind == "U"  # of which there is no tensor
        return value if words else torch.as_tensor(value)

    def forgets(*arguments):
        solution(*arguments)

    def stops(*arguments):
        return undefined  # noqa: F821

    def says(*arguments):
        return "text"

    return [as_array, as_tensor], [forgets, stops, says, lambda *arguments: [[1, 2], [3]], 5]


@each_exercise
def test_checks_take_arrays_and_tensors_and_give_hints_in_place_of_tracebacks(path):
    defined = runpy.run_path(str(path))
    for name in [name.removeprefix("check_") for name in defined if name.startswith("check_")]:
        right, wrong = odd_answers(defined[f"solution_{name}"])
        check = defined[f"check_{name}"]
        told = [check(answer) for answer in right]
        assert all(text.startswith(RIGHT) for text in told), told
        told = [check(answer) for answer in wrong]
        assert not any(text.startswith(RIGHT) or len(text) < 20 for text in told), told
        assert "nothing" in told[0] and "undefined" in told[1] and "return undefined" in told[1]


# --- names ------------------------------------------------------------------------------------------------------------


SCOPES = (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def names_of(source):
    """The names that a cell reads before it binds them, and those that it binds; functions read what they need."""
    read, bound = set(), set()
    for statement in ast.parse(source).body:
        loaded, stored, inner = used_in(statement)
        loops = isinstance(statement, ast.For | ast.With)  # these bind before they read
        read |= (loaded | inner) - bound - (stored if loops else set())
        bound |= stored
    return read, bound


def used_in(node):
    """Names loaded and stored in a statement, and those that functions and comprehensions in it take from outside."""
    loaded, stored, inner = set(), set(), set()
    for child in ast.iter_child_nodes(node):
        one, two, three = used_in(child)
        loaded, stored, inner = loaded | one, stored | two, inner | three
    if isinstance(node, ast.Name):
        (stored if isinstance(node.ctx, ast.Store) else loaded).add(node.id)
    elif isinstance(node, ast.arg):
        stored.add(node.arg)
    elif isinstance(node, ast.alias):
        stored.add((node.asname or node.name).split(".")[0])
    if not isinstance(node, SCOPES):
        return loaded, stored, inner
    name = {node.name} if isinstance(node, ast.FunctionDef | ast.ClassDef) else set()
    return set(), name, (loaded | inner) - stored  # what is stored inside is local


def rebound(sources):
    """Names that a cell reads, that an earlier cell gave it and a later one gives anew: number, number, names."""
    cells = [names_of(source) for source in sources]
    for number, (read, _) in enumerate(cells):
        before = set().union(*(given for _, given in cells[:number]))
        for later in range(number + 1, len(cells)):
            if names := read & before & cells[later][1]:
                yield number, later, sorted(names)


@each_notebook
def test_form_no_cell_rebinds_what_an_earlier_cell_reads(path):
    """Else a widget that is moved after Run All, and a cell that is run again, work with another cell's value."""
    sources = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert not list(rebound(sources))


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        (["t = 1", "def show(x): print(t)", "t = 2"], [(1, 2, ["t"])]),  # a widget's callback
        (["t = 1", "print(t)", "for t in (): pass"], [(1, 2, ["t"])]),
        (["t = 1", "t = t + 1", "t = 0"], [(1, 2, ["t"])]),
        (["t = 1", "print(t)", "u = [t for t in ()]\ndef f(t): return t"], []),
        (["t = 1", "t = 2\nprint(t)", "t = 3"], []),
        (["t = 1", "def f():\n    t = 2\n    return t", "t = 3"], []),
    ],
)
def test_rebinding_is_seen(sources, found):
    assert list(rebound(sources)) == found


# --- running ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@each_notebook
def test_notebook_runs(path, tmp_path):
    outcome = notebook_runs.run_notebook(path, tmp_path)
    assert not outcome.problems, "\n".join(outcome.problems)
    assert (tmp_path / "notebooks" / f"{path.stem}.html").stat().st_size > 10_000
    if path.name.startswith("00_"):
        assert set(notebooks.read_summary(tmp_path / "summary.json")) >= set(notebooks.STAGES)
