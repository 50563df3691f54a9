"""Models without weights: built from a configuration, cut again as recorded, measured before memory is asked for."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from prunekit.checkpoint.folders import Stored
from prunekit.discovery import Groups, discover
from prunekit.errors import PrunekitError
from prunekit.pruning import PruningPlan, prune

Stages = list[dict[str, list[int]]]
Shapes = dict[str, tuple[int, ...]]


def empty_model(config: Any, **options: Any) -> Any:
    """The model of a configuration, its parameters on the meta device, its buffers real; no code from elsewhere."""
    with init_empty_weights():
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
    model.tie_weights()
    return model


def shapes_of(model: nn.Module) -> Shapes:
    """Parameter name → shape, tied ones once."""
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds: parameters as `named_parameters()` has them, tied ones once; persistent buffers."""
    parameters = {id(p) for p in model.parameters()}
    kept = {name: t for name, t in model.state_dict(keep_vars=True).items() if id(t) not in parameters}
    return dict(model.named_parameters()) | kept


def cut_again(model: Any, groups: Groups, stages: Stages, biases: Sequence[str] = ()) -> Any:
    """An uncut model without weights, with every recorded cut made again in order.

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
        model = prune(model, _recorded_plan(groups, keep), inplace=True, measure=False)
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
    """Refuses a configuration that asks for far more than its files hold, before anything is allocated.

    Args:
        config: of the model to build.
        stored: tensors of the checkpoint.
        source: the checkpoint, for the message.
        factor: how many times the stored elements the model may have.

    Raises:
        PrunekitError: it asks for more.
    """
    layers, held = getattr(config, "num_hidden_layers", None) or 0, sum(_elements(t.shape) for t in stored.values())
    if layers > len(stored):
        raise PrunekitError(
            f"config.json of {source!r} has {layers:,} layers, but {len(stored)} tensors are stored; "
            "restore both from one source"
        )
    try:
        with torch.device("meta"):  # not even buffers cost anything
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        model.tie_weights()
    except Exception:  # whatever the family refuses is told by the load that follows
        return
    asked = sum(_elements(shape) for shape in shapes_of(model).values())
    if asked > factor * held:
        raise PrunekitError(
            f"config.json of {source!r} asks for {asked:,} parameters, but its weights hold {held:,} numbers; "
            "restore both from one source"
        )


def _elements(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
