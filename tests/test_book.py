"""The book: every page and link is there, search too, and what is wrong fails the build."""

import shutil

import book
import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The book of notebooks that were not executed, but for one."""
    folder = tmp_path_factory.mktemp("book")
    (folder / "ran").mkdir()
    text = (book.ROOT / "notebooks/00_start_here.ipynb").read_text()
    (folder / "ran/00_start_here.ipynb").write_text(text.replace("# 00", "# Executed 00", 1))
    assert book.build(book.ROOT / "notebooks", folder / "ran", folder) == 0
    return folder / "html"


def test_it_has_every_notebook_and_every_page_and_a_search(site):
    for path in [*(book.ROOT / "notebooks").glob("*.ipynb"), *(book.ROOT / "docs").rglob("*.md")]:
        assert (site / path.relative_to(book.ROOT).with_suffix(".html")).is_file(), path.name
    assert "curvatur" in (site / "searchindex.js").read_text()
    first = (site / "index.html").read_text()
    assert 'href="notebooks/12_a_real_model.html"' in first and 'href="docs/guide.html"' in first


def test_it_shows_what_the_tour_executed(site):
    assert "Executed 00" in (site / "notebooks/00_start_here.html").read_text()


def test_it_has_the_answers_that_teaching_makes(site):
    text = (site / "docs/teaching/answers.html").read_text()
    assert "share_won_back" in text and 'href="../../notebooks/00_start_here.html"' in text


def test_a_dead_link_fails(tmp_path, monkeypatch, capfd):
    root = tmp_path / "clone"
    for name in book.PAGES:
        if (book.ROOT / name).is_dir():
            shutil.copytree(book.ROOT / name, root / name)
        else:
            shutil.copy(book.ROOT / name, root / name)
    (root / "README.md").write_text("# prunekit\n\nRead [this](docs/nowhere.md).\n")
    (root / "notebooks").mkdir()
    monkeypatch.setattr(book, "ROOT", root)
    assert book.build(root / "notebooks", tmp_path, tmp_path / "out") != 0
    assert "nowhere.md" in capfd.readouterr().err
