"""Helpers for any model: evaluation mode, device, size, tensors, and maximum tokens."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING as CAUSAL
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from prunekit.checks import PROCESS
from prunekit.compat import ATTENTION_IMPLEMENTATION, EXPERTS_IMPLEMENTATION, INITIALISED, class_names, offloaded
from prunekit.errors import PrunekitError

_OTHER_TASKS = ("SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "MULTIPLE_CHOICE")
_OTHER_HEADS = {name for task in _OTHER_TASKS for name in class_names(task).values()}
_DEVICES = "give 'cpu', or 'cuda' where there is a GPU"
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
    """Device of the model's first parameter in memory, to which its inputs go.

    Weights that accelerate has offloaded (device_map) come when their module runs.

    Raises:
        PrunekitError: it has weights that nothing brings into memory, so that it runs nowhere.
    """
    check_has_weights(model, brought=True)
    here = (parameter.device for parameter in model.parameters() if not parameter.is_meta)
    return next(here, torch.device("cpu"))


def known_device(device: torch.device | str) -> torch.device:
    """The device that is meant.

    Raises:
        PrunekitError: torch knows none of that name, or this machine has none, or it holds no weights.
    """
    try:
        found = torch.empty(0, device=device).device
    except Exception as error:  # torch raises several kinds, by device
        raise PrunekitError(
            f"device={str(device)!r} cannot be used: torch knows none of that name, or this machine has none; "
            f"{_DEVICES}"
        ) from error
    if found.type == "meta":
        raise PrunekitError(f"device='meta' cannot be used: it keeps shapes and no weights; {_DEVICES}")
    return found


def name_model(model: Any, source: str) -> None:
    """Set `name_or_path`, as `transformers` does, so that adapters name their base model."""
    model.config.name_or_path = model.name_or_path = source


def check_language_model(model: nn.Module) -> None:
    """Raise an error for a model of transformers with a head that gives no logits of tokens, such as a reward model.

    Raises:
        PrunekitError: names its class.
    """
    if type(model).__name__ in _OTHER_HEADS:
        raise PrunekitError(
            f"a {type(model).__name__} is no causal language model, and prunekit prunes those alone; give one that "
            "AutoModelForCausalLM loads"
        )


def check_has_weights(model: nn.Module, *, brought: bool = False) -> None:
    """Raise an error for a model whose weights are not in memory.

    Args:
        model: to check.
        brought: allow weights that accelerate brings when their module runs.

    Raises:
        PrunekitError: names the first parameter, and says whether accelerate has offloaded it.
    """
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    elsewhere = tuple(f"{path}." for path in offloaded(model)) if missing else ()
    name = next((name for name in missing if not (brought and name.startswith(elsewhere))), None)
    if name is None:
        return
    if name.startswith(elsewhere):
        raise PrunekitError(
            f"{name} is offloaded (device_map), and weights are needed in memory; load the model without device_map, "
            "or prune its folder with prune_checkpoint(...), which needs the memory of one layer"
        )
    raise PrunekitError(
        f"the model has no weights in {name} (meta device: a shape and no data); load the weights first, with "
        "prunekit.load(folder)"
    )


def check_all_or_none(model: nn.Module) -> None:
    """Raise an error for a model of which some weights are in memory and some are not.

    A model without any is a structure, and can be cut as one. With half of them torch would add numbers to nothing.

    Raises:
        PrunekitError: as `check_has_weights`.
    """
    if not all(parameter.is_meta for parameter in model.parameters()):
        check_has_weights(model)


def count_parameters(model: nn.Module) -> int:
    """Parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def max_positions(model: nn.Module) -> int | None:
    """Maximum tokens of a forward pass by the configuration; None without a limit."""
    return positions_of(model.config)


def positions_of(config: Any) -> int | None:
    """Maximum number of tokens that a configuration allows in one forward pass; None where it sets no limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def auto_class(config: Any) -> Any:
    """The class of `transformers` that builds a language model from a configuration.

    It is `AutoModelForCausalLM`, or `AutoModelForImageTextToText` for models of pictures and text that the former does
    not build: such a model is cut as a whole, in its language model.
    """
    pictured = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if pictured and type(config) not in CAUSAL else AutoModelForCausalLM


def empty_model(config: Any, **options: Any) -> Any:
    """The model of a configuration, its parameters on the meta device, its buffers real; no code from elsewhere."""
    with _without_parameters():
        model: Any = auto_class(config).from_config(config, trust_remote_code=False, **options)
    model.tie_weights()
    return model


@contextmanager
def _without_parameters() -> Iterator[None]:
    """A context in which this thread's new parameters stand on the meta device; accelerate does that to all threads."""
    plain, own = nn.Module.register_parameter, get_ident()
    with PROCESS, init_empty_weights():
        empty = nn.Module.register_parameter

        def register(module: nn.Module, name: str, parameter: Any) -> None:
            here = get_ident() == own and not hasattr(parameter, INITIALISED)  # a shared one is empty already
            (empty if here else plain)(module, name, parameter)
            if here and parameter is not None:  # there is nothing to fill with random numbers
                setattr(getattr(module, name), INITIALISED, True)

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
