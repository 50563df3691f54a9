"""Loading cut checkpoints of `model_type: "prunekit"`: the uncut configuration, and the units kept, cut after cut.

They load by building the uncut model without weights and cutting it the same way, so that none is mistaken for a plain
one.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, GenerationConfig

from prunekit.checkpoint.building import check_size, cut_again
from prunekit.checkpoint.config_checks import check_config
from prunekit.checkpoint.folders import (
    Stored,
    check_dtypes,
    read_config,
    read_object,
    stored_tensors,
)
from prunekit.checkpoint.layer_widths import check_widths
from prunekit.checkpoint.plain_checkpoints import check_floats
from prunekit.discovery import Groups, discover
from prunekit.errors import PrunekitError, reason
from prunekit.models import empty_model, name_model, own_tensors
from prunekit.pruning.describing import describe
from prunekit.pruning.experts import usable

MODEL_TYPE = "prunekit"
FORMAT = 1
LEAST_PART_LEFT = 1000  # a record may say that the uncut model was this many times larger, not more


def load_cut(folder: Path, dtype: torch.dtype | str = "auto", *, mapped: bool = False, **options: Any) -> Any:
    """The model of a folder with `model_type: "prunekit"`, an object of its family's own class.

    Args:
        folder: that `save` wrote.
        dtype: of the weights; the checkpoint's own by default.
        mapped: parameters are views of the mapped files and cost no memory; else copies.
        options: for building the model, such as `attn_implementation`.

    Raises:
        PrunekitError: the record, the widths or the weights do not fit each other.
    """
    saved = read_config(folder)
    _check_record(folder, saved)
    stored = stored_tensors(folder)
    model, groups = _build(folder, saved, stored, options)
    _fill(model, folder, stored, mapped)
    if os.path.lexists(folder / "generation_config.json"):
        model.generation_config = _generation(folder / "generation_config.json")
    name_model(model, str(folder))
    model = usable(in_dtype(model, dtype)).eval()
    if not mapped:  # it would be read from disk, every weight of it
        describe(model, groups)
    return model


def _generation(path: Path) -> GenerationConfig:
    try:
        found = GenerationConfig.from_dict(read_object(path))
        found.validate()
    except PrunekitError:
        raise
    except Exception as error:  # of any kind, by field
        raise PrunekitError(
            f"{str(path)!r} is no configuration of generation ({reason(error)}); restore it from its source, or "
            "delete it"
        ) from error
    return found


def _check_record(folder: Path, saved: dict[str, Any]) -> None:
    if saved.get("format") != FORMAT:
        raise PrunekitError(
            f"{str(folder)!r} has format {saved.get('format')!r}; this prunekit reads {FORMAT}; "
            "load it with the prunekit that wrote it"
        )
    stages: Any = saved.get("stages")
    base = saved.get("base_config")
    units = [u for stage in stages for u in stage.values()] if _is_list_of(stages, dict) else [None]
    named = _is_list_of(saved.get("biases", []), str)
    if not isinstance(base, dict) or not all(_is_list_of(u, int) for u in units) or not named:
        raise PrunekitError(
            f"config.json of {str(folder)!r} must have base_config, an object, and stages, a list of group name → "
            "units kept, and its biases, if any, must be a list of names; restore it from its source"
        )


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(entry) is kind for entry in value)


def _build(
    folder: Path, saved: dict[str, Any], stored: dict[str, Stored], options: dict[str, Any]
) -> tuple[Any, Groups]:
    try:
        check_config(str(folder), saved["base_config"], False)
        config = AutoConfig.for_model(**without_kernels(saved["base_config"]))
        check_size(config, stored, str(folder), factor=LEAST_PART_LEFT)
        model = empty_model(config, **options)
        groups = discover(model)
        small = cut_again(model, groups, saved["stages"], saved.get("biases", []))
        check_widths(saved, groups)
        return small, groups
    except Exception as error:  # a configuration its family refuses: any exception of any validator
        raise PrunekitError(
            f"config.json of {str(folder)!r} does not lead to a model ({reason(error)}); restore it from its source"
        ) from error


def without_kernels(described: Any) -> Any:
    """A configuration that names no implementation of attention or experts: some would be fetched, and run."""
    if not isinstance(described, dict):
        return described
    return {k: without_kernels(v) for k, v in described.items() if not re.search(r"_implementation(_internal)?$", k)}


def in_dtype(model: nn.Module, dtype: torch.dtype | str) -> nn.Module:
    """Convert weights to another dtype; buffers, such as rotary frequencies, keep theirs, as in a plain load."""
    wanted = known_dtype(dtype)
    for p in model.parameters() if wanted != "auto" else ():
        p.data = p.data.to(wanted)
    return model


def known_dtype(dtype: torch.dtype | str) -> Any:
    """The dtype of an argument, or "auto"; a dtype that cannot be used in computations raises an error."""
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if wanted != "auto" and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise PrunekitError(
            f"dtype={dtype!r} is not known as one of weights; give 'auto' or one such as torch.float32 or 'float16'"
        )
    return wanted


def _fill(model: Any, folder: Path, stored: dict[str, Stored], mapped: bool) -> None:
    """Give an empty model its weights, file by file; tied ones are stored once.

    Unless they stay mapped, they are copied to memory of torch's own: a mapped file is aligned otherwise, and on some
    processors other kernels would then compute other last digits than before the model was saved.
    """
    _check_fit(model, folder, stored)
    for file in sorted({tensor.file for tensor in stored.values()}):
        weights = {name: tensor if mapped else tensor.clone() for name, tensor in load_file(file).items()}
        model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()


def _check_fit(model: Any, folder: Path, stored: dict[str, Stored]) -> None:
    expected = {name: tuple(t.shape) for name, t in own_tensors(model).items()}
    for name in [n for n in expected if n not in stored][:1]:
        raise PrunekitError(f"{str(folder)!r} lacks the weights of {name}; restore it from its source")
    for name, tensor in stored.items():
        if name not in expected:
            raise PrunekitError(f"{str(folder)!r} holds {name!r}, which its config.json knows nothing of; restore it")
        if tensor.shape != expected[name]:
            raise PrunekitError(
                f"the weights in {str(folder)!r} do not fit its config.json: {name} is stored with shape "
                f"{tensor.shape} and should have {expected[name]}; restore both from one source"
            )
    check_dtypes(folder, stored)
    check_floats(folder, model, stored)
