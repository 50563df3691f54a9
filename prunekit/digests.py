"""Digests of models, tensors, texts and files, by which an interrupted run finds out whether it goes on with the same.

A record of finished files shows which of them was changed, cut short or removed. Folders that are costly to make are
kept in the user's cache with such a record, and made again where they are damaged.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path

import torch
from platformdirs import user_cache_path
from torch import Tensor, nn

from prunekit.checks import check_value
from prunekit.errors import DiskError, PrunekitError, reason
from prunekit.files import alone_in, new_folder, read_json, write_text

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


# --- the cache --------------------------------------------------------------------------------------------------------

VARIABLE = "PRUNEKIT_CACHE"
CACHED = "cache.json"


def cache_root() -> Path:
    """The cache folder: the environment variable PRUNEKIT_CACHE, else the system's default."""
    named = os.environ.get(VARIABLE)
    return Path(named).expanduser().absolute() if named else user_cache_path("prunekit", appauthor=False)


def cached_folder(name: str, fill: Callable[[Path], None]) -> Path:
    """A folder of the cache, filled if missing or damaged.

    Of several processes that want it at once, one fills it and the others wait.

    Args:
        name: of the folder; the same name stands for the same content.
        fill: writes the content into the empty folder that it is given.

    Raises:
        PrunekitError: nothing can be written there, or what `fill` raises. Nothing is left behind.
    """
    folder = cache_root() / name
    if is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with alone_in(folder):
            if not is_whole(folder):
                _remove_remains(folder)
                with new_folder(folder) as beside:
                    fill(beside)
                    files = {path.name: _facts(path) for path in sorted(beside.iterdir())}
                    write_text(beside / CACHED, json.dumps({"files": files}, indent=1))
    except (OSError, DiskError) as error:
        raise PrunekitError(
            f"cannot write to the cache {str(folder.parent)!r} ({reason(error.__cause__ or error)}); set the "
            f"environment variable {VARIABLE} to a folder with room that you may write to"
        ) from error
    return folder


def is_whole(folder: Path) -> bool:
    """Whether every file is there as it was written: same size and time of change, else same SHA-256."""
    try:
        files = json.loads((folder / CACHED).read_text(encoding="utf-8"))["files"]
        return bool(files) and all(_is_unchanged(folder / name, *facts) for name, facts in files.items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits; computed once in a process while the file does not change."""
    stat = path.stat()
    return _remembered(path.absolute(), stat.st_size, stat.st_mtime_ns)


@lru_cache
def _remembered(path: Path, _size: int, _changed: int) -> str:
    return _digest(path)


def _is_unchanged(path: Path, size: int, changed: int, digest: str) -> bool:
    stat = path.stat()
    if stat.st_size != size:
        return False
    return stat.st_mtime_ns == changed or sha256_of(path) == digest  # times are lost where a cache is copied


def _remove_remains(folder: Path) -> None:
    """Remove a damaged folder, and partial folders of killed processes."""
    for path in [folder, *folder.parent.glob(f".{folder.name}.*")]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _facts(path: Path) -> tuple[int, int, str]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, sha256_of(path)
