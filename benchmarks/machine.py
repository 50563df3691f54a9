"""What figures belong to, where they are written, and the texts and models that lie beside the project."""

import csv
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
RESULTS = HERE / "results"
SEVEN = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")  # the papers' tasks


@cache
def machine(*packages: str) -> dict[str, Any]:
    """Commit when it is first asked for (do so before measuring), system and versions, without naming the machine."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True)
    versions = {name.replace("-", "_"): importlib.metadata.version(name) for name in packages}
    return {
        "commit": commit.stdout.strip() or "unknown",
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions,
    }


def save(rows: list[dict[str, Any]], path: Path, *packages: str) -> None:
    """Write rows with what they belong to, complete or not at all."""
    path.parent.mkdir(exist_ok=True)
    beside, told = path.with_suffix(".part"), machine(*packages)
    with beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*told, *rows[0]])
        writer.writeheader()
        writer.writerows({**told, **row} for row in rows)
    beside.replace(path)


def append(row: dict[str, Any], path: Path) -> None:
    """Add a row to a table that goes on, and tell it."""
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
    print(row, flush=True)


def done(path: Path, *columns: str) -> set[tuple[str, ...]]:
    """What stands in a table already: the values of some columns of each row, as text; none where there is no table."""
    if not path.is_file():
        return set()
    with path.open(newline="") as file:
        return {tuple(row[name] for name in columns) for row in csv.DictReader(file)}


def apart(held: torch.Tensor, seen: Iterable[torch.Tensor]) -> torch.Tensor:
    """Those of some windows, (n, seq_len), of which no 12 tokens in a row stand in windows that were seen."""
    runs = {tuple(run) for windows in seen for run in windows.unfold(1, 12, 1).flatten(0, 1).tolist()}
    return held[[not any(tuple(run) in runs for run in row.unfold(0, 12, 1).tolist()) for row in held]]


def shared(path: str) -> Path:
    """A model or text beside the project: `../shared`, or PRUNEKIT_SHARED."""
    return Path(os.environ.get("PRUNEKIT_SHARED") or HERE.parent.parent / "shared", path)
