"""`prunekit lab` and `scoreboard`: the notebook series in a browser, and stored results; where both lie, and a copy."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pandas as pd

from prunekit.cli.console import Answer, text_table
from prunekit.errors import PrunekitError, reason
from prunekit.files import new_file

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
SHIPPED = Path(__file__).parents[1] / "series"  # of a wheel: setup.py puts the parts there
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # one thread a kernel: models this small are faster so

SHOWN = {  # column of the scoreboard → as what it is printed
    "kept": "kept", "cut_perplexity": "as cut", "cut_times_dense": "÷ dense", "cut_tasks": "tasks",
    "recovered_perplexity": "recovered", "recovered_times_control": "÷ control", "recovered_tasks": "tasks",
    "cut_seconds": "seconds",
}  # fmt: skip


def scoreboard(*, ledger: bool = False) -> Answer:
    """Show what each recipe leaves, or which of the papers' claims hold here.

    The figures were measured before and come with prunekit. They are of SmolLM2-135M and
    of the small world. Perplexity stands beside its ratio to the dense model, which was
    trained in the same way if the cut model was. Tasks are mean accuracies, seconds those
    of the fastest run. What is empty was not measured; --json has all columns.

    Example:
        prunekit scoreboard
        prunekit scoreboard --ledger
        prunekit scoreboard --json

    Args:
        ledger: show the headline claims of the five papers, each with the same comparison here.
    """
    path = find_series() / "benchmarks" / "results" / ("ledger.csv" if ledger else "scoreboard.csv")
    try:
        table = pd.read_csv(path)
        text = _claims(table) if ledger else _scores(table)
    except (OSError, ValueError, KeyError) as error:
        raise PrunekitError(f"no stored table in {str(path)!r}: {reason(error)}; install prunekit again") from error
    return Answer({path.stem: table.to_dict("records")}, text)


def _scores(table: pd.DataFrame) -> str:
    """A line for each recipe."""
    names = (table["model"] + " " + table["recipe"]).tolist()
    cells = [["" if pd.isna(cell) else f"{cell:.4g}" for cell in row] for row in table[[*SHOWN]].to_numpy()]
    rows = [[name, *row] for name, row in zip(names, cells, strict=True)]
    return text_table([("perplexity:", *SHOWN.values()), *rows])


def _claims(table: pd.DataFrame) -> str:
    """A paragraph for each claim."""
    return "\n\n".join(
        textwrap.fill(
            f"{row['paper']}: {row['claim']} {row['paper_figure']} ({row['paper_model']}). "
            f"SmolLM2: {_here(row, 'smollm2')}. World: {_here(row, 'world')}. {row['why']}",
            100,
        )
        for row in table.to_dict("records")
    )


def _here(row: dict[str, Any], model: str) -> str:
    """A direction, and the figures from which it follows, where there are any."""
    direction, claimed, beside = (row[f"{model}_{name}"] for name in ("direction", "claimed", "beside"))
    return direction if pd.isna(claimed) else f"{direction}, {claimed:.4g} against {beside:.4g}"


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
    if _is_root() and not allow_root:
        raise PrunekitError("JupyterLab does not start as the user root by itself; prunekit lab --allow-root")
    series = series or (find_folder(None) if copy_to is None else copy_series(Path(copy_to)))
    given = [*(["--no-browser"] if no_browser else []), *(["--allow-root"] if allow_root else [])]
    given += [f"--ServerApp.port={port}"] if port is not None else []
    try:
        given += [*_first_page(series), *shlex.split(jupyter or "")]
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


def _is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def _first_page(series: Path) -> list[str]:
    """The first notebook opens, in place of the launcher."""
    names = sorted(path.name for path in series.glob(SERIES))
    return [f"--LabApp.default_url=/lab/tree/{names[0]}"] if names else []
