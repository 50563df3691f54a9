"""Loading plain checkpoints with `transformers`, and what it would do without a word is refused."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from prunekit.checkpoint.building import check_size
from prunekit.checkpoint.config_checks import check_described
from prunekit.checkpoint.folders import Stored
from prunekit.checkpoint.left_out import check_left_out, check_ties
from prunekit.checkpoint.origins import files_alone
from prunekit.checks import PROCESS
from prunekit.errors import PrunekitError, reason
from prunekit.models import auto_class


def check_plain_size(folder: Path, stored: dict[str, Stored]) -> None:
    """Raise an error for a configuration that asks for far more than the files of its folder hold."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # any error; the load that follows reports it
        return
    check_size(config, stored, str(folder), factor=2)


def load_plain(source: str, dtype: torch.dtype | str = "auto", trust_remote_code: bool = False, **options: Any) -> Any:
    """The model of a folder or hub id, loaded by `transformers`; missing or unfitting weights raise an error."""
    where = files_alone(source)
    if not trust_remote_code and not Path(source).is_dir():  # a folder's was checked as it was read
        check_described(_described(source, where), source)
    try:
        with PROCESS:
            model, info = _auto_class(source, trust_remote_code, where).from_pretrained(
                source,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                adapter_kwargs=where,  # asked for on a way of its own
                **where,
                **options,
            )
    except PrunekitError:
        raise
    except ImportError as error:
        packages = dict.fromkeys(re.findall(r"pip install (?:-U |--upgrade )?([\w\[\]-]+)", str(error)))
        how = f"pip install {' '.join(packages)}" if packages else "install what the traceback names"
        raise PrunekitError(
            f"the model of {source!r} needs a package that is not installed; {how}, and load the model again"
        ) from error
    except Exception as error:  # transformers, the hub client and safetensors each raise kinds of their own
        raise _unloadable(source, where, reason(error)) from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise PrunekitError(
            f"{source!r} holds an adapter, which transformers attaches to its base model; download it and give its "
            "folder with merge_adapter=True"
        )
    if info["missing_keys"] or info["mismatched_keys"]:
        names = ", ".join(str(name) for name in [*info["missing_keys"], *info["mismatched_keys"]][:4])
        raise PrunekitError(
            f"{source!r} lacks weights, or has some of the wrong shape: {names}; restore it from its source"
        )
    check_left_out(source, model, info["unexpected_keys"])
    check_ties(source, model)
    return model


def _auto_class(source: str, trust_remote_code: bool, where: dict[str, bool]) -> Any:
    """The class to load with; where the configuration cannot be read, the load that follows reports it."""
    with suppress(Exception):
        return auto_class(AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **where))
    return AutoModelForCausalLM


def _described(source: str, where: dict[str, bool]) -> dict[str, Any]:
    """config.json of a hub id; empty where there is none, which the load that follows reports."""
    with suppress(Exception):
        found: dict[str, Any] = PretrainedConfig.get_config_dict(source, **where)[0]
        return found
    return {}


def _unloadable(source: str, where: dict[str, bool], why: str) -> PrunekitError:
    if Path(source).is_dir():
        return PrunekitError(
            f"cannot load {source!r} as a causal language model ({why}); give a folder with config.json and "
            "safetensors, or a hub id that can be reached"
        )
    what = "was not fetched before, and the hub cannot be reached now" if where else f"does not load ({why})"
    return PrunekitError(
        f"there is no folder {source!r}, and as a hub id it {what}; give the path of a folder with config.json and "
        "safetensors, or a hub id that can be reached"
    )


def check_floats(folder: Path, model: nn.Module, stored: dict[str, Stored]) -> None:
    """Raise an error for integers in a parameter's place, which `transformers` converts to floats without a warning."""
    names = {name for name, _ in model.named_parameters()}
    for name, tensor in stored.items():  # which may have other names than the model's, as those of experts
        is_weight = name in names or (name.endswith((".weight", ".bias")) and tensor.dtype != "BOOL")
        if is_weight and not tensor.is_float and len(tensor.shape) < 4:  # a mask has four dimensions
            raise PrunekitError(
                f"{name!r} of {str(folder)!r} is stored as {tensor.dtype}, but weights must be floating-point numbers; "
                "restore them from their source"
            )
