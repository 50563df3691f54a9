"""`prunekit lab` and `tour`: the notebook series in a browser, or run without one and summed up; where it lies.

Of the tour, each notebook runs in a kernel of this very interpreter, up to two at a time, and becomes one HTML file.
The first notebook writes what it measured to `summary.json` in the build folder (environment variable
`PRUNEKIT_BUILD`) as `{"dense": {metric: number}, "cut": {…}, "recovered": {…}}`; the tour prints that as one table.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from prunekit.annotations import readable
from prunekit.checks import check_value
from prunekit.cli.notebook_runs import QUIET, Outcome, run_series
from prunekit.errors import PrunekitError, reason
from prunekit.files import new_file, read_json, write_text

SERIES = "[0-9][0-9]*_*.ipynb"  # 07b_… too
OWN = "prunekit-series"  # the copy that is made where there is no clone
# Of the series, in the layout of the clone.
PARTS = (
    "notebooks/*.ipynb",
    "notebooks/exercises/*.py",
    "benchmarks/results/*.csv",
    "benchmarks/results/*.safetensors",
    "docs/guide.md",
)
JOBS = min(2, os.cpu_count() or 1)
STAGES = ("dense", "cut", "recovered")
SHIPPED = Path(__file__).parents[1] / "series"  # of a wheel: setup.py puts the parts there


def lab(
    folder: str | None = None,
    *,
    no_browser: bool = False,
    port: int | None = None,
    allow_root: bool = False,
    copy_to: str | None = None,
    jupyter: str | None = None,
) -> int:
    """Open JupyterLab on the notebook series.

    It looks for the folder `notebooks` in the current folder, then beside the package.
    Where prunekit was installed without a clone of its repository, it copies the series
    into `prunekit-series` in the current folder, and opens that. Files that are there
    already stay as they are. Stop it with Ctrl-C.

    Example:
        prunekit lab
        prunekit lab path/to/notebooks --no-browser --port 8899
        prunekit lab --allow-root --jupyter="--ServerApp.ip=0.0.0.0 --debug"

    Args:
        folder: of the series.
        no_browser: print the address, open no browser.
        port: of the server, by default 8888 or the next that is free.
        allow_root: start as the user root too, as in most containers.
        copy_to: a folder; copy the series there first, and open the copy.
        jupyter: more options, which are passed on to JupyterLab; in quotes, after `=`.
    """
    if folder is not None and copy_to is not None:
        raise PrunekitError(f"{folder!r} and --copy-to {copy_to!r}: give a folder to open or one to copy to, not both")
    if importlib.util.find_spec("jupyterlab") is None:
        raise PrunekitError("JupyterLab is not installed in this environment; pip install jupyterlab")
    series = find_folder(folder) if folder is not None else None
    if hasattr(os, "geteuid") and os.geteuid() == 0 and not allow_root:
        raise PrunekitError("JupyterLab does not start as the user root by itself; prunekit lab --allow-root")
    series = series or (find_folder(None) if copy_to is None else copy_series(Path(copy_to)))
    given = [*(["--no-browser"] if no_browser else []), *(["--allow-root"] if allow_root else [])]
    given += [f"--ServerApp.port={port}"] if port is not None else []
    first = sorted(path.name for path in series.glob(SERIES))[:1]
    given += [f"--LabApp.default_url=/lab/tree/{name}" for name in first]  # in place of the launcher
    try:
        given += shlex.split(jupyter or "")
    except ValueError as error:
        raise PrunekitError(f"--jupyter={jupyter!r}: {reason(error)}; write it as a shell would take it") from error
    command = [sys.executable, "-m", "jupyterlab", str(series), *given]
    return subprocess.call(command, env={**QUIET, **os.environ})


def find_folder(given: str | None) -> Path:
    """The folder of notebooks to open; from a wheel, the copy in the current folder, which is made where it is missing.

    Raises:
        PrunekitError: the folder is missing, or contains no notebook.
    """
    clone = [] if SHIPPED.is_dir() else [_clone() / "notebooks"]  # beside a wheel lie other people's packages
    places = [Path(given)] if given else [Path("notebooks"), *clone, Path(OWN) / "notebooks"]
    for place in places:
        if list(place.glob("*.ipynb")):
            return place
    if not given and SHIPPED.is_dir():
        return copy_series(Path(OWN))
    looked = " or ".join(repr(str(place)) for place in places)
    raise PrunekitError(f"no notebooks in {looked}; name their folder: prunekit lab FOLDER")


def find_series() -> Path:
    """The series as it was published, only to be read: that of the wheel, or else that of the clone.

    Returns:
        The folder above `notebooks` and above what the notebooks read.

    Raises:
        PrunekitError: neither is there.
    """
    for place in (SHIPPED, _clone()):
        if list((place / "notebooks").glob(SERIES)):
            return place
    raise PrunekitError(f"no notebooks in {str(SHIPPED)!r} or {str(_clone() / 'notebooks')!r}; install prunekit again")


def copy_series(target: Path) -> Path:
    """Copy the series, and the stored results that it reads; files that are there already stay as they are.

    Args:
        target: folder; it is made where it is missing.

    Returns:
        The folder of notebooks in it.

    Raises:
        PrunekitError: the folder cannot be written.
    """
    source = find_series()
    try:
        for path in (path for part in PARTS for path in sorted(source.glob(part))):
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if not copy.exists():
                with new_file(copy) as beside:
                    shutil.copyfile(path, beside)
    except OSError as error:
        raise PrunekitError(
            f"cannot copy the series to {str(target)!r}: {error.strerror}; name another folder"
        ) from error
    print(f"the series is in {str(target / 'notebooks')!r}; files that were there before stay as they were")
    return target / "notebooks"


def _clone() -> Path:
    return Path(__file__).parents[2]


# --- the tour ---------------------------------------------------------------------------------------------------------


def find_notebooks(folder: Path) -> list[Path]:
    """The notebooks of a series, in order."""
    paths = sorted(folder.glob(SERIES))
    if not paths:
        raise PrunekitError(f"no notebooks {SERIES} in {folder}; name their folder: prunekit tour FOLDER")
    return paths


def read_summary(path: Path, since: float = 0.0) -> dict[str, dict[str, float]]:
    """What the first notebook measured: stage → metric → number.

    Args:
        path: `summary.json`.
        since: seconds since the epoch; an older file is of another tour and does not count.

    Raises:
        PrunekitError: the file is missing, old, or does not hold numbers for all three stages.
    """
    if not path.exists() or path.stat().st_mtime < since - 1:
        raise PrunekitError(f"{path} was not written in this tour: the first notebook must write what it measured")
    summary: dict[str, dict[str, float]] = read_json(path, "the first notebook")
    check_value(str(path), summary, dict[str, dict[str, float]])
    if not summary.keys() >= {*STAGES} or any(summary[stage].keys() != summary["dense"].keys() for stage in STAGES):
        raise PrunekitError(f"{path} needs the same metrics for each of {STAGES}")
    return summary


def summary_table(summary: dict[str, dict[str, float]], outcomes: Sequence[Outcome]) -> str:
    """Markdown: one row a metric with a column a stage, then one row a notebook with what it took, and their sum."""
    measured = [(name, *(readable(summary[stage][name]) for stage in STAGES)) for name in summary["dense"]]
    return "\n\n".join([_table([("", *STAGES), *measured]), costs_table(outcomes)]) + "\n"


def costs_table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: one row a notebook with what it took, and their sum; those that failed are marked."""
    costs = [
        (o.name + " (failed)" * bool(o.problems), o.seconds, o.cpu_seconds, o.peak_mb, o.n_words) for o in outcomes
    ]
    seconds, cpu_seconds, peaks, words = list(zip(*costs, strict=True))[1:]
    costs.append(("all (memory: the most)", sum(seconds), sum(cpu_seconds), max(peaks), sum(words)))
    rows = [(name, *(f"{value:,.0f}" for value in values)) for name, *values in costs]
    head = ("notebook", "seconds", "CPU seconds", "peak MiB", "words")
    return _table([head, *rows])


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in rows]
    rule = "| " + " | ".join(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


def tour(folder: str | None = None, *, build: str = os.environ.get("PRUNEKIT_BUILD", "build"), jobs: int = JOBS) -> int:
    """Run the notebook series without a browser, and sum it up.

    Each notebook becomes one HTML file with its pictures, in the folder of results. Where
    prunekit was installed without a clone of its repository, the series comes from the package.
    Exit code 1 says that a notebook failed.

    Example:
        prunekit tour
        prunekit tour path/to/notebooks --build results --jobs 1

    Args:
        folder: of the series, by default `notebooks`, or else that which comes with prunekit.
        build: folder of results.
        jobs: notebooks that run at a time, each on one thread.
    """
    if jobs < 1:
        raise PrunekitError(f"jobs={jobs} is not allowed; give a whole number from 1 on")
    here = Path("notebooks")
    series = Path(folder) if folder else here if here.is_dir() else find_series() / "notebooks"
    try:
        return run_tour(find_notebooks(series), Path(build), jobs)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what was finished stands in {Path(build) / 'notebooks'}") from None


def run_tour(paths: Sequence[Path], build: Path, jobs: int) -> int:
    """Run the series, print the summary; 0 where every notebook ran and the summary is there, else 1."""
    began = time.time()
    outcomes = run_series(paths, build, jobs)
    problems = [problem for outcome in outcomes for problem in outcome.problems]
    if problems:
        print(f"\n{costs_table(outcomes)}\n")
        return _complain("\n\n".join(["these notebooks failed, so there is no summary.md", *problems]))
    try:
        table = summary_table(read_summary(build / "summary.json", began), outcomes)
    except PrunekitError as error:
        return _complain(str(error))
    write_text(build / "summary.md", table)
    print(f"\n{table}\n{len(outcomes)} notebooks in {time.time() - began:.0f} s; see {build / 'notebooks'}")
    return 0


def _complain(message: str) -> int:
    print(f"tour: {message}", file=sys.stderr)
    return 1
