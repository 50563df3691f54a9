"""Experts written out: torch's grouped products of all experts at once take neither every width nor every dtype."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from prunekit.discovery.remembered import WRITTEN_OUT

STRIDE = 16  # bytes that a row of a grouped product must be a multiple of
EXPERTS = "_experts_implementation_internal"


@contextmanager
def written_out(model: nn.Module) -> Iterator[None]:
    """While open, attention and experts run written out, which is one arithmetic for every width, dtype and device."""
    configs = _configurations(model)
    before = [{name: config[name] for name in WRITTEN_OUT if name in config} for config in configs]
    try:
        for config, names in zip(configs, before, strict=True):
            config.update(dict.fromkeys(names, "eager"))
        yield
    finally:
        for config, names in zip(configs, before, strict=True):
            config.update(names)


def fit_for_grouped(model: nn.Module) -> bool:
    """Whether torch's grouped products take the widths of a model's experts; True where it has none."""
    stacked = [p for p in model.parameters() if p.dim() == 3]  # (expert, out, in)
    return not any(size * p.element_size() % STRIDE for p in stacked for size in p.shape[1:])


def usable(model: Any) -> Any:  # noqa: ANN401
    """The model, its experts set to run written out where their widths forbid grouped products."""
    if not fit_for_grouped(model):
        for config in _configurations(model):
            config.update({EXPERTS: "eager"} if config.get(EXPERTS) == "grouped_mm" else {})
    return model


def _configurations(model: nn.Module) -> list[dict[str, Any]]:
    """What the configurations of a model's modules hold; a cut layer has one of its own."""
    found = [vars(module).get("config") for module in model.modules()]
    return list({id(config): vars(config) for config in found if hasattr(config, "__dict__")}.values())
