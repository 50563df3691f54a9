"""Traces one forward pass of one token with a label on every channel.

With batch 1 and sequence 1 every element of an activation is a channel. Parameters are replaced by tensors that
cost nothing (one zero, expanded), so a model of any size is traced without its weights.
"""

import gc
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.compat import offloaded, untraced
from prunekit.discovery.integer_positions import IntegerWatcher
from prunekit.discovery.labelling import LabelMode, Trace
from prunekit.discovery.labels import along, varying_dims
from prunekit.discovery.operations import lock_open_choices, tensors_in
from prunekit.discovery.parts import probing
from prunekit.discovery.stored_integers import remembering
from prunekit.errors import PrunekitError, reason
from prunekit.models import check_language_model, evaluating, logits_alone


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


@uncollected()
def trace(model: nn.Module, shape: tuple[int, int] = (1, 1), *, written_out: bool = True) -> Trace:
    """Run one token through `model` and record what happens to every channel.

    Args:
        model: a causal language model; its weights are not read and may stand on the meta device.
        shape: sequences and their tokens. With more than one token, only the constants passed to modules are
            meaningful.
        written_out: run attention and eager experts, so that every number is seen that they may need.

    Raises:
        PrunekitError: this is no model with parameters, or its forward pass does not run on one token.
    """
    if not isinstance(model, nn.Module) or not any(True for _ in model.parameters()):
        raise PrunekitError(f"a {type(model).__name__} has no parameters to prune; give a causal language model")
    check_language_model(model)
    elsewhere = offloaded(model)
    if elsewhere:
        raise PrunekitError(
            f"weights of {elsewhere[0]} and {len(elsewhere) - 1} more modules are offloaded (device_map), so the "
            "model cannot be traced or cut; load it without device_map, or prune its folder with "
            "prune_checkpoint(...), which needs the memory of one layer"
        )
    result = Trace()
    mode = LabelMode(result)
    watcher = IntegerWatcher(mode)
    with (
        evaluating(model),
        free_parameters(model, mode),
        remembering(model, written_out),
        labelled_arguments(model, mode),
        probing(model, mode, result.parts),
        module_paths(model, mode),  # last, so that its hooks run first
    ):
        try:
            with torch.no_grad(), watcher, mode:
                output = model(mode.input(shape), **logits_alone(model))
        except Exception as error:
            raise PrunekitError(
                f"the model does not run on one token, so its structure cannot be traced: "
                f"in {mode.entered or type(model).__name__}, {reason(error)}"
            ) from error
    _lock_what_towers_write_to(model, mode)
    _finish(mode, watcher, output)
    return result


def _lock_what_towers_write_to(model: nn.Module, mode: LabelMode) -> None:
    """The residual stream of a model of pictures or sound too: no token shows what their towers write into it."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    held = {type(module.config): path for path, module in model.named_modules() if path and hasattr(module, "config")}
    towers = [path for kind, path in held.items() if kind not in (type(config), type(text))]
    for labels in mode.graph.embedded if text is not config and towers else ():
        mode.graph.lock(labels, f"{towers[0]} may write into it, which one token of text does not show")


def _finish(mode: LabelMode, watcher: IntegerWatcher, output: Any) -> None:
    named = dict(output) if isinstance(output, dict) else dict(getattr(output, "__dict__", {}))
    if isinstance(output, (Tensor, tuple, list)):
        named = {}
    if not tensors_in(named or output):
        raise PrunekitError(f"the model returns a {type(output).__name__} without tensors; it must return logits")
    vocabulary = _tie_vocabulary(mode, named.get("logits"))
    for tensor in tensors_in(named or output):
        if tensor is not vocabulary:
            for plane in mode.operand(tensor).planes:
                mode.graph.lock(plane, "the model's output")
    lock_open_choices(mode)
    mode.trace.equations, mode.trace.sizes = watcher.equations(), watcher.sizes()


def _tie_vocabulary(mode: LabelMode, logits: Tensor | None) -> Tensor | None:
    """A token's logit goes with the rows that are looked up by it; returns the logits where they are understood."""
    planes = () if logits is None else mode.operand(logits).planes
    alike = len(planes) == 1 and all(rows.numel() == planes[0].shape[-1] for rows in mode.token_rows)
    if not mode.token_rows or mode.token_use or not alike or varying_dims(planes[0]) != {planes[0].dim() - 1}:
        also = f", which are also computed with ({mode.token_use})" if mode.token_use else ""
        for rows in mode.token_rows:
            mode.graph.lock(rows, f"rows are looked up by the input's tokens{also}")
        return None
    answers = along(planes[0], {planes[0].dim() - 1}).flatten()
    for rows in mode.token_rows:
        mode.graph.unify(rows.flatten(), answers)
    mode.graph.vocabulary.append(answers)
    return logits


# --- the trace that is stored with the groups ---------------------------------------------------


@dataclass(frozen=True, eq=False)
class Traced:
    """A trace and its model; valid while the model has the same modules and shapes."""

    trace: Trace
    model: weakref.ref[nn.Module]
    structure: tuple[Any, ...]

    @classmethod
    def of(cls, trace: Trace, model: nn.Module) -> "Traced":
        """Store a new trace of `model`."""
        return cls(trace, weakref.ref(model), _structure(model))

    def is_of(self, model: nn.Module) -> bool:
        """Whether the model is unchanged as far as can be seen; the check after a cut catches the rest."""
        return self.model() is model and self.structure == _structure(model)


def _structure(model: nn.Module) -> tuple[Any, ...]:
    return tuple(
        (path, id(module), tuple((name, p.shape) for name, p in module._parameters.items() if p is not None))
        for path, module in model.named_modules()
    )
