"""Resolves a model's name to a checkpoint folder or hub id."""

import os
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from prunekit.annotations import shown
from prunekit.checkpoint.conversion import converted
from prunekit.checkpoint.gguf_header import SUFFIX
from prunekit.errors import PrunekitError
from prunekit.names import NAMES, packaged_file


def resolve(source: str | Path) -> str | Path:
    """The checkpoint folder or hub id of a source.

    A GGUF file, a folder with one and no config.json, and the name of a packaged model such as `"smollm2"` are
    converted, once, to a folder in the user's cache. Whatever else is given back as it is.

    Args:
        source: as `prunekit.load` takes it, but for `"world"`, which has no folder.

    Raises:
        PrunekitError: the file is missing or cannot be converted, the folder holds several, or the package of the
            model is not installed.
    """
    try:
        Path(source).is_dir()
    except (OSError, ValueError) as error:  # too long, or with a NUL byte
        raise PrunekitError(
            f"{shown(source)} cannot be a name ({getattr(error, 'strerror', None) or error}); give a checkpoint "
            f"folder, a .gguf file, a hub id, or {NAMES}"
        ) from None
    file = packaged_file(source) or _gguf_of(Path(source))
    if file is not None:
        return converted(file)
    if not os.path.lexists(source) and _is_gguf(Path(source)):
        raise PrunekitError(
            f"{str(source)!r} does not exist; give a .gguf file, a checkpoint folder, a hub id, or {NAMES}"
        )
    return source


def files_alone(source: str) -> dict[str, bool]:
    """The option to take only files fetched before, where the hub does not answer: it is asked once, not each time."""
    if Path(source).is_dir():
        return {}
    try:
        get_hf_file_metadata(hf_hub_url(source, "config.json"))
    except (HfHubHTTPError, HFValidationError):  # an answer too, or no name that a hub could know
        return {}
    except Exception:  # the client's or the network's
        return {"local_files_only": True}
    return {}


def _gguf_of(path: Path) -> Path | None:
    """The GGUF file of a path; None for anything else."""
    if path.is_file():
        return path if _is_gguf(path) else None
    if not path.is_dir() or os.path.lexists(path / "config.json"):
        return None
    found = sorted(file for file in path.glob("*.*") if _is_gguf(file) and file.is_file())
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise PrunekitError(f"{str(path)!r} holds several models ({names}); give one of them: {str(found[0])!r}")
    return found[0] if found else None


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == SUFFIX
