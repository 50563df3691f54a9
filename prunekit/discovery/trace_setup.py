"""Contexts that prepare a model for a trace: parameters without memory, and hooks on its modules."""

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.compat import untraced
from prunekit.discovery.labelling import LabelMode


@contextmanager
def free_parameters(model: nn.Module, mode: LabelMode) -> Iterator[None]:
    """A context in which parameters are expanded zeros with fresh labels per dimension, and buffers are on the CPU."""
    fakes = {id(p): _fake_parameter(mode, name, p) for name, p in model.named_parameters()}
    fakes |= {id(b): mode.buffers.follow(name, _own_copy(b)) for name, b in model.named_buffers()}
    holders: list[dict[str, Any]] = [vars(m)[name] for m in model.modules() for name in ("_parameters", "_buffers")]
    before = [(holder, dict(holder)) for holder in holders]
    try:
        for holder, was in before:
            for name, value in was.items():
                if value is not None:
                    holder[name] = fakes[id(value)]
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
    """A context in which the mode knows which module runs."""
    names = {id(module): name for name, module in model.named_modules()}
    stack: list[str] = []

    def enter(module: nn.Module, _args: Any) -> None:
        stack.append(mode.path)
        mode.path = mode.entered = names.get(id(module), mode.path)

    def leave(_module: nn.Module, _args: Any, _result: Any) -> None:
        mode.path = stack.pop()

    with ExitStack() as hooks:
        for module in model.modules():  # torch's hooks for all modules would also meet those of other threads
            hooks.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            hooks.callback(module.register_forward_hook(leave, prepend=True, always_call=True).remove)
        yield


@contextmanager
def labelled_arguments(model: nn.Module, mode: LabelMode) -> Iterator[None]:
    """A context in which constants passed to a module with submodules have labels inside it."""
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
    """A context without garbage collection, since a trace keeps nearly all its objects."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
