"""Where the read-only inputs of tests lie: `../shared` from the project's root, or PRUNEKIT_SHARED."""

import os
from pathlib import Path

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
