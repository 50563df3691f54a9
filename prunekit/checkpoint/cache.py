"""Keeps converted folders in the user's cache, and makes damaged ones again."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from platformdirs import user_cache_path

from prunekit.errors import DiskError, PrunekitError
from prunekit.files import alone_in, new_folder, write_text

VARIABLE = "PRUNEKIT_CACHE"
RECORD = "cache.json"


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
                _fill(folder, fill)
    except (OSError, DiskError) as error:
        cause = error.__cause__ or error
        reason = getattr(cause, "strerror", None) or cause
        raise PrunekitError(
            f"cannot write to the cache {str(folder.parent)!r} ({reason}); set the environment variable {VARIABLE} to "
            "a folder with room that you may write to"
        ) from error
    return folder


def is_whole(folder: Path) -> bool:
    """Whether every file is there as it was written: same size and time of change, else same SHA-256."""
    try:
        files = json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"]
        return bool(files) and all(_is_unchanged(folder / name, *facts) for name, facts in files.items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits; computed once in a process while the file does not change."""
    stat = path.stat()
    return _digest(path.absolute(), stat.st_size, stat.st_mtime_ns)


@lru_cache
def _digest(path: Path, _size: int, _changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_unchanged(path: Path, size: int, changed: int, digest: str) -> bool:
    stat = path.stat()
    if stat.st_size != size:
        return False
    return stat.st_mtime_ns == changed or digest_of_file(path) == digest  # times are lost where a cache is copied


def _remove_remains(folder: Path) -> None:
    """Remove a damaged folder, and partial folders of killed processes."""
    for path in [folder, *folder.parent.glob(f".{folder.name}.*")]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _fill(folder: Path, fill: Callable[[Path], None]) -> None:
    with new_folder(folder) as beside:
        fill(beside)
        files = {path.name: _facts(path) for path in sorted(beside.iterdir())}
        write_text(beside / RECORD, json.dumps({"files": files}, indent=1))


def _facts(path: Path) -> tuple[int, int, str]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, digest_of_file(path)
