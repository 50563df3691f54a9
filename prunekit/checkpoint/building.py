"""Builds models without weights from a record of cuts, and checks their size before memory is used."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from prunekit.checkpoint.folders import Stored
from prunekit.checks import PROCESS
from prunekit.discovery import Groups, discover
from prunekit.errors import PrunekitError
from prunekit.models import auto_class, shapes_of
from prunekit.pruning import PruningPlan
from prunekit.pruning.cuts import Stages
from prunekit.pruning.surgery import cut

FEW_CALLS, CALLS_A_TENSOR = 20_000, 2_000  # of torch, to build a model; experts are built one by one, and stored as one
ROOM = 2**27  # numbers in constants, such as masks, that no weights stand for
MOST_STAGES = 100  # cuts on record: each is made again, which takes a trace


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
    held = sum(_elements(t.shape) for t in stored.values())
    counter = _Counter(FEW_CALLS + CALLS_A_TENSOR * len(stored))
    try:
        with PROCESS, torch.device("meta"), counter:  # not even buffers cost anything
            model: Any = auto_class(config).from_config(config, trust_remote_code=False)
        model.tie_weights()
    except Exception:  # an error of the family is reported by the load that follows
        if counter.n_left >= 0:
            return
        raise PrunekitError(
            f"config.json of {source!r} describes a model of many more parts than the {len(stored)} tensors that are "
            "stored; restore both from one source"
        ) from None
    asked = sum(_elements(shape) for shape in shapes_of(model).values())
    constants = sum(_elements(buffer.shape) for buffer in model.buffers())
    if asked > factor * held or constants > factor * held + ROOM:
        raise PrunekitError(
            f"config.json of {source!r} asks for {asked:,} parameters and {constants:,} constants, but its weights "
            f"hold {held:,} numbers; restore both from one source"
        )


class _Counter(TorchFunctionMode):
    """Ends the building of a model that makes more calls than its stored tensors can explain.

    Attributes:
        n_left: calls that may still come; below 0 where it ended the building.
    """

    def __init__(self, n_calls: int) -> None:
        super().__init__()
        self.n_left = n_calls

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.n_left -= 1
        if self.n_left < 0:
            raise OverflowError
        return func(*args, **(kwargs or {}))


def _elements(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
