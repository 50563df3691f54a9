"""Digests of models, tensors and texts, which identify the files of an interrupted run."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

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
