"""`prunekit lab`: the notebook series in a browser."""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

from prunekit.commands.options import add_command, number
from prunekit.errors import PrunekitError

LAB = """\
It looks for the folder `notebooks` where you stand, then beside the package.
Stop it with Ctrl-C.

example:
  prunekit lab
  prunekit lab path/to/notebooks --no-browser --port 8899"""


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "lab", run_lab, "Open JupyterLab on the notebook series.", LAB)
    parser.add_argument("notebooks", metavar="FOLDER", nargs="?", type=Path, help="folder of the series")
    parser.add_argument("--no-browser", action="store_true", help="print the address, open no browser")
    parser.add_argument(
        "--port", type=number(int, 1, 65535), help="port of the server (default: 8888 or the next free)"
    )


def run_lab(args: argparse.Namespace) -> int:
    """Start JupyterLab and wait for its end."""
    folder = find_folder(args.notebooks)
    if importlib.util.find_spec("jupyterlab") is None:
        raise PrunekitError("JupyterLab is not installed in this environment; pip install jupyterlab")
    options = ["--no-browser"] if args.no_browser else []
    options += [f"--ServerApp.port={args.port}"] if args.port else []
    return subprocess.call([sys.executable, "-m", "jupyterlab", str(folder), *options])


def find_folder(given: Path | None) -> Path:
    """The folder of notebooks.

    Raises:
        PrunekitError: there is none, or it holds no notebook.
    """
    places = [given] if given else [Path("notebooks"), Path(__file__).parents[2] / "notebooks"]
    for place in places:
        if list(place.glob("*.ipynb")):
            return place
    looked = " or ".join(repr(str(place)) for place in places)
    raise PrunekitError(f"no notebooks in {looked}; name their folder: prunekit lab FOLDER")
