"""`prunekit lab`: the notebook series in a browser."""

import importlib.util
import subprocess
import sys
from pathlib import Path

from prunekit.errors import PrunekitError


def lab(folder: str | None = None, *, no_browser: bool = False, port: int | None = None) -> int:
    """Open JupyterLab on the notebook series.

    It looks for the folder `notebooks` in the current folder, then beside the package.
    Stop it with Ctrl-C.

    Example:
        prunekit lab
        prunekit lab path/to/notebooks --no-browser --port 8899

    Args:
        folder: of the series.
        no_browser: print the address, open no browser.
        port: of the server, by default 8888 or the next that is free.
    """
    series = find_folder(folder)
    if importlib.util.find_spec("jupyterlab") is None:
        raise PrunekitError("JupyterLab is not installed in this environment; pip install jupyterlab")
    options = ["--no-browser"] if no_browser else []
    options += [f"--ServerApp.port={port}"] if port else []
    return subprocess.call([sys.executable, "-m", "jupyterlab", str(series), *options])


def find_folder(given: str | None) -> Path:
    """The folder of notebooks.

    Raises:
        PrunekitError: the folder is missing, or contains no notebook.
    """
    places = [Path(given)] if given else [Path("notebooks"), Path(__file__).parents[2] / "notebooks"]
    for place in places:
        if list(place.glob("*.ipynb")):
            return place
    looked = " or ".join(repr(str(place)) for place in places)
    raise PrunekitError(f"no notebooks in {looked}; name their folder: prunekit lab FOLDER")
