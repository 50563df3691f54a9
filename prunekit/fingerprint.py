"""What changes when a weight does: by which a run that was stopped knows its own files again."""

import hashlib

import torch
from torch import Tensor, nn


def digest_of(model: nn.Module) -> "hashlib._Hash":
    """SHA-256 over names, types, shapes and values of all that a model's state holds, open for more."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(bytes_of(tensor))
    return found


def digest_of_text(text: str) -> str:
    """SHA-256 of a text, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def bytes_of(tensor: Tensor) -> bytes:
    """A tensor's values as they lie in memory, of any type."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
