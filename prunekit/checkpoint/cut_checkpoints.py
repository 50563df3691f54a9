"""Cut checkpoints of `model_type: "prunekit"`: the uncut configuration, the units kept cut after cut, and layer widths.

They load by building the uncut model without weights and cutting it the same way, so that none is mistaken for a plain
one.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import load_checkpoint_and_dispatch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, GenerationConfig

from prunekit.annotations import fault_in
from prunekit.checkpoint.config_checks import check_config
from prunekit.checkpoint.folders import (
    FLOATS,
    Stored,
    check_dtypes,
    check_size,
    read_config,
    read_object,
    stored_tensors,
)
from prunekit.checkpoint.plain_checkpoints import check_floats
from prunekit.compat import offloaded
from prunekit.discovery import Groups, discover
from prunekit.discovery.groups import layer_in
from prunekit.errors import PrunekitError, reason
from prunekit.models import empty_model, name_model, own_tensors
from prunekit.pruning import PruningPlan
from prunekit.pruning.configurations import usable
from prunekit.pruning.cuts import HEADS, Cuts, Stages, head_fields
from prunekit.pruning.describing import describe
from prunekit.pruning.surgery import cut

MODEL_TYPE = "prunekit"
FORMAT = 1
LEAST_PART_LEFT = 1000  # a record may say that the uncut model was this many times larger, not more
MOST_STAGES = 100  # cuts on record: each is made again, which takes a trace


def load_cut(
    folder: Path,
    dtype: torch.dtype | str = "auto",
    *,
    mapped: bool = False,
    spread: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """The model of a folder with `model_type: "prunekit"`, an object of its family's own class.

    Args:
        folder: that `save` wrote.
        dtype: of the weights; the checkpoint's own by default.
        mapped: parameters are views of the mapped files and cost no memory; else copies.
        spread: options of accelerate that spread the weights over devices, `device_map` and `offload_folder`.
        options: for building the model, such as `attn_implementation`.

    Raises:
        PrunekitError: the record and the weights do not fit each other.
    """
    saved = read_config(folder)
    _check_record(folder, saved)
    stored = stored_tensors(folder)
    model, groups = _build(folder, saved, stored, options)
    _check_fit(model, folder, stored)
    if spread:
        for name, parameter in model.named_parameters():  # accelerate casts to what it finds, as in the configuration
            parameter.data = parameter.data.to(FLOATS[stored[name].dtype])
        model = _filled_and_spread(model, folder, dtype, spread)
    else:
        _fill(model, stored, mapped)
    if os.path.lexists(folder / "generation_config.json"):
        model.generation_config = _generation(folder / "generation_config.json")
    name_model(model, str(folder))
    model = usable(in_dtype(model, dtype)).eval()
    if not (mapped or offloaded(model)):  # it would be read from disk, every weight of it
        describe(model, groups)
    return model


def _generation(path: Path) -> GenerationConfig:
    told = read_object(path)
    try:
        found = GenerationConfig.from_dict(told)
        found.validate()
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
    told = (saved.get("base_config"), saved.get("stages"), saved.get("biases", []))
    if fault_in("config.json", told, tuple[dict, list[dict[str, list[int]]], list[str]]) is not None:
        raise PrunekitError(
            f"config.json of {str(folder)!r} must have base_config, an object, and stages, a list of group name → "
            "units kept, and its biases, if any, must be a list of names; restore it from its source"
        )


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


def _filled_and_spread(model: Any, folder: Path, dtype: torch.dtype | str, spread: Mapping[str, Any]) -> Any:
    """An empty model with its weights where a device map wants them, each read once.

    Raises:
        PrunekitError: the map does not fit the model or this machine.
    """
    whole, wanted = list(model._no_split_modules or ()), None if dtype == "auto" else known_dtype(dtype)
    try:
        return load_checkpoint_and_dispatch(model, folder, no_split_module_classes=whole, dtype=wanted, **spread)
    except Exception as error:  # of accelerate and safetensors, of several kinds
        raise PrunekitError(
            f"device_map={spread['device_map']!r} cannot spread the model of {str(folder)!r} ({reason(error)}); give "
            "each module a place, and offload_folder= for weights on the disk"
        ) from error


def _fill(model: Any, stored: dict[str, Stored], mapped: bool) -> None:
    """Give an empty model its weights, file by file; tied ones are stored once.

    Unless they stay mapped, they are copied to memory of torch's own: a mapped file is aligned otherwise, and on some
    processors other kernels would then compute other last digits than before the model was saved.
    """
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


def cut_again(model: Any, groups: Groups, stages: Stages, biases: Sequence[str] = ()) -> Any:
    """A model without weights from an uncut configuration and the recorded cuts, in order.

    Args:
        model: that is cut in place.
        groups: of the model.
        stages: group name → units kept, cut after cut.
        biases: parameters that linear layers were given since.

    Raises:
        PrunekitError: a bias of what is no linear layer, or has one; or what `prune` raises.
    """
    if len(stages) > MOST_STAGES:
        raise PrunekitError(f"{len(stages)} cuts are on record, and {MOST_STAGES} are made again at most")
    for number, keep in enumerate(stages):
        groups = discover(model) if number else groups
        n_units, n_parameters = {name: groups[name].n_units for name in keep}, groups.n_parameters
        model = cut(model, PruningPlan(keep, n_units, n_parameters, n_parameters))
    modules = dict(model.named_modules())
    for name in biases:
        linear = modules.get(name.removesuffix(".bias"))
        if not name.endswith(".bias") or not isinstance(linear, nn.Linear) or linear.bias is not None:
            raise PrunekitError(f"no linear layer lacks a bias called {name!r}")
        linear.bias = nn.Parameter(linear.weight.new_empty(linear.out_features))
    return model


def layer_widths(cuts: Cuts) -> dict[str, Any]:
    """Width fields of config.json: the uncut values, and `per_layer_config` for the layers that differ.

    The form is that of `transformers`' own `PreTrainedConfig(per_layer_config=…)`.
    """
    text = cuts.config.get_text_config()
    whole: dict[str, Any] = {"num_hidden_layers": text.num_hidden_layers}
    layers: dict[str, dict[str, Any]] = {}
    for name, groups in cuts.roles.items():
        fields = cuts.fields[name] or (head_fields(text, groups[0]) if groups[0].kind in HEADS else {})
        for group in groups:
            said = {field: cuts.n_left(group) * per_unit for field, per_unit in fields.items()}
            if group.layer is None:
                whole |= said
            elif said and group.name in cuts.left:
                whole |= {field: getattr(text, field) for field in fields}
                layers.setdefault(str(group.layer), {}).update(said)
    for path, _, kind in (name.partition(":") for name, units in cuts.left.items() if not units):
        layer = layers.setdefault(str(layer_in(path)), {})  # blocks that went are named as the layer names them
        layer["skip"] = sorted([*layer.get("skip", []), "layer" if kind == "layer" else path.rpartition(".")[2]])
    return {**whole, "per_layer_config": dict(sorted(layers.items(), key=lambda item: int(item[0])))}
