"""Records of finished files, so that a run that goes on finds out which of them was changed, cut short or removed."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from prunekit.checks import check_value
from prunekit.errors import PrunekitError
from prunekit.files import read_json, write_text

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
