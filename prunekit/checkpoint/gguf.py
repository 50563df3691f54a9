"""Reads the header of a GGUF file, llama.cpp's form of a model, before any weight.

A file holds names and values of settings, a vocabulary, and tensors, most of them quantized in blocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunekit.errors import PrunekitError, need, reason

SUFFIX = ".gguf"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_RESTORE = "restore it from its source"
FILE = "model.gguf"


@dataclass(frozen=True)
class GgufHeader:
    """The header of a GGUF file.

    Attributes:
        architecture: in llama.cpp's words, such as `"llama"`.
        sizes: tensor name → how many numbers it holds.
        kinds: of the tensors, in llama.cpp's words, such as `"F32"` or `"Q4_1"`.
        vocabulary: the kind of tokenizer that the file holds, such as `"gpt2"`; None where it holds none.
    """

    architecture: str
    sizes: Mapping[str, int]
    kinds: frozenset[str]
    vocabulary: str | None

    @property
    def dtype(self) -> torch.dtype:
        """The type that its weights were stored in: float32 where some are quantized, else that of its matrices."""
        halves = [kind for kind in ("BF16", "F16") if kind in self.kinds and self.kinds <= _DTYPES.keys()]
        return _DTYPES[halves[0] if halves else "F32"]


def gguf_package(why: str) -> Any:
    """llama.cpp's own Python package.

    Raises:
        PrunekitError: it is not installed, and `why` needs it.
    """
    need("gguf", "gguf", why=why)
    import gguf

    return gguf


def read_header(path: Path) -> GgufHeader:
    """The header of a file that can be dequantized.

    Raises:
        PrunekitError: the gguf package is missing; the file is cut short or damaged, is one part of several, or holds
            tensors of a type that cannot be dequantized, which is named.
    """
    gguf = gguf_package(f"reading {path.name!r}")
    try:
        reader = gguf.GGUFReader(path)
        sizes = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
        kinds = {tensor.tensor_type for tensor in reader.tensors}
        named = ("general.architecture", "split.count", "tokenizer.ggml.model")
        fields = [reader.fields.get(name) for name in named]
        architecture, parts, vocabulary = (None if field is None else field.contents() for field in fields)
    except Exception as error:  # numpy's, struct's or the package's own, by where the file ends
        raise PrunekitError(
            f"{str(path)!r} cannot be read ({reason(error)}): it is cut short, damaged, or newer than "
            f"the gguf package that is installed; {_RESTORE}"
        ) from error
    if isinstance(parts, int) and parts > 1:
        raise PrunekitError(
            f"{str(path)!r} is one of {parts} parts of a model; join them first: llama-gguf-split --merge"
        )
    refused = sorted(kind.name for kind in kinds if not _can_be_dequantized(gguf, kind))
    if refused:
        raise PrunekitError(
            f"{str(path)!r} holds tensors of type {', '.join(refused)}, which cannot be dequantized; give the same "
            "model in another type, such as Q8_0, Q4_K or F16, or the checkpoint that it was made from"
        )
    known = vocabulary if vocabulary not in (None, "none", "no_vocab") else None
    return GgufHeader(str(architecture), sizes, frozenset(kind.name for kind in kinds), known)


def _can_be_dequantized(gguf: Any, kind: Any) -> bool:
    """Tried on one block of zeros."""
    _, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, n_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
