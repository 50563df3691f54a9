"""What is asked of any model: its mode, its device, its size, its tensors, and how many tokens it takes."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

Shapes = dict[str, tuple[int, ...]]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While open, nothing is dropped out; afterwards each module has its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def logits_alone(model: nn.Module) -> dict[str, Any]:
    """Arguments with which a model returns logits and nothing else that its configuration may ask for.

    Its cache, and what it returns beside (attention, or router logits and a loss made of them), are no part of it.
    """
    accepted = inspect.signature(model.forward).parameters
    wanted = {"use_cache": False, "return_dict": True, **{name: False for name in accepted if name[:7] == "output_"}}
    any_name = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    return wanted if any_name else {name: value for name, value in wanted.items() if name in accepted}


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies."""
    return next(model.parameters()).device


def name_model(model: Any, source: str) -> None:
    """Say where a model lies, as `transformers` does: adapters trained on it name their base so."""
    model.config.name_or_path = model.name_or_path = source


def count_parameters(model: nn.Module) -> int:
    """Parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def max_positions(model: nn.Module) -> int | None:
    """Tokens that fit into one forward pass, as the configuration says; None where it sets no limit."""
    return positions_of(model.config)


def positions_of(config: Any) -> int | None:
    """The same, of a configuration."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


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


def fitting_length(wanted: int, config: Any) -> int:
    """Tokens a window: as many as wanted, fewer where a model of this configuration takes fewer."""
    limit = positions_of(config)
    return wanted if limit is None or limit < 2 else min(wanted, limit)
