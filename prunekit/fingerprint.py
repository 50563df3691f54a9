"""Digests of models, tensors and texts, which identify the files of an interrupted run."""

import hashlib

import torch
from torch import Tensor, nn


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


def bytes_of(tensor: Tensor) -> bytes:
    """The bytes of a tensor of any type."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
