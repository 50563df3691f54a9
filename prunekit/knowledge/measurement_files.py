"""Reads and writes tables and arrays of a knowledge distribution in one safetensors file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import safe_open
from safetensors.numpy import save_file

from prunekit.checks import NotNegative, Part, Whole, check_value
from prunekit.errors import PrunekitError
from prunekit.files import new_file, reading

FORMAT = "prunekit.knowledge/1"
_TOLD: dict[str, Any] = {"packed": bool, "resumed": bool, "unfinished": Whole, "fingerprint": str}
_ARRAYS = ("hit", "loss", "dense_hit", "dense_loss")
_TABLES: dict[str, dict[str, Any]] = {  # table → column → type of its values
    "ablations": {
        "group": str, "kind": str, "layer": NotNegative | None, "ratio": Part, "n_ablated": Whole, "units": list[Whole],
    },
    "questions": {
        "task": str, "domain": str | None, "n_tokens": Whole, "chance": Part | None, "tier": Any, "hops": Any,
    },
}  # fmt: skip


def write_measurements(path: Path, fields: Mapping[str, Any]) -> Path:
    """Write the fields of a knowledge distribution; the file is moved into place when complete.

    Raises:
        PrunekitError: the folder is missing or cannot be written to.
    """
    meta = {name: fields[name] for name in _TOLD} | {name: plain(fields[name]) for name in _TABLES}
    told = {"format": FORMAT, **{name: json.dumps(value) for name, value in meta.items()}}
    with new_file(path) as beside:
        save_file({name: np.ascontiguousarray(fields[name]) for name in _ARRAYS}, beside, told)
    return path


def read_measurements(path: str | Path) -> dict[str, Any]:
    """Read and check the fields that `write_measurements` wrote.

    Raises:
        PrunekitError: the file is missing, or it holds something else.
    """
    with reading(path, "knowledge distribution", "its save()"), safe_open(path, framework="np") as file:
        told = dict(file.metadata() or {})
        if told.pop("format", None) != FORMAT:
            raise PrunekitError("it is a safetensors file of another kind")
        arrays = {name: file.get_tensor(name) for name in _ARRAYS}
        meta = {name: json.loads(told[name]) for name in (*_TOLD, *_TABLES)}
        for name, kinds in _TABLES.items():
            for column, kind in kinds.items():
                check_value(f"{name}[{column!r}]", meta[name][column], list[kind])  # type: ignore[valid-type]
        for name, kind in _TOLD.items():
            check_value(name, meta[name], kind)
        tables = {name: pd.DataFrame(meta[name]) for name in _TABLES}
        tables["questions"]["chance"] = tables["questions"]["chance"].astype(float)  # also where all are missing
        _check_arrays(arrays, *map(len, tables.values()))
    return {**meta, **arrays, **tables}


def plain(frame: pd.DataFrame) -> dict[str, list[Any]]:
    """A table as column → list for JSON; missing values become None."""
    objects = frame.astype(object)
    return {str(name): objects[name].where(frame[name].notna(), None).tolist() for name in frame}


def _check_arrays(arrays: Mapping[str, np.ndarray], n_rows: int, n_questions: int) -> None:
    for name in _ARRAYS:
        shape = (n_questions,) if name.startswith("dense") else (n_rows, n_questions)
        kind = np.bool_ if name.endswith("hit") else np.floating
        found = arrays[name]
        if found.shape != shape or not np.issubdtype(found.dtype, kind) or np.isnan(found).any():
            raise PrunekitError(f"{name} is {found.dtype} {found.shape}; it must be {shape}, without NaN")
