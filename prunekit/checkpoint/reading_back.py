"""Reads a written checkpoint back and compares it with the model, before it is moved into place."""

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from prunekit.checkpoint.folders import Stored, header_of, stored_tensors
from prunekit.checkpoint.plain_checkpoints import load_plain
from prunekit.errors import PrunekitError
from prunekit.models import own_tensors

SAMPLE = 1024  # numbers compared of each tensor, spread over it


def check_written(folder: Path, model: Any) -> None:
    """Compare names, shapes and a sample of the values in a folder with the model that was written there.

    Where tensors have other names in the files, as in most families with experts, the model is loaded from these.

    Raises:
        PrunekitError: something is missing or differs.
    """
    expected, stored = own_tensors(model), stored_tensors(folder)
    if stored.keys() == expected.keys():
        _check_stored(stored, expected)
        return
    found = own_tensors(load_plain(str(folder)))
    _refuse(next((name for name in expected if name not in found or not _alike(found[name], expected[name])), None))


def check_shard(path: Path, expected: dict[str, Tensor]) -> None:
    """As `check_written`, for one file of a checkpoint.

    Args:
        path: of the file.
        expected: the tensors that were written to it.
    """
    _check_stored(header_of(path), expected)


def check_names(folder: Path, model: Any) -> None:
    """As `check_written`, names and shapes alone, which cost nothing."""
    stored = {name: tensor.shape for name, tensor in stored_tensors(folder).items()}
    expected = {name: tuple(tensor.shape) for name, tensor in own_tensors(model).items()}
    _refuse(next((name for name in {**expected, **stored} if stored.get(name) != expected.get(name)), None))


def _check_stored(stored: dict[str, Stored], expected: dict[str, Tensor]) -> None:
    """Compare tensors by their own names."""
    wrong = (n for n in expected if n not in stored or not _alike(_read(n, stored[n]), expected[n]))
    _refuse(next(wrong, None))


def _refuse(wrong: str | None) -> None:
    if wrong is not None:
        raise PrunekitError(f"{wrong} is not read back as it was")


def _read(name: str, stored: Stored) -> Tensor:
    with safe_open(stored.file, "pt") as weights:
        tensor: Tensor = weights.get_tensor(name)
        return tensor


def _alike(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    step = max(1, expected.numel() // SAMPLE)
    a, b = (tensor.detach().reshape(-1)[::step].cpu() for tensor in (found, expected))
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
