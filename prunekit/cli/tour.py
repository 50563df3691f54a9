"""The tour: run the notebook series headless, keep what it showed, print what it measured: `prunekit tour`.

Each notebook runs in a kernel of this very interpreter, up to two at a time, and becomes one HTML file. The first
notebook writes what it measured to `summary.json` in the build folder (environment variable `PRUNEKIT_BUILD`) as
`{"dense": {metric: number}, "cut": {…}, "recovered": {…}}`; the tour prints that as one table.
"""

import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from prunekit.cli.notebook_runs import Outcome, run_series, write_whole
from prunekit.cli.notebooks import SERIES, find_series
from prunekit.errors import PrunekitError
from prunekit.files import read_json

JOBS = min(2, os.cpu_count() or 1)
STAGES = ("dense", "cut", "recovered")


def find_notebooks(folder: Path) -> list[Path]:
    """The notebooks of a series, in order."""
    paths = sorted(folder.glob(SERIES))
    if not paths:
        raise PrunekitError(f"no notebooks {SERIES} in {folder}; name their folder: prunekit tour FOLDER")
    return paths


def default_folder() -> Path:
    """`notebooks` where we stand, or else the series that comes with prunekit."""
    here = Path("notebooks")
    return here if here.is_dir() else find_series() / "notebooks"


# --- the summary ------------------------------------------------------------------------------------------------------


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
    summary = read_json(path, "the first notebook")
    if not isinstance(summary, dict) or not all(isinstance(summary.get(stage, {}), dict) for stage in STAGES):
        raise PrunekitError(f"{path} needs {{stage: {{metric: number}}}} for each of {STAGES}")
    for stage in STAGES:
        bad = {name: value for name, value in summary.get(stage, {"": None}).items() if not _is_number(value)}
        if bad or set(summary[stage]) != set(summary["dense"]):
            raise PrunekitError(f"{path} needs the same metrics, as numbers, for each of {STAGES}: see {stage!r} {bad}")
    return summary


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def summary_table(summary: dict[str, dict[str, float]], outcomes: Sequence[Outcome]) -> str:
    """Markdown: one row a metric with a column a stage, then one row a notebook with what it took, and their sum."""
    measured = [(name, *(_show(summary[stage][name]) for stage in STAGES)) for name in summary["dense"]]
    costs = [(o.name, o.seconds, o.cpu_seconds, o.peak_mb, o.n_words) for o in outcomes]
    seconds, cpu_seconds, peaks, words = list(zip(*costs, strict=True))[1:]
    costs.append(("all (memory: the most)", sum(seconds), sum(cpu_seconds), max(peaks), sum(words)))
    rows = [(name, *(f"{value:,.0f}" for value in values)) for name, *values in costs]
    head = ("notebook", "seconds", "CPU seconds", "peak MiB", "words")
    return "\n\n".join([_table([("", *STAGES), *measured]), _table([head, *rows])]) + "\n"


def _show(value: float) -> str:
    return f"{int(value):,}" if value == int(value) and abs(value) >= 10 else f"{value:.4g}"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in rows]
    rule = "| " + " | ".join(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


# --- the command ------------------------------------------------------------------------------------------------------


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
    try:
        return run_tour(find_notebooks(Path(folder) if folder else default_folder()), Path(build), jobs)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what was finished stands in {Path(build) / 'notebooks'}") from None


def run_tour(paths: Sequence[Path], build: Path, jobs: int) -> int:
    """Run the series, print the summary; 0 where every notebook ran and the summary is there, else 1."""
    began = time.time()
    outcomes = run_series(paths, build, jobs)
    problems = [problem for outcome in outcomes for problem in outcome.problems]
    if problems:
        return _complain("\n\n".join(["these notebooks failed, so nothing is summed up", *problems]))
    try:
        table = summary_table(read_summary(build / "summary.json", began), outcomes)
    except PrunekitError as error:
        return _complain(str(error))
    write_whole(build / "summary.md", table)
    print(f"\n{table}\n{len(outcomes)} notebooks in {time.time() - began:.0f} s; see {build / 'notebooks'}")
    return 0


def _complain(message: str) -> int:
    print(f"tour: {message}", file=sys.stderr)
    return 1
