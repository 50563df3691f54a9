"""Finds whether a model runs with a KV cache, and which blocks write to it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from prunekit.discovery.labelling import LabelMode, Trace
from prunekit.discovery.stored_integers import remembering
from prunekit.discovery.tracing import free_parameters, module_paths
from prunekit.errors import PrunekitError, reason
from prunekit.models import evaluating


def find_writers(model: nn.Module, paths: set[str]) -> set[str]:
    """Run one token through a model with its cache, its parameters costing nothing.

    Args:
        model: whose weights are not read and may stand on the meta device.
        paths: of the modules that are watched.

    Returns:
        The modules, of those, that write keys.

    Raises:
        PrunekitError: it does not run with a cache.
    """
    found: set[str] = set()
    mode = LabelMode(Trace())
    with (
        evaluating(model),
        free_parameters(model, mode),
        remembering(model),
        module_paths(model, mode),
        _watching(model, paths, found),
    ):
        try:
            with torch.no_grad(), mode:
                model(mode.input((1, 1)), use_cache=True)
        except Exception as error:  # whatever the family raises
            raise PrunekitError(
                f"the model does not run with its cache: in {mode.entered or type(model).__name__}, {reason(error)}"
            ) from error
    return found


@contextmanager
def _watching(model: nn.Module, paths: set[str], found: set[str]) -> Iterator[None]:
    """A context in which the paths of modules in which a layer of the cache gets other keys go into `found`."""

    def watch(path: str) -> tuple[Callable[..., None], Callable[..., None]]:
        before: list[Tensor | None] = []

        def enter(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            before[:] = _keys(args, kwargs)

        def leave(_module: nn.Module, args: tuple, kwargs: dict, _result: Any) -> None:
            after = _keys(args, kwargs)
            if len(after) != len(before) or any(a is not b for a, b in zip(after, before, strict=True)):
                found.add(path)

        return enter, leave

    with ExitStack() as hooks:
        for path in paths:
            enter, leave = watch(path)
            module = model.get_submodule(path)
            hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
        yield


def _keys(args: tuple, kwargs: dict) -> list[Tensor | None]:
    """Keys in each layer of a cache among the arguments; a layer of states has none."""
    caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
    return [getattr(layer, "keys", None) for cache in caches for layer in getattr(cache, "layers", ())]
