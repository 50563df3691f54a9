"""Experts of any width: torch's grouped products, which run all of them at once, do not take every width."""

from typing import Any

from torch import nn

ROW = 16  # bytes that a row must be a multiple of in torch's grouped products
_IMPLEMENTATION, _GROUPED = "_experts_implementation_internal", "grouped_mm"


def usable(model: Any) -> Any:  # noqa: ANN401
    """The model, whose experts run one after the other, where their widths forbid to run them at once.

    Args:
        model: whose configurations are its own; they change in place. What it is told to run its experts with stays,
            where that is anything but grouped products.
    """
    for module in model.modules():
        config = getattr(vars(module).get("config"), "__dict__", {})
        if config.get(_IMPLEMENTATION) == _GROUPED and not fit_for_grouped(module):
            config[_IMPLEMENTATION] = "eager"
    return model


def fit_for_grouped(module: nn.Module) -> bool:
    """Whether grouped products take the experts that a module itself holds; True where it holds none."""
    stacked = [p for p in module.parameters(recurse=False) if p.dim() == 3]  # (expert, out, in), or (expert, in, out)
    return not any(size * p.element_size() % ROW for p in stacked for size in p.shape[1:])
