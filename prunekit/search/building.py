"""A plan as plain data becomes the smaller model that is measured."""

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from prunekit.discovery import Groups, discover
from prunekit.pruning import PruningPlan, prune

Fields = Mapping[str, Any]  # of a PruningPlan, all but its groups and notes

# What a worker need not discover again for the same model.
_GROUPS: "WeakKeyDictionary[nn.Module, Groups]" = WeakKeyDictionary()


def cut(model: nn.Module, plan: Fields, *, calib: Tensor | None = None) -> nn.Module:
    """A smaller model.

    Args:
        model: the dense one; it is left alone.
        plan: fields of the plan.
        calib: what to re-fit on; None leaves the rest as it is.
    """
    if model not in _GROUPS:
        _GROUPS[model] = discover(model)
    return prune(model, PruningPlan(**plan, groups=_GROUPS[model]), compensate=calib, measure=False)
