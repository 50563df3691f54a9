"""Loads plain checkpoints and adapters with `transformers` and peft; what these would do without a word is refused."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from prunekit.checkpoint.config_checks import ADAPTER, check_described, has_adapter
from prunekit.checkpoint.folders import FLOATS, Stored, check_size, read_object
from prunekit.checkpoint.origins import files_alone
from prunekit.checks import PROCESS
from prunekit.errors import PrunekitError, reason, similar
from prunekit.models import auto_class, name_model
from prunekit.names import NAMES, PACKAGED, WORLD


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
    if next(model.parameters()).is_meta:  # where transformers leaves two copies of one matrix apart
        model.tie_weights()
    if is_falsely_tied(model):  # `transformers` leaves them untied, so that the model is not what is described
        raise PrunekitError(
            f"config.json of {source!r} says tie_word_embeddings, but two different matrices are stored; set it to "
            "false, or restore both from one source"
        )
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
    meant = similar(source, (WORLD, *PACKAGED), 0.8)
    return PrunekitError(
        f"there is no folder {source!r}{meant}, and as a hub id it {what}; give the path of a folder with "
        f"config.json and safetensors, a .gguf file, a hub id that can be reached, {NAMES}"
    )


def check_floats(folder: Path, model: nn.Module, stored: dict[str, Stored]) -> None:
    """Raise an error for integers in a parameter's place, which `transformers` converts to floats without a warning."""
    names = {name for name, _ in model.named_parameters()}
    for name, tensor in stored.items():  # which may have other names than the model's, as those of experts
        is_weight = name in names or (name.endswith((".weight", ".bias")) and tensor.dtype != "BOOL")
        if is_weight and tensor.dtype not in FLOATS and len(tensor.shape) < 4:  # a mask has four dimensions
            raise PrunekitError(
                f"{name!r} of {str(folder)!r} is stored as {tensor.dtype}, but weights must be floating-point numbers; "
                "restore them from their source"
            )


def check_left_out(source: str, model: Any, unexpected: Iterable[str]) -> None:
    """Raise an error for stored weights that belong to a layer, or a module, of which the configuration has less.

    Others are left out as `transformers` does, such as those of a part for pictures.
    """
    modules, base = dict(model.named_modules()), f"{model.base_model_prefix}."
    for key in sorted(map(str, unexpected)):
        if any(map(partial(_belongs, modules), (key, base + key, key.removeprefix(base)))):
            raise PrunekitError(
                f"{source!r} holds {key!r}, for which the model of its config.json has no place (too few layers, or no "
                "biases); restore both from one source"
            )


def is_falsely_tied(model: Any) -> bool:
    """Whether the configuration ties the embedding and the head, and they are two matrices."""
    named, head = "tie_word_embeddings", model.get_output_embeddings()
    asked = getattr(model.config.get_text_config(), named, getattr(model.config, named, False))
    tied = asked and getattr(model, "_tied_weights_keys", None) and head is not None
    return bool(tied) and head.weight is not model.get_input_embeddings().weight


def _belongs(modules: dict[str, nn.Module], key: str) -> bool:
    """Whether a tensor would stand behind the last element of a list of the model, or in one of its linear layers."""
    parts = key.split(".")
    for place, part in enumerate(parts):
        above = modules.get(".".join(parts[:place]))
        if part.isdecimal() and isinstance(above, nn.ModuleList) and int(part) >= len(above):
            return True
    owner = modules.get(".".join(parts[:-1]))
    return owner is not None and not owner._modules and parts[-1] in ("weight", "bias") and bool(owner._parameters)


@contextmanager
def base_of_adapter(folder: str | Path) -> Iterator[str]:
    """The folder or hub id of an adapter's base model: the weights beside it, else the one that it names.

    Raises:
        PrunekitError: there is no adapter, or it names no base model.
    """
    folder = Path(folder)
    if not has_adapter(folder):
        raise PrunekitError(f"{str(folder)!r} is no folder with an adapter ({ADAPTER}); leave out merge_adapter=True")
    if not (folder / "config.json").exists():
        named = read_object(folder / ADAPTER).get("base_model_name_or_path")
        if not named or not isinstance(named, str):
            raise PrunekitError(
                f"{ADAPTER} of {str(folder)!r} names no base model; write its folder or hub id into "
                "base_model_name_or_path"
            )
        yield named
        return
    with TemporaryDirectory() as beside:  # transformers would attach the adapter to the weights in its own folder
        for file in folder.absolute().iterdir():
            if not file.name.startswith("adapter_"):
                (Path(beside) / file.name).symlink_to(file)
        yield beside


def merge_adapter_of(folder: str | Path, model: Any) -> Any:
    """The model with the folder's adapter merged into its weights.

    Raises:
        PrunekitError: peft cannot read it, or it does not fit the model.
    """
    from peft import PeftModel

    try:
        merged = PeftModel.from_pretrained(model, folder).merge_and_unload()
    except Exception as error:  # peft's, torch's and safetensors', of any kind
        raise PrunekitError(
            f"the adapter in {str(folder)!r} does not fit {type(model).__name__}, loaded as its base "
            f"({reason(error)}); name the model that it was trained on in base_model_name_or_path of its {ADAPTER}"
        ) from error
    name_model(merged, str(folder))
    return merged
