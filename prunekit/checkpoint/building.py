"""Builds models without weights from a record of cuts, and checks their size before memory is used."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from prunekit.checkpoint.folders import Stored
from prunekit.discovery import Groups, discover
from prunekit.errors import PrunekitError
from prunekit.locks import PROCESS
from prunekit.models import shapes_of
from prunekit.pruning import PruningPlan
from prunekit.pruning.cuts import Stages
from prunekit.pruning.surgery import cut


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
    for number, keep in enumerate(stages):
        groups = discover(model) if number else groups
        model = cut(model, _recorded_plan(groups, keep))
    modules = dict(model.named_modules())
    for name in biases:
        linear = modules.get(name.removesuffix(".bias"))
        if not name.endswith(".bias") or not isinstance(linear, nn.Linear) or linear.bias is not None:
            raise PrunekitError(f"no linear layer lacks a bias called {name!r}")
        linear.bias = nn.Parameter(linear.weight.new_empty(linear.out_features))
    return model


def _recorded_plan(groups: Groups, keep: dict[str, list[int]]) -> PruningPlan:
    return PruningPlan(keep, {name: groups[name].n_units for name in keep}, groups.n_parameters, groups.n_parameters)


def check_size(config: Any, stored: dict[str, Stored], source: str, *, factor: int) -> None:
    """Raise an error for a configuration that asks for far more than its files hold, before anything is allocated.

    Args:
        config: of the model to build.
        stored: tensors of the checkpoint.
        source: the checkpoint, for the message.
        factor: how many times the stored elements the model may have.

    Raises:
        PrunekitError: it asks for more.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", None) or 0
    held = sum(_elements(t.shape) for t in stored.values())
    if layers > len(stored):
        raise PrunekitError(
            f"config.json of {source!r} has {layers:,} layers, but {len(stored)} tensors are stored; "
            "restore both from one source"
        )
    try:
        with PROCESS, torch.device("meta"):  # not even buffers cost anything
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        model.tie_weights()
    except Exception:  # an error of the family is reported by the load that follows
        return
    asked = sum(_elements(shape) for shape in shapes_of(model).values())
    if asked > factor * held:
        raise PrunekitError(
            f"config.json of {source!r} asks for {asked:,} parameters, but its weights hold {held:,} numbers; "
            "restore both from one source"
        )


def _elements(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
