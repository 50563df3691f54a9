"""Reads and writes tables and arrays of a knowledge distribution in one safetensors file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import safe_open
from safetensors.numpy import save_file

from prunekit.errors import PrunekitError
from prunekit.files import new_file, reading

FORMAT = "prunekit.knowledge/1"


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Path:
    """Write arrays and JSON metadata; the file is moved into place when complete.

    Raises:
        PrunekitError: the folder is missing or cannot be written to.
    """
    told = {"format": FORMAT, **{name: json.dumps(value) for name, value in meta.items()}}
    with new_file(path) as beside:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, beside, told)
    return path


def read_arrays(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read arrays and metadata that `write_arrays` wrote.

    Raises:
        PrunekitError: the file is missing, or it holds something else.
    """
    with reading(path, "knowledge distribution", "its save()"), safe_open(path, framework="np") as file:
        told = dict(file.metadata() or {})
        if told.pop("format", None) != FORMAT:
            raise PrunekitError("it is a safetensors file of another kind")
        names = file.keys()  # the file itself is no iterable
        return {name: file.get_tensor(name) for name in names}, {k: json.loads(v) for k, v in told.items()}


def plain(frame: pd.DataFrame) -> dict[str, list[Any]]:
    """A table as column → list for JSON; missing values become None."""
    objects = frame.astype(object)
    return {str(name): objects[name].where(frame[name].notna(), None).tolist() for name in frame}


def table_of(columns: Mapping[str, list[Any]], numbers: tuple[str, ...]) -> pd.DataFrame:
    """The table from the form of `plain`; columns in `numbers` are float even if all values are missing."""
    found = pd.DataFrame(columns)
    return found.astype({name: float for name in numbers if name in found})
