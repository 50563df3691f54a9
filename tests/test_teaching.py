"""The teacher's kit: printable answers that cannot go stale, slides by rule, and the check of a computer."""

import json
import re

import check_setup
import nbformat
import pytest
import slides
import teaching
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

NOTEBOOKS = teaching.ROOT / "notebooks"
PAGES = teaching.ROOT / "docs/teaching"


@pytest.fixture(scope="module")
def page():
    return teaching.answers(NOTEBOOKS)


def test_every_solution_is_on_the_page_with_hints_and_effort(page):
    for module in (NOTEBOOKS / "exercises").glob("ex_*.py"):
        for name in re.findall(r"^def solution_(\w+)", module.read_text(), re.M):
            assert page.count(f"def solution_{name}(") == 1, name
    parts = re.split(r"^### Exercise", page, flags=re.M)[1:]
    assert len(parts) >= 17
    for part in parts:
        heading, rest = part.split("\n", 1)
        assert re.search(r"\((easy|medium|hard)[^)]*\d+ minutes", heading), heading
        hints = rest.split("### ")[0].split("What the check says:")[1]
        assert "✓" in hints and hints.count("\n- ") >= 2, heading


def test_every_question_is_there_with_its_answer_unfolded(page):
    for path in NOTEBOOKS.glob("[0-9][0-9]*_*.ipynb"):
        *_, cell = (c for c in nbformat.read(path, 4).cells if c.source.startswith("## Questions to answer"))
        questions = re.findall(r"^\*\*\d\.\*\* .+$", cell.source, re.M)
        assert questions and all(question in page for question in questions)
    assert "<details>" not in page and page.count("*Answer.*") == len(re.findall(r"^\*\*\d\.\*\*", page, re.M))


def test_a_heading_keeps_the_effort_that_it_states():
    assert teaching.with_effort("pick", "Exercise 2 (hard, 7 minutes)") == "Exercise 2 (hard, 7 minutes)"
    assert teaching.with_effort("pick", "Exercise: x *(medium, 8 minutes)*") == "Exercise: x (medium, 8 minutes)"
    assert teaching.with_effort("pick", "Exercise") == "Exercise (easy, 5 minutes)"


def test_every_prediction_of_the_notebooks_has_a_row_for_the_teacher():
    text = (PAGES / "predictions.md").read_text()
    for path in sorted(NOTEBOOKS.glob("[0-9][0-9]*_*.ipynb")):
        asked = sum(len(re.findall(r"\*\*Predict\b", cell.source)) for cell in nbformat.read(path, 4).cells)
        part = re.search(rf"^## {path.name.split('_')[0]} .*?(?=^## |\Z)", text, re.M | re.S)
        found = len(re.findall(r"^### ", part[0], re.M)) if part else 0
        assert found == asked, f"{path.name} asks for {asked} predictions, predictions.md has {found}"


def test_slides_begin_at_headings_unfold_answers_and_skip_checks():
    fold = "<details><summary>What you saw</summary>\n\nIt fell.\n\n</details>"
    cells = [
        new_markdown_cell("## One\n\ntext\n\n## Two\n\nmore"),
        new_code_cell("x = 1"),
        new_markdown_cell(f"Before.\n\n{fold}\n\nAfter."),
        new_code_cell("assert x == 1"),
    ]
    kinds = [kind for cell in cells for kind, _ in slides.pieces(cell)]
    assert kinds == ["slide", "slide", "subslide", "-", "fragment", "-", "skip"]
    html = slides.slides(new_notebook(cells=cells))
    assert "<details>" not in html and "It fell." in html and 'class="fragment"' in html
    assert html.count("<section") > 4


def test_the_check_of_a_computer_passes_here():
    assert "the embedded model answers" in check_setup.check_world()
    for check in (check_setup.check_python, check_setup.check_torch):
        assert check()


def test_it_reports_what_is_missing_and_goes_on(monkeypatch, capsys):
    def missing():
        raise ImportError("No module named 'torch'")

    monkeypatch.setattr(check_setup, "NEEDED", (99, 0))
    monkeypatch.setattr(check_setup, "CHECKS", (check_setup.check_python, missing, lambda: "the last one"))
    assert check_setup.main() == 1
    said = capsys.readouterr().out.splitlines()
    assert "install 3.11" in said[0] and "with the extras" in said[1] and said[2] == "✓ the last one"
    assert said[3].startswith("2 of 3 checks failed")


def test_plans_name_sections_that_are_there():
    text = (PAGES / "plans.md").read_text()
    stops = re.findall(r"(?<=\| )(\d\d), “(.+?)”", text)
    assert len(stops) > 12
    for number, section in stops:
        (path,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
        headings = [re.sub(r"[^\w ]", "", line) for c in nbformat.read(path, 4).cells for line in c.source.splitlines()]
        assert any(line.strip().startswith(re.sub(r"[^\w ]", "", section)) for line in headings), (number, section)


def test_the_minutes_of_a_plan_go_up_and_its_breaks_fit():
    for plan in re.split(r"^## ", (PAGES / "plans.md").read_text(), flags=re.M):
        minutes = [int(found) for found in re.findall(r"^\| (\d+) \|", plan, re.M)]
        assert minutes == sorted(minutes)
        for start, length, after in re.findall(r"^\| (\d+) \| \w+, (\d+) \|.*\n\| (\d+)", plan, re.M):
            assert int(start) + int(length) == int(after)


def test_the_figures_of_the_five_rules_stand_in_the_results():
    results = (teaching.ROOT / "docs/results.md").read_text()
    rows = re.findall(
        r"^\| [^|]+ \| ([^|]+) \|", (PAGES / "cheat_sheet.md").read_text().split("## Five rules")[1], re.M
    )
    figures = [
        found for row in rows for found in re.findall(r"\d+\.\d+|\b\d{2,3}\b(?!%)", row.replace("WikiText-2", ""))
    ]
    assert len(figures) > 12
    assert not [figure for figure in figures if not re.search(rf"(?<![\d.]){figure}(?!\d)", results)]


def test_the_pipe_of_the_cheat_sheet_is_that_of_the_readme():
    lines = [
        [
            re.sub(r"\s+#.*", "", line)
            for line in re.findall(r"```python\n(.*?)```", page.read_text(), re.S)[0].splitlines()
        ]
        for page in (PAGES / "cheat_sheet.md", teaching.ROOT / "README.md")
    ]
    assert set(lines[0]) <= set(lines[1])


def test_the_devcontainer_is_json_and_sets_up_by_make():
    found = json.loads((teaching.ROOT / ".devcontainer/devcontainer.json").read_text())
    assert found["postCreateCommand"] == "make setup" and found["image"].startswith(
        "mcr.microsoft.com/devcontainers/python:"
    )


def test_the_minutes_of_a_track_are_those_of_its_notebooks():
    rows = re.findall(
        r"^\| (core|explorer|researcher) \|[^|]+\| ([^|]+) \| (\d+) \|", (PAGES / "plans.md").read_text(), re.M
    )
    assert len(rows) == 3
    for track, numbers, minutes in rows:
        paths = [path for number in re.findall(r"\d\db?", numbers) for path in NOTEBOOKS.glob(f"{number}_*.ipynb")]
        times = [
            re.search(r"\*\*Time\.?\*\* (\d+) minutes", nbformat.read(path, 4).cells[0].source)[1] for path in paths
        ]
        assert sum(map(int, times)) == int(minutes), track
