"""Opens a checkpoint of any size as a model whose parameters are views of the mapped files."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from prunekit.checkpoint.folders import Stored, check_dtypes, read_config, stored_tensors
from prunekit.checkpoint.loading import MODEL_TYPE, check_plain_size, load, load_cut, load_tokenizer
from prunekit.checkpoint.origins import resolve
from prunekit.errors import PrunekitError
from prunekit.models import empty_model, shapes_of

_TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def map_checkpoint(source: str | Path) -> tuple[Any, Any]:
    """A model whose parameters are views of the checkpoint's mapped shards, and its tokenizer or None.

    It is an ordinary model in the checkpoint's own dtype. What is read of it is file cache, which the system drops
    when memory is wanted elsewhere; nothing is copied.

    Args:
        source: a folder with config.json and safetensors, or GGUF as `load` takes it.

    Raises:
        PrunekitError: no such folder, no safetensors, or tensors that do not map one to one to the model's
            parameters, so that loading would have to copy them.
    """
    folder = local_folder(source)
    config, stored = read_config(folder), stored_tensors(folder)
    check_dtypes(folder, stored)
    dtype = _common_dtype(stored.values())
    if config.get("model_type") == MODEL_TYPE:
        return load_cut(folder, dtype, mapped=True), load_tokenizer(str(folder), False)
    _check_one_to_one(folder, stored)
    return load(folder, dtype=dtype)


def local_folder(source: str | Path) -> Path:
    """The folder of a checkpoint; of a GGUF file, the one that it is converted to.

    Raises:
        PrunekitError: it is not on this machine.
    """
    folder = Path(resolve(source))
    if not folder.is_dir():
        raise PrunekitError(
            f"{str(source)!r} is not a folder on this machine, and only those are streamed; download the checkpoint, "
            "and give the folder that holds config.json and safetensors"
        )
    read_config(folder)
    return folder


def n_bytes(folder: Path) -> int:
    """Size of a checkpoint's weight files in bytes."""
    return sum(file.stat().st_size for file in {tensor.file for tensor in stored_tensors(folder).values()})


def _common_dtype(stored: Iterable[Stored]) -> torch.dtype | str:
    """The dtype of most weights: asking for another, as a configuration may, would copy them."""
    sizes: Counter[str] = Counter()
    for tensor in stored:
        sizes[tensor.dtype] += torch.Size(tensor.shape).numel()
    return _TORCH.get(sizes.most_common(1)[0][0], "auto")


def _check_one_to_one(folder: Path, stored: dict[str, Stored]) -> None:
    """Raise an error for files whose tensors transformers would merge or split, which needs memory.

    Every parameter must find a stored tensor of its shape that no other parameter took.
    """
    check_plain_size(folder, stored)
    try:
        shapes = shapes_of(empty_model(AutoConfig.from_pretrained(folder, trust_remote_code=False)))
    except Exception:  # any error; the load that follows reports it
        return
    left = Counter(tensor.shape for tensor in stored.values())
    for name, shape in shapes.items():
        if not left[shape]:
            raise PrunekitError(
                f"{str(folder)!r} cannot be streamed: no tensor in its files is the model's {name}, of shape {shape}, "
                "so loading would put it together in memory; if the model fits there, load it, prune it and save it"
            )
        left[shape] -= 1
