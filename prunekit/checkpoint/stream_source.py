"""Opens a checkpoint of any size as a model whose parameters are views of the mapped files."""

import shutil
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from prunekit.checkpoint.cut_checkpoints import MODEL_TYPE, load_cut
from prunekit.checkpoint.folders import Stored, check_dtypes, read_config, stored_tensors
from prunekit.checkpoint.loading import load
from prunekit.checkpoint.origins import resolve
from prunekit.checkpoint.plain_checkpoints import check_plain_size, load_plain
from prunekit.checkpoint.tokenizer_files import load_tokenizer
from prunekit.errors import PrunekitError
from prunekit.files import new_folder
from prunekit.models import empty_model, shapes_of

_TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def map_checkpoint(source: str | Path) -> tuple[Any, Any]:
    """A model whose parameters are views of the checkpoint's mapped shards, and its tokenizer or None.

    It is an ordinary model in the checkpoint's own dtype. What is read of it is file cache, which the system drops
    when memory is wanted elsewhere; nothing is copied, unless `to_convert` says so.

    Args:
        source: a folder with config.json and safetensors, or GGUF as `load` takes it.

    Raises:
        PrunekitError: no such folder, or no safetensors.
    """
    folder = local_folder(source)
    config, stored = read_config(folder), stored_tensors(folder)
    check_dtypes(folder, stored)
    dtype = _common_dtype(stored.values())
    if config.get("model_type") == MODEL_TYPE:
        return load_cut(folder, dtype, mapped=True), load_tokenizer(str(folder), False)
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


def to_convert(folder: Path) -> Any:
    """The empty model of a folder whose tensors `transformers` would merge, split or turn while it loads them.

    None where every parameter finds a stored tensor of its shape that no other one took, so that all can be mapped.
    """
    if read_config(folder).get("model_type") == MODEL_TYPE:
        return None
    stored = stored_tensors(folder)
    check_plain_size(folder, stored)
    left = Counter(tensor.shape for tensor in stored.values())
    try:
        model = empty_model(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except Exception:  # any error; the load that follows reports it
        return None
    for shape in shapes_of(model).values():
        if not left[shape]:
            return model
        left[shape] -= 1
    return None


def convert(folder: Path, out: Path, max_shard_size: str | int) -> None:
    """Write a checkpoint anew with the model's own tensors, with memory for the parts of one of them and for a shard.

    Args:
        folder: with tensors in another form, such as experts stored one by one.
        out: a new folder, which is complete or not written.
        max_shard_size: of the shards written.

    Raises:
        PrunekitError: it does not load, or `transformers` does not write all that the model has.
    """
    for killed in out.parent.glob(f".{out.name}.*"):
        shutil.rmtree(killed)
    dtype = _common_dtype(stored_tensors(folder).values())
    with new_folder(out) as beside:
        offloaded = beside / "offloaded"
        model = load_plain(str(folder), dtype, device_map={"": "disk"}, offload_folder=str(offloaded))
        with warnings.catch_warnings(action="ignore"):  # of a default size of shards that is not asked for here
            model.save_pretrained(beside, save_original_format=False, max_shard_size=max_shard_size)
        shutil.rmtree(offloaded, ignore_errors=True)
        if to_convert(beside) is not None:
            raise PrunekitError(
                f"{str(folder)!r} cannot be streamed: transformers puts its tensors together in memory; if the model "
                "fits there, load it, prune it and save it"
            )
