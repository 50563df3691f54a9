"""Builds the smaller model of a candidate from its plan as plain data."""

from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from prunekit.discovery import Groups, discover
from prunekit.pruning import PruningPlan, prune, surgery

Fields = Mapping[str, Any]  # of a PruningPlan, all but its groups and notes

# Groups of models that a worker has seen.
_GROUPS: "WeakKeyDictionary[nn.Module, Groups]" = WeakKeyDictionary()


def cut(model: nn.Module, plan: Fields, *, calib: Tensor | None = None) -> nn.Module:
    """The smaller model that a plan gives.

    Args:
        model: the dense one; unchanged.
        plan: fields of the plan.
        calib: tokens to re-fit on; None does not re-fit.
    """
    if model not in _GROUPS:
        _GROUPS[model] = discover(model)
    chosen = PruningPlan(**plan, groups=_GROUPS[model])
    if calib is None:
        return surgery.cut(model, chosen, inplace=False)
    return prune(model, chosen, compensate=calib, measure=False)
