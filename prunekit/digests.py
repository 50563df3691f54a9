"""Digests of models, tensors, texts and files, by which an interrupted run finds out whether it goes on with the same.

A record of finished files shows which of them was changed, cut short or removed.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from prunekit.checks import check_value
from prunekit.errors import PrunekitError
from prunekit.files import read_json, write_text

_BLOCK, _N_BLOCKS = 4096, 64  # bytes of a block, and how many of a file are read at least


def digest_of(model: nn.Module) -> "hashlib._Hash":
    """SHA-256 over names, types, shapes and values of a model's state; can be updated further."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(bytes_of(tensor))
    return found


def digest_of_text(text: str) -> str:
    """SHA-256 of a text, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of_file(path: Path) -> str:
    """A short digest of a file: all of a small one, and 4 kB in each 64th of a larger one, so that weights are no wait.

    Other weights of the same shapes differ in each block; a few values changed between two blocks are not noticed.
    """
    found, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        for start in range(0, size, max(_BLOCK, size // _N_BLOCKS)):
            file.seek(start)
            found.update(file.read(_BLOCK))
    return found.hexdigest()[:16]


def bytes_of(tensor: Tensor) -> bytes:
    """The bytes of a tensor of any type."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


RECORD = "sha256.json"


def record(files: Iterable[Path], note: Path) -> None:
    """Add finished files to a note, name → SHA-256; it is written last, so that what stands in it is complete."""
    known = recorded(note) | {file.name: _digest(file) for file in files}
    write_text(note, json.dumps(known, indent=1))


def recorded(note: Path) -> dict[str, str]:
    """What stands in a note; nothing where there is none.

    Raises:
        PrunekitError: it is damaged.
    """
    if not note.is_file():
        return {}
    found: dict[str, str] = read_json(note)
    check_value(str(note), found, dict[str, str])
    return found


def check_recorded(note: Path, folder: Path, advice: str) -> None:
    """Raise an error where a file is not as it was recorded.

    Args:
        note: the note.
        folder: of the files.
        advice: what to do, for the message.

    Raises:
        PrunekitError: names the file.
    """
    for name, digest in recorded(note).items():
        file = folder / name
        if not file.is_file() or _digest(file) != digest:
            what = "was changed since it was written" if file.is_file() else "is missing"
            raise PrunekitError(f"{str(file)!r} {what}; {advice}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
