"""Helpers for any model: evaluation mode, device, size, tensors, and maximum tokens."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from prunekit.compat import ATTENTION_IMPLEMENTATION, EXPERTS_IMPLEMENTATION
from prunekit.locks import PROCESS

Shapes = dict[str, tuple[int, ...]]

# The eager implementations of attention and experts run on any device, one after the other.
WRITTEN_OUT = (ATTENTION_IMPLEMENTATION, EXPERTS_IMPLEMENTATION)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A context in evaluation mode; each module's own mode is restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def logits_alone(model: nn.Module) -> dict[str, Any]:
    """Arguments that make a model return logits only.

    Its cache, and what it returns beside (attention, or router logits and a loss made of them), are no part of it.
    """
    accepted = inspect.signature(model.forward).parameters
    wanted = {"use_cache": False, "return_dict": True, **{name: False for name in accepted if name[:7] == "output_"}}
    any_name = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    return wanted if any_name else {name: value for name, value in wanted.items() if name in accepted}


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's first parameter."""
    return next(model.parameters()).device


def name_model(model: Any, source: str) -> None:
    """Set `name_or_path`, as `transformers` does, so that adapters name their base model."""
    model.config.name_or_path = model.name_or_path = source


def count_parameters(model: nn.Module) -> int:
    """Parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def max_positions(model: nn.Module) -> int | None:
    """Maximum tokens of a forward pass by the configuration; None without a limit."""
    return positions_of(model.config)


def positions_of(config: Any) -> int | None:
    """Maximum tokens by a configuration; None without a limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def empty_model(config: Any, **options: Any) -> Any:
    """The model of a configuration, its parameters on the meta device, its buffers real; no code from elsewhere."""
    with _without_parameters():
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
    model.tie_weights()
    return model


@contextmanager
def _without_parameters() -> Iterator[None]:
    """A context in which this thread's new parameters stand on the meta device; accelerate does that to all threads."""
    plain, own = nn.Module.register_parameter, get_ident()
    with PROCESS, init_empty_weights():
        empty = nn.Module.register_parameter

        def register(module: nn.Module, name: str, parameter: Any) -> None:
            (empty if get_ident() == own else plain)(module, name, parameter)

        nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
        yield


def shapes_of(model: nn.Module) -> Shapes:
    """Parameter name → shape, tied ones once."""
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of a checkpoint: parameters, tied ones once, and persistent buffers."""
    parameters = {id(p) for p in model.parameters()}
    kept = {name: t for name, t in model.state_dict(keep_vars=True).items() if id(t) not in parameters}
    return dict(model.named_parameters()) | kept


def fitting_length(wanted: int, config: Any) -> int:
    """Tokens per window: the wanted number, limited by the configuration."""
    limit = positions_of(config)
    return wanted if limit is None or limit < 2 else min(wanted, limit)


def configurations_of(model: nn.Module) -> list[Any]:
    """The configurations that a model's modules hold, each once; a cut layer has one of its own."""
    found = [vars(module).get("config") for module in model.modules()]
    return list({id(config): config for config in found if hasattr(config, "__dict__")}.values())


@contextmanager
def written_out(model: nn.Module, fields: Iterable[str] = WRITTEN_OUT) -> Iterator[None]:
    """A context in which attention and experts (or the given configuration fields) use the eager implementation.

    That is one arithmetic for every width, dtype and device, and experts run one after the other.
    """
    configs = [vars(config) for config in configurations_of(model)]
    before = [{name: config[name] for name in fields if name in config} for config in configs]
    try:
        for config, names in zip(configs, before, strict=True):
            config.update(dict.fromkeys(names, "eager"))
        yield
    finally:
        for config, names in zip(configs, before, strict=True):
            config.update(names)
