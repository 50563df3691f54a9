"""The tour on tiny notebooks: what passes, what must fail, what an interrupt leaves."""

import json
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
import strip_notebooks
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from prunekit.cli import main, notebook_runs, notebooks
from prunekit.errors import PrunekitError

METRICS = {"perplexity": 3.5, "boolq": 0.91, "parameters": 3_400_000, "macs": 6.8e6, "latency_ms": 12.345}
SUMMARY = {"dense": METRICS, "cut": METRICS, "recovered": METRICS}
WRITE_SUMMARY = (
    "import json, os, pathlib\n"
    f"pathlib.Path(os.environ['PRUNEKIT_BUILD'], 'summary.json').write_text(json.dumps({SUMMARY!r}))"
)
TAGS = ["raises-exception"]
INTERACT = """
from ipywidgets import interact
@interact(x=(1, 3))
def show(x): {body}
"""


@pytest.fixture
def write(tmp_path):
    """Write a notebook of these code cells into `series/`."""
    folder = tmp_path / "series"
    folder.mkdir()

    def write(name, *sources, tags=()):
        cells = [new_code_cell(source, id=f"cell-{number}") for number, source in enumerate(sources)]
        cells[-1].metadata.update({"tags": list(tags)} if tags else {})
        nbformat.write(new_notebook(cells=[new_markdown_cell("# Title", id="title"), *cells]), folder / name)
        return folder / name

    return write


def run(tmp_path, *arguments):
    return main(["tour", str(tmp_path / "series"), "--build", str(tmp_path / "build"), *arguments])


# --- one notebook -----------------------------------------------------------------------------------------------------


def test_kernel_is_this_interpreter_in_the_notebooks_folder(tmp_path, write, monkeypatch):
    spec = tmp_path / "kernels/python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps({"argv": ["false"], "display_name": "other", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    path = write(
        "00_where.ipynb",
        f"import sys, os; assert sys.executable == {sys.executable!r}",
        f"assert os.getcwd() == {str(tmp_path / 'series')!r}, os.getcwd()",
        f"assert os.environ['PRUNEKIT_BUILD'] == {str(tmp_path / 'build')!r}",
        "assert os.environ['OMP_NUM_THREADS'] and os.environ['OMP_WAIT_POLICY']",
    )
    assert notebook_runs.run_notebook(path, tmp_path / "build").problems == ()


def test_html_shows_text_and_pictures_inline_and_the_notebook_stays_as_it_was(tmp_path, write):
    """A widget that works, and an exception that is expected, are no problems."""
    plot, widget = "import matplotlib.pyplot as plt\nplt.plot([1, 2]);", INTERACT.format(body="print('x is', x)")
    path = write("00_plot.ipynb", "print(6 * 7)", plot, widget, "raise ValueError('on purpose')", tags=TAGS)
    before = path.read_bytes()
    outcome = notebook_runs.run_notebook(path, tmp_path / "build")
    html = (tmp_path / "build/notebooks/00_plot.html").read_text()
    assert outcome.problems == () and outcome.seconds > 0 and outcome.n_words == 2  # "# Title"
    assert ">42\n" in html and "data:image/png;base64," in html
    assert path.read_bytes() == before
    assert sorted(kept.name for kept in (tmp_path / "build/notebooks").iterdir()) == ["00_plot.html", "00_plot.ipynb"]


def test_what_a_notebook_took_is_known(tmp_path, write):
    work = "import time\nuntil = time.process_time() + 0.5\nwhile time.process_time() < until: pass"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}])"
    large = "import numpy; kept = numpy.ones(50 * 2**20, dtype='uint8'); del kept"
    idle, busy, big = (
        notebook_runs.run_notebook(write(f"0{n}_x.ipynb", source), tmp_path / "build")
        for n, source in enumerate(["1", f"{work}\n{child}", large])
    )
    assert 0 < idle.cpu_seconds < idle.seconds + 5 and busy.cpu_seconds > 1
    assert idle.peak_mb > 10 and (big.peak_mb > idle.peak_mb + 45 or sys.platform != "linux")


def test_exception_hidden_in_a_widget_is_a_problem(tmp_path, write):
    path = write("04_hide.ipynb", "print('fine')", INTERACT.format(body="raise ValueError('hidden')"))
    (problem,) = notebook_runs.run_notebook(path, tmp_path / "build").problems
    assert problem.startswith("04_hide.ipynb, a widget of cell 3: ValueError: hidden")


def test_kernel_that_dies_is_a_problem(tmp_path, write):
    path = write("06_die.ipynb", "import os; os._exit(1)")
    (problem,) = notebook_runs.run_notebook(path, tmp_path / "build").problems
    assert "06_die.ipynb" in problem and "DeadKernel" in problem


# --- the series and its summary ---------------------------------------------------------------------------------------


def test_series_writes_html_and_summary(tmp_path, write, capsys):
    write("00_start.ipynb", WRITE_SUMMARY)
    write("01_more.ipynb", "print('more')")
    write("scratch.ipynb", "raise SystemError")
    assert run(tmp_path) == 0
    table = (tmp_path / "build/summary.md").read_text()
    assert table in capsys.readouterr().out
    assert "|     3,400,000 |" not in table and "3,400,000" in table and "12.35" in table and "0.91" in table
    assert sorted(path.name for path in (tmp_path / "build/notebooks").glob("*.html")) == [
        "00_start.html",
        "01_more.html",
    ]
    assert "00_start" in table and "01_more" in table and "all (memory: the most)" in table and "peak MiB" in table


