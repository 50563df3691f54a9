"""Writes files and folders completely or not at all: first beside their place, then moved."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prunekit.errors import PrunekitError, reason


def write_text(path: Path, text: str) -> None:
    """Write a text file; the file is complete or not written.

    Raises:
        PrunekitError: the folder is missing or cannot be written to.
    """
    try:
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise PrunekitError(
            f"cannot write {str(path)!r} ({error.strerror}); choose a folder you may write to"
        ) from None
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(beside).chmod(0o644)  # temporary files are made for their owner alone
        Path(beside).replace(path)
    finally:
        Path(beside).unlink(missing_ok=True)


def read_text(path: str | Path, writer: str) -> str:
    """The text of a file that `writer`, such as `"Report.save"`, wrote.

    Raises:
        PrunekitError: the file is missing, or it is no text.
    """
    if not Path(path).is_file():
        raise PrunekitError(f"{str(path)!r} is no file; give the path of one that {writer} wrote")
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PrunekitError(
            f"{str(path)!r} cannot be read as text ({reason(error)}); give one that {writer} wrote"
        ) from error


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A context with a temporary file that is moved to `path` on success and removed on an error."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as beside:
        yield Path(beside) / path.name
        (Path(beside) / path.name).replace(path)


def check_new_folder(out: str | Path) -> Path:
    """The path of an output folder, checked to be new or empty.

    Raises:
        PrunekitError: something stands there, or nothing could be written there.
    """
    path = Path(out)
    empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and (not empty or path.is_mount() or path.name in ("", "..")):
        raise PrunekitError(f"{str(out)!r} exists; choose a new folder, or remove it first")
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise PrunekitError(f"cannot write to {str(path.parent)!r}; choose a folder that you may write to")
    return path


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A context with a temporary folder that is moved to `out` on success and removed on an error.

    Raises:
        PrunekitError: `out` exists, or its parent cannot be written to.
    """
    path = check_new_folder(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        raise PrunekitError(f"cannot write to {str(path.parent)!r} ({error.strerror}); choose another folder") from None
    try:
        yield beside
        beside.chmod(0o755)
        if path.exists():
            path.rmdir()
        beside.replace(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
