"""Records cuts in configurations, which are copied first, since models may share them."""

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from prunekit.discovery import Groups
from prunekit.models import name_model
from prunekit.pruning.plans import PruningPlan

RECORD = "prunekit"  # the configuration field with the record of cuts
Stages = list[dict[str, list[int]]]


def own_configurations(model: nn.Module) -> None:
    """Give a model configurations that no other model holds, in place.

    Modules that shared one share its copy, and what stands inside another stands inside that one's copy.
    """
    copies: dict[int, Any] = {}
    for module in model.modules():
        own = vars(module)
        for name, value in own.items():
            if name == "config" or isinstance(value, PreTrainedConfig):
                own[name] = copy.deepcopy(value, copies)


def record(model: nn.Module, groups: Groups, plan: PruningPlan) -> None:
    """Record a cut in the configuration, so that it can be made again on an empty model.

    The record has `stages`, group name → units kept, one for each cut, and `before`, the uncut values of the fields
    that say something else now.
    """
    vars(model).pop("sparsity_report", None)  # its matrices are no longer these
    vars(model).pop("loss_change", None)  # an earlier step's
    config = getattr(model, "config", None)
    if config is None:
        return
    adapters = hasattr(model, "get_base_model")
    cut = {
        _base_name(model, name): list(units)
        for name, units in plan.keep.items()
        if len(units) < groups[name].n_units and not (adapters and groups[name].kind == "rank")
    }
    earlier = recorded(config) or {"stages": [], "before": {}}
    tokens = [("vocab_size", groups[name].n_units) for name in plan.keep if groups[name].kind == "vocabulary"]
    if cut:
        config.prunekit = {"stages": [*earlier["stages"], cut], "before": {**dict(tokens), **earlier["before"]}}
        _forget_source(base_of(model))


def recorded(config: Any) -> dict[str, Any]:
    """The record of cuts in a configuration; empty for an uncut model."""
    return getattr(config, RECORD, None) or {}


def base_of(model: Any) -> Any:
    """The model under an adapter wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _forget_source(model: Any) -> None:
    """Clear `name_or_path` of a cut model and keep it for its tokenizer."""
    if getattr(model.config, "name_or_path", ""):
        model.cut_from = model.config.name_or_path
        name_model(model, "")


def _base_name(model: Any, name: str) -> str:
    """The group's name in the model under an adapter wrapper, which is what is left after merging."""
    inner = base_of(model)
    prefix = next(path for path, module in model.named_modules() if module is inner)
    return name.removeprefix(f"{prefix}.") if prefix else name
