"""Reads files from others with care, and writes files and folders completely or not at all.

What is written stands beside its place first, and is moved there when it is complete.
"""

import glob
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from prunekit.errors import DiskError, PrunekitError, reason

try:
    import fcntl
except ImportError:  # Windows has no lock that goes with the process that holds it
    fcntl = None  # type: ignore[assignment]

LARGEST_RESULT = 2**40  # bytes of a result file, which may hold arrays
LARGEST = 2**28  # bytes of a text file: the largest tokenizers and reports have a tenth of it
RESTORE = "restore it from its source"
UNFINISHED = ".unfinished"  # how the names of temporary folders end
_OF_DISKS = ("os error", "PytorchStreamWriter failed", "null byte")  # in errors of tokenizers and torch, of no kind


def check_regular(path: Path, most: int = LARGEST, advice: str = RESTORE) -> None:
    """Raise an error for what is no file of a size that can be read: pipes and devices, which may never end, too.

    Args:
        path: of the file; a link stands for where it leads.
        most: bytes.
        advice: what to do, for the message.

    Raises:
        PrunekitError: it is missing, something else than a file, or too large.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # missing, a circle of links, no permission, a name too long or with NUL
        raise PrunekitError(f"cannot read {str(path)!r} ({getattr(error, 'strerror', error)}); {advice}") from None
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise PrunekitError(f"cannot read {str(path)!r}: it is {what}, no file; {advice}")
    if found.st_size > most:
        raise PrunekitError(f"{str(path)!r} has {found.st_size:,} bytes, and {most:,} are read at most; {advice}")


def read_text(path: str | Path, writer: str | None = None) -> str:
    """The text of a file.

    Args:
        path: of the file.
        writer: what wrote it, such as `"Report.save"`, for messages; None for a file from elsewhere.

    Raises:
        PrunekitError: the file is missing, too large, or it is no text.
    """
    advice = _advice(writer)
    check_regular(Path(path), LARGEST, advice)
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PrunekitError(f"cannot read {str(path)!r} as text ({reason(error)}); {advice}") from error


@contextmanager
def reading(path: str | Path, what: str, writer: str) -> Iterator[None]:
    """A context in which a result file is read, whatever was edited in it.

    Args:
        path: of the file.
        what: it should hold, such as `"scores"`.
        writer: what wrote it, such as `"Scores.save"`.

    Raises:
        PrunekitError: the file is missing, or something in it does not fit; it names the file.
    """
    advice = f"give a file that {writer} wrote"
    check_regular(Path(path), LARGEST_RESULT, advice)
    try:
        yield
    except (OSError, SafetensorError, LookupError, TypeError, AttributeError, RecursionError, ValueError) as error:
        raise PrunekitError(f"no {what} in {str(path)!r} ({reason(error)}); {advice}") from error


def read_json(path: str | Path, writer: str | None = None) -> Any:
    """The JSON value in a file; arguments are those of `read_text`.

    Raises:
        PrunekitError: it cannot be read, or is not JSON.
    """
    text = read_text(path, writer)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and lists without end
        raise PrunekitError(f"{str(path)!r} is not JSON ({reason(error)}); {_advice(writer)}") from error


def _advice(writer: str | None) -> str:
    return RESTORE if writer is None else f"give the path of a file that {writer} wrote"


def check_new_folder(out: str | Path) -> Path:
    """The path of an output folder, checked to be new or empty.

    Raises:
        PrunekitError: something stands there, or nothing could be written there.
    """
    path = Path(out)
    try:
        if "\0" in str(path):
            raise ValueError("a NUL byte in its name")
        empty = path.is_dir() and not any(path.iterdir())
    except (OSError, ValueError) as error:  # no permission, a name too long or with a NUL byte
        raise _unwritable(path, error) from None
    if path.exists() and (not empty or path.is_mount() or path.name in ("", "..")):
        raise PrunekitError(f"{str(out)!r} exists; choose a new folder, or remove it first")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise PrunekitError(f"cannot write to {str(path.parent)!r}; choose a folder that you may write to")
    return path


def write_text(path: Path, text: str) -> None:
    """Write a text file; the file is complete or not written.

    Raises:
        PrunekitError: the folder is missing, cannot be written to, or is full.
    """
    with new_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A context with a temporary file that is moved to `path` on success and removed on an error.

    Raises:
        PrunekitError: the disk is full, or nothing can be written there.
    """
    with writing(path), _beside(path) as folder:
        yield folder / path.name
        open_to_readers(folder)
        (folder / path.name).replace(path)


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A context with a temporary folder that is moved to `out` on success and removed on an error.

    Raises:
        PrunekitError: `out` exists, its parent cannot be written to, or the disk is full.
    """
    path = check_new_folder(out)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _beside(path) as folder:
            yield folder
            open_to_readers(folder)
            if path.exists():
                path.rmdir()
            folder.replace(path)


@contextmanager
def writing(path: Path, *, whole: bool = True) -> Iterator[None]:
    """A context in which what the disk refuses is said by name.

    Args:
        path: that is written.
        whole: whether nothing stays there after an error.

    Raises:
        DiskError: with the place and the reason, such as that no space is left.
    """
    try:
        yield
    except Exception as error:
        of_disk = isinstance(error, OSError | SafetensorError | DiskError)
        if not of_disk and not any(word in str(error) for word in _OF_DISKS):
            raise
        cause = error.__cause__ if isinstance(error, DiskError) else error  # a DiskError is of a file inside
        raise _unwritable(path, cause or error, whole) from cause


def _unwritable(path: Path, error: BaseException, whole: bool = True) -> DiskError:
    number = re.search(r"os error (\d+)", str(error))  # in the words of libraries that are no OSError
    why = getattr(error, "strerror", None) or (os.strerror(int(number[1])) if number else "the disk refused it")
    left = ", and nothing was left there" if whole else ""
    return DiskError(f"cannot write {str(path)!r} ({why}){left}; choose a folder with room that you may write to")


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A context with a new folder beside a path, and without those that killed processes left there."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{UNFINISHED}"):
        with suppress(OSError), locked(left, must=True):  # one in use is somebody's
            shutil.rmtree(left)
    made = path.parent / f".{path.name}.{uuid4().hex[:12]}"
    made.mkdir()
    folder = made.with_name(f"{made.name}{UNFINISHED}")
    try:
        with locked(made, must=False):
            made.replace(folder)  # its name says that it is locked
            yield folder
    finally:
        for each in (made, folder):
            shutil.rmtree(each, ignore_errors=True)


@contextmanager
def locked(path: Path, *, must: bool) -> Iterator[None]:
    """A context that holds a lock on a folder, of which the system lets go with the process that holds it.

    Args:
        path: of the folder.
        must: raise an error also where the system or the disk has no locks.

    Raises:
        OSError: another process holds it, or there are no locks.
    """
    if fcntl is None:
        if must:
            raise OSError("no locks")
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        with nullcontext() if must else suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """A context in which no other process makes a folder: it waits, and says so. The lock is a file beside it.

    Raises:
        PrunekitError: the folder has no name, such as the current one.
    """
    if not folder.name:
        raise PrunekitError(f"folder {str(folder)!r} has no name of its own; give the path of a new folder")
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"prunekit: waiting for another process that makes {str(folder)!r}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def open_to_readers(folder: Path) -> None:
    """Give all files of a folder the mode that the system gives to new ones; safetensors makes them for their owner."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)
