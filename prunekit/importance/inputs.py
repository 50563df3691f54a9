"""What linear layers read: sums over the inputs of many tokens, gathered in forward passes alone."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from prunekit.calibration import check_tokens, in_batches
from prunekit.discovery.groups import CoupledGroup, Member
from prunekit.errors import PrunekitError
from prunekit.importance.reduction import check_takes_tokens
from prunekit.models import evaluating

ROOM = 2**31  # bytes of sums over inputs that are held at once
_INPUT_DIM: dict[type[nn.Module], int] = {nn.Linear: 1, Conv1D: 0}


@dataclass(frozen=True)
class Reader:
    """A weight that multiplies activations.

    Attributes:
        input_dim: its dimension that runs over the inputs.
        modules: the linear layers whose weight it is; a tied one may have several.
    """

    input_dim: int
    modules: list[nn.Module]


def linear_readers(model: nn.Module) -> dict[str, Reader]:
    """Parameter → how linear layers read with it, for each that is the weight of one; not for computed weights."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, Reader] = {}
    for module in model.modules():
        for dim in (dim for kind, dim in _INPUT_DIM.items() if isinstance(module, kind)):
            name = names.get(id(module.weight))
            if name is not None:
                found.setdefault(name, Reader(dim, [])).modules.append(module)
    return found


def members_read(group: CoupledGroup, readers: dict[str, Reader]) -> tuple[Member, ...]:
    """The members of a group that linear layers read as inputs; where there are none, its rows in linear layers.

    Raises:
        PrunekitError: no linear layer has any part in it.
    """
    linear = tuple(m for m in group.members if m.parameter in readers)
    if not linear:
        raise PrunekitError(
            f"no linear layer reads {group.name!r}, so what it hands on cannot be measured; choose other groups with "
            "groups.of_kind(...), or another importance such as Magnitude()"
        )
    return tuple(m for m in linear if m.dim == readers[m.parameter].input_dim) or linear


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least; what is as wide already is not copied."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def sums_over_inputs(
    model: nn.Module,
    calib: Any,
    readers: Mapping[str, Reader],
    measure: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """What some linear layers read, measured and added up over all calibration tokens, in one pass.

    Args:
        model: a causal LM; left as it was. Its weights may be views of mapped files: each module's are widened
            while it runs and freed after it.
        calib: integers (n_samples, seq_len).
        readers: parameter name → where it is read.
        measure: inputs (n_tokens, n_in), float32 at least → what is added up.

    Returns:
        Parameter name → the sum.

    Raises:
        PrunekitError: a model that does not take tokens as those of transformers do, bad tokens, or an input that
            is not finite.
    """
    check_takes_tokens(model)
    tokens = check_tokens(calib, model)
    batches = in_batches(tokens)
    sums: dict[str, Tensor] = {}
    n_calls = len(batches) * sum(len(reader.modules) for reader in readers.values())
    bar = tqdm(total=n_calls, desc="activations", unit="layer", leave=False, delay=1)
    with bar, _watching(readers, sums, measure, bar), computing_wide(model), evaluating(model), torch.no_grad():
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    for name in readers:
        if name not in sums or not bool(sums[name].isfinite().all()):
            raise PrunekitError(f"what {name} reads is not finite, or never came: check the weights of the checkpoint")
    return sums


def in_portions(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Names, as many at once as `ROOM` holds of what they take; at least one.

    Args:
        sizes: name → bytes that are held for it.
    """
    portion: list[str] = []
    room = ROOM
    for name, size in sizes.items():
        if portion and size > room:
            yield portion
            portion, room = [], ROOM
        portion.append(name)
        room -= size
    if portion:
        yield portion


@contextmanager
def _watching(
    readers: Mapping[str, Reader],
    sums: dict[str, Tensor],
    measure: Callable[[Tensor], Tensor],
    bar: Any,
) -> Iterator[None]:
    """While open, what the layers read is measured and added up."""

    def adder(name: str) -> Callable[..., None]:
        def add(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            (x,) = (*args, *kwargs.values())
            measured = measure(wide(x).flatten(0, -2))
            sums[name] = sums[name] + measured if name in sums else measured
            bar.update()

        return add

    with ExitStack() as hooks:
        for name, reader in readers.items():
            for module in reader.modules:
                hooks.callback(module.register_forward_pre_hook(adder(name), with_kwargs=True).remove)
        yield


@contextmanager
def computing_wide(model: nn.Module) -> Iterator[None]:
    """While open, each module's own parameters are float32 at least, made when it starts and freed when it ends.

    So a half-precision model computes as a float32 one; the peak is one module's parameters more.
    """
    held: dict[nn.Module, dict[str, nn.Parameter | None]] = {}

    def enter(module: nn.Module, _args: Any) -> None:
        held[module] = dict(module._parameters)
        for name, p in held[module].items():
            if p is not None and p.is_floating_point():
                module._parameters[name] = nn.Parameter(wide(p.detach()), requires_grad=False)

    def leave(module: nn.Module, _args: Any, _result: Any) -> None:
        module._parameters.update(held.pop(module, {}))

    with ExitStack() as hooks:
        for module in model.modules():
            if module._parameters:
                hooks.callback(module.register_forward_pre_hook(enter).remove)
                hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        try:
            yield
        finally:
            for module, parameters in held.items():  # an interrupt passes by the hooks
                module._parameters.update(parameters)
