"""What a model is lent for the time of a trace: parameters that cost nothing, hooks that follow its modules."""

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from prunekit.compat import untraced
from prunekit.discovery.labelling import LabelMode


@contextmanager
def free_parameters(model: nn.Module, mode: LabelMode) -> Iterator[None]:
    """While open, parameters are one zero, expanded, with fresh labels a dimension; buffers stand on the CPU."""
    fakes = {id(p): _fake_parameter(mode, name, p) for name, p in model.named_parameters()}
    holders: list[dict[str, Any]] = [vars(m)[name] for m in model.modules() for name in ("_parameters", "_buffers")]
    before = [(holder, dict(holder)) for holder in holders]
    try:
        for holder, was in before:
            for name, value in was.items():
                if value is not None:
                    stand_in = fakes.get(id(value))
                    holder[name] = _own_copy(value) if stand_in is None else stand_in
        yield
    finally:
        for holder, was in before:
            holder.clear()
            holder.update(was)


def _own_copy(buffer: Tensor) -> Tensor:
    """A buffer on the CPU that the model may write to."""
    return torch.zeros(buffer.shape, dtype=buffer.dtype) if buffer.is_meta else buffer.detach().to("cpu", copy=True)


def _fake_parameter(mode: LabelMode, name: str, p: Tensor) -> Tensor:
    mode.trace.shapes[name] = tuple(p.shape)
    planes = []
    for d, n in enumerate(p.shape):
        labels = mode.graph.new((n,), "parameter")
        mode.trace.offsets[name, d] = (int(labels[0]) if n else 0, n)
        planes.append(labels.view([n if i == d else 1 for i in range(p.dim())]).expand(p.shape))
    dtype = p.dtype if p.dtype.is_floating_point else torch.float32
    return mode.mark_parameter(torch.zeros((), dtype=dtype).expand(p.shape), tuple(planes))


@contextmanager
def module_paths(model: nn.Module, mode: LabelMode) -> Iterator[None]:
    """While open, the mode knows which module runs."""
    names = {id(module): name for name, module in model.named_modules()}
    stack: list[str] = []

    def enter(module: nn.Module, _args: Any) -> None:
        stack.append(mode.path)
        mode.path = mode.entered = names.get(id(module), mode.path)

    def leave(_module: nn.Module, _args: Any, _result: Any) -> None:
        mode.path = stack.pop()

    with ExitStack() as hooks:
        hooks.callback(torch_module.register_module_forward_pre_hook(enter).remove)
        hooks.callback(torch_module.register_module_forward_hook(leave, always_call=True).remove)
        yield


@contextmanager
def labelled_arguments(model: nn.Module, mode: LabelMode) -> Iterator[None]:
    """While open, constants that are handed to a module with parts of its own carry labels inside it."""
    stack: list[list[tuple[Any, Any]]] = []

    def enter(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        with untraced():
            stack.append(mode.label_arguments(args, kwargs))

    def leave(_module: nn.Module, _args: Any, _result: Any) -> None:
        mode.restore(stack.pop())

    with ExitStack() as hooks:
        for module in model.modules():
            if module._modules:
                hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True).remove)
                hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield


@contextmanager
def uncollected() -> Iterator[None]:
    """While open, Python does not look for cycles: a trace keeps nearly all that it makes, so looking only costs."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
