"""The series in a real JupyterLab, as a reader meets it: `make test-browser`.

Chromium opens notebooks 00, 01, 03 and 07 and runs each from the first cell to the last. Then every control of every
widget is moved through all its values, every folded answer is opened, and the exercise is answered. The other notebooks
run without a browser (`test_notebooks.py`). Needs playwright and a Chromium that is installed; skips by name without.
"""

import nbformat
import pytest
from nbformat.v4 import new_code_cell

pytest.importorskip("playwright", reason="needs playwright: make test-browser")

from browser_helpers import Book, chromium, find_chromium, lab, widget_faults

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(find_chromium() is None, reason="no Chromium here; on Debian: apt-get install chromium"),
]

WIDGETS = {"07_map_knowledge": 1, "00_start_here": 1, "03_prune_to_a_budget": 1, "01_discover_coupled_structures": 1}
ANSWERS = {  # notebook → the cell of a stub, and what a reader may write
    "00_start_here": (
        "exercise-stub",
        "def share_won_back(dense, cut, recovered):\n"
        "    return (sum(recovered) - sum(cut)) / (sum(dense) - sum(cut))\n"
        "print(ex_00.check_share_won_back(share_won_back))",
    ),
    "01_discover_coupled_structures": (
        "exercise-heads-stub",
        "def query_rows(u, n_heads, n_kv, d_head):\n"
        "    n = n_heads // n_kv * d_head\n"
        "    return torch.arange(u * n, (u + 1) * n)\n"
        "print(ex_01.check_query_rows(query_rows))",
    ),
    "03_prune_to_a_budget": (
        "exercise-stub",
        "def keep_units(scores, fraction, round_to):\n"
        "    n = len(scores) - int(len(scores) * fraction)\n"
        "    n = min(len(scores), -(-n // round_to) * round_to)\n"
        "    return scores.argsort(descending=True)[:n].sort().values\n"
        "print(ex_03.check_keep_units(keep_units))",
    ),
    "07_map_knowledge": (
        "exercise",
        "import math\n"
        "def unprunable_groups(table, gamma):\n"
        "    change = table[table['ratio'] < 1].groupby('group')['change'].mean().sort_values(ascending=False)\n"
        "    return list(change.index[: math.ceil(gamma * len(change))])\n"
        "print(ex_07.check_unprunable_groups(unprunable_groups))",
    ),
}
STUCK = "@interact(x=(1, 3))\ndef ignore(x):\n    print('always the same')"
RAISES = "@interact(x=(1, 3))\ndef fail(x):\n    print(1 / (3 - x))"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with lab(tmp_path_factory.mktemp("lab")) as running:
        yield running


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture
def open_book(server, context):
    pages = []

    def open_book(name):
        pages.append(server.page(context))
        return Book(pages[-1], f"{name}.ipynb")

    yield open_book
    for page in pages:
        page.evaluate("() => window.book.sessionContext.shutdown()")
        page.close()


@pytest.mark.parametrize("name", WIDGETS)
def test_notebook_in_a_browser(name, open_book):
    book = open_book(name)
    assert not book.fold_faults()
    book.run()
    assert not book.problems()
    assert len(book.widgets()) == WIDGETS[name]
    assert not widget_faults(book)  # after all cells, as a reader who comes back
    cell, answer = ANSWERS[name]
    number = book.find(cell)
    assert "✓" not in book.cell(number).inner_text() and "✓" in book.answer(number, answer)
    assert not book.problems()


def test_broken_widgets_are_seen(server, open_book):
    """A copy of 03: a later cell rebinds what its widget reads; two more widgets raise, and ignore their control."""
    source = nbformat.read(server.folder / "03_prune_to_a_budget.ipynb", as_version=4)
    ids = [cell.id for cell in source.cells]
    source.cells = source.cells[: ids.index("explore-plans") + 1]
    source.cells += [new_code_cell(text, id=f"broken-{i}") for i, text in enumerate([RAISES, STUCK, "tables = {}"])]
    nbformat.write(source, server.folder / "broken.ipynb")
    book = open_book("broken")
    book.run()
    assert not book.problems()  # Run All shows nothing of it
    faults = widget_faults(book)
    assert any(fault.startswith("widget 0") and "KeyError" in fault for fault in faults)
    assert any(fault.startswith("widget 1") and "ZeroDivisionError" in fault for fault in faults)
    assert "widget 2: 'x' changes nothing" in faults
    assert not any(fault.startswith("widget 2") and "Error" in fault for fault in faults)
