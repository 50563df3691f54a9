"""Where the read-only inputs of tests lie: `../shared` from the project's root, or PRUNEKIT_SHARED."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def shared_path(*parts: str) -> Path:
    """A path inside the shared inputs; skips where they are missing, fails where the variable names a wrong place."""
    named = os.environ.get("PRUNEKIT_SHARED")
    path = Path(named or ROOT.parent / "shared", *parts)
    if not path.exists() and named:
        pytest.fail(f"PRUNEKIT_SHARED={named} has no {'/'.join(parts)}")
    if not path.exists():
        pytest.skip(f"needs {path}: set PRUNEKIT_SHARED to the folder of shared inputs")
    return path


@functools.cache
def real_model(name: str) -> tuple[Any, Any]:
    """A real model and its tokenizer, which nobody may change; skips where it is not installed.

    `"smollm2"` is found by `prunekit.load`, `"gemma"` by PRUNEKIT_GEMMA, the path of its file or folder.
    """
    from prunekit import load
    from prunekit.errors import PrunekitError

    source = os.environ.get("PRUNEKIT_GEMMA", "") if name == "gemma" else name
    if not source:
        pytest.skip("needs Gemma 3 270M: set PRUNEKIT_GEMMA to its path")
    try:
        return load(source)
    except PrunekitError as error:
        pytest.skip(f"needs {name}: {error}")


def run_script(script: Path, *given: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own, which finds prunekit and the modules of the tests."""
    paths = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    environment = os.environ | paths | {"GLOO_SOCKET_IFNAME": "lo"}  # else gloo looks this machine's name up
    command = [sys.executable, *launcher, str(script), *given]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