def test_one_failure_does_not_stop_the_others(tmp_path, write, capsys):
    write("00_start.ipynb", WRITE_SUMMARY)
    write("01_bad.ipynb", "x = 1", "raise KeyError('gone')", "print('not reached')")
    write("02_good.ipynb", "1")
    assert run(tmp_path, "--jobs", "1") == 1
    told = capsys.readouterr()
    assert "01_bad.ipynb, cell 3: KeyError: 'gone'" in told.err and "FAILED" in told.out + told.err
    assert "raise KeyError" in told.err and "\x1b" not in told.err
    assert "| 01_bad (failed) " in told.out and "| 02_good " in told.out and "peak MiB" in told.out
    assert not (tmp_path / "build/notebooks/01_bad.html").exists()
    assert (tmp_path / "build/notebooks/02_good.html").exists() and not (tmp_path / "build/summary.md").exists()


def test_missing_and_old_summaries_fail(tmp_path, write, capsys):
    write("00_start.ipynb", "1")
    assert run(tmp_path) == 1 and "was not written in this tour" in capsys.readouterr().err
    old = tmp_path / "build/summary.json"
    old.write_text(json.dumps(SUMMARY))
    assert notebooks.read_summary(old) == SUMMARY
    with pytest.raises(PrunekitError, match="was not written in this tour"):
        notebooks.read_summary(old, since=time.time() + 10)


@pytest.mark.parametrize("wrong", ["NaN", '"3.5"', "null", "true"])
def test_summary_holds_numbers_only(tmp_path, wrong):
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(SUMMARY).replace("3.5", wrong, 1))
    with pytest.raises(PrunekitError, match="perplexity"):
        notebooks.read_summary(path)


@pytest.mark.parametrize("stage", notebooks.STAGES)
def test_summary_needs_all_stages_with_the_same_metrics(tmp_path, stage):
    path = tmp_path / "summary.json"
    for broken in ({**SUMMARY, stage: {"perplexity": 1.0}}, {k: v for k, v in SUMMARY.items() if k != stage}):
        path.write_text(json.dumps(broken))
        with pytest.raises(PrunekitError, match="same metrics"):
            notebooks.read_summary(path)


@pytest.mark.parametrize("bad", [["--jobs", "0"], ["--jobs", "two"], ["--strip"]])
def test_bad_arguments_exit_2(tmp_path, bad):
    assert run(tmp_path, *bad) == 2


def test_empty_folder_exits_2(tmp_path, capsys):
    assert run(tmp_path) == 2 and "no notebooks" in capsys.readouterr().err


@pytest.mark.slow
def test_interrupt_keeps_what_is_finished_and_leaves_no_kernel(tmp_path, write):
    write("00_quick.ipynb", "1")
    write("01_slow.ipynb", f"open({str(tmp_path / 'began')!r}, 'w').close()", "import time; time.sleep(300)")
    write("02_never.ipynb", "1")
    command = [sys.executable, "-m", "prunekit", "tour", str(tmp_path / "series")]
    command += ["--build", str(tmp_path / "build"), "--jobs", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "began").exists())
    kernels = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted" in told and "Traceback" not in told
    assert [path.name for path in (tmp_path / "build/notebooks").glob("*.html")] == ["00_quick.html"]
    assert kernels and not psutil.wait_procs(kernels, timeout=30)[1]


def wait_for(condition, seconds=300):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.1)


# --- stripping --------------------------------------------------------------------------------------------------------


def test_strip_removes_what_running_left_and_keeps_ids(tmp_path):
    cell = new_code_cell("1 + 1", id="keep-me", execution_count=3, metadata={"scrolled": True, "tags": ["slow"]})
    cell.outputs = [nbformat.v4.new_output("execute_result", {"text/plain": "2"}, execution_count=3)]
    path = tmp_path / "00_x.ipynb"
    nbformat.write(new_notebook(cells=[cell], metadata={"widgets": {notebook_runs.WIDGETS: {"state": {}}}}), path)
    assert strip_notebooks.main([str(path)]) == 1  # as hooks do: 1 says that something was changed
    (left,) = nbformat.read(path, as_version=4).cells
    assert (left.outputs, left.execution_count, left.id) == ([], None, "keep-me")
    assert left.metadata == {"tags": ["slow"]} and "widgets" not in path.read_text()
    assert strip_notebooks.main([str(path)]) == 0


def test_what_is_no_notebook_is_a_problem_of_its_own(tmp_path):
    path = tmp_path / "07_cut_off.ipynb"
    path.write_text('{"cells": [')
    (problem,) = notebook_runs.run_notebook(path, tmp_path / "build").problems
    assert problem.startswith("07_cut_off.ipynb is no notebook that can be read")


@pytest.mark.parametrize("text", ["{", "[1]", '{"dense": [1]}'])
def test_a_summary_of_another_form_is_refused(tmp_path, text):
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(PrunekitError, match=r"summary\.json"):
        notebooks.read_summary(tmp_path / "summary.json")
