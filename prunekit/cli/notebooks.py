"""`prunekit lab`: the notebook series in a browser; where the series lies, and a copy of it to work on."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from prunekit.errors import PrunekitError, reason
from prunekit.files import new_file

SERIES = "[0-9][0-9]*_*.ipynb"  # 07b_… too
OWN = "prunekit-series"  # the copy that is made where there is no clone
# Of the series, in the layout of the clone.
PARTS = ("notebooks/*.ipynb", "notebooks/exercises/*.py", "benchmarks/results/*.csv", "docs/guide.md")
SHIPPED = Path(__file__).parents[1] / "series"  # of a wheel: setup.py puts the parts there
QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # one thread a kernel: models this small are faster so


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
