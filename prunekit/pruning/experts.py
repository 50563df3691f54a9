"""Experts of any width: torch's grouped products do not support every width."""

from typing import Any

from torch import nn

from prunekit.compat import EXPERTS_IMPLEMENTATION as EXPERTS

ROW = 16  # bytes that a row must be a multiple of in torch's grouped products
_GROUPED = "grouped_mm"


def usable(model: Any) -> Any:
    """The model, set to run experts one after the other if grouped products do not support their widths.

    Args:
        model: whose configurations are its own; they change in place. Its setting for experts stays,
            where that is anything but grouped products.
    """
    for config in (vars(module.config) for module in model.modules() if _has_odd_experts(module)):
        if config[EXPERTS] == _GROUPED:
            config[EXPERTS] = "eager"
    return model


def fit_for_grouped(model: nn.Module) -> bool:
    """Whether grouped products take the widths of a model's experts; True where it has none."""
    return not any(_has_odd_experts(module) for module in model.modules())


def _has_odd_experts(module: nn.Module) -> bool:
    """Stacked weights of a module that chooses how to run them, (expert, out, in) or (expert, in, out)."""
    if EXPERTS not in getattr(vars(module).get("config"), "__dict__", {}):
        return False
    stacked = [p for p in module.parameters(recurse=False) if p.dim() == 3]
    return any(size * p.element_size() % ROW for p in stacked for size in p.shape[1:])
