"""Statistics of the inputs of linear layers, and of experts whose matrices are stacked, gathered in forward passes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from prunekit.calibration import check_tokens, in_batches
from prunekit.compat import EXPERTS_IMPLEMENTATION, TRANSPOSED_EXPERTS, without_function_modes
from prunekit.discovery.groups import CoupledGroup, Member
from prunekit.errors import PrunekitError
from prunekit.models import evaluating, written_out

ROOM = 2**31  # bytes of statistics held at once
_INPUT_DIM: dict[type[nn.Module], int] = {nn.Linear: 1, Conv1D: 0}


@dataclass(frozen=True)
class Reader:
    """A weight that multiplies activations.

    Attributes:
        input_dim: the dimension of the inputs.
        modules: the linear layers with this weight; several if it is tied.
        n_experts: of a parameter that stacks one matrix of each expert, whose module is the only one; 0 of a matrix.
    """

    input_dim: int
    modules: list[nn.Module]
    n_experts: int = 0


def linear_readers(model: nn.Module) -> dict[str, Reader]:
    """Parameter name → its linear layers; computed weights are left out."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, Reader] = {}
    for module in model.modules():
        for dim in (dim for kind, dim in _INPUT_DIM.items() if isinstance(module, kind)):
            name = names.get(id(module.weight))
            if name is not None:
                found.setdefault(name, Reader(dim, [])).modules.append(module)
    return found


def readers_of(model: nn.Module) -> dict[str, Reader]:
    """As `linear_readers`, and the stacked matrices of experts."""
    experts = {
        name: Reader(dim, [module], len(module.get_parameter(name.rpartition(".")[2])))
        for name, (module, dim) in stacked_experts(model).items()
    }
    return linear_readers(model) | experts


def members_read(group: CoupledGroup, readers: Mapping[str, Reader]) -> tuple[Member, ...]:
    """The members of a group in its consumer layers; without these, its rows in linear layers.

    Raises:
        PrunekitError: no linear layer is part of the group.
    """
    linear = tuple(m for m in group.members if m.parameter in readers)
    if not linear:
        raise PrunekitError(
            f"no linear layer consumes {group.name!r}, so its outputs cannot be measured; choose other groups with "
            "groups.of_kind(...), or another importance such as Magnitude()"
        )
    return tuple(m for m in linear if m.dim == readers[m.parameter].input_dim) or linear


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 or wider, copied only if needed."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def sums_over_inputs(
    model: nn.Module, calib: Any, readers: Mapping[str, Reader], measure: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Sums of a statistic of linear layers' inputs over all calibration tokens, in one pass.

    Args:
        model: a causal LM; unchanged afterwards. Its weights may be views of mapped files: each module's are widened
            while it runs and freed after it.
        calib: integers (n_samples, seq_len).
        readers: parameter name → its linear layers.
        measure: inputs (n_tokens, n_in), float32 or wider → the statistic to sum.

    Returns:
        Parameter name → the sum; of stacked experts one for each of them, zero where no token reached it.

    Raises:
        PrunekitError: a model that does not take tokens as those of transformers do, bad tokens, or an input that
            is not finite.
    """
    tokens = check_tokens(calib, model)
    batches = in_batches(tokens)
    sums: dict[str, Tensor] = {}
    n_calls = len(batches) * sum(len(reader.modules) for reader in readers.values() if not reader.n_experts)
    bar = tqdm(total=n_calls, desc="activations", unit="layer", leave=False, delay=1)
    eager = [EXPERTS_IMPLEMENTATION] if any(reader.n_experts for reader in readers.values()) else []
    with bar, _watching(readers, sums, measure, bar), written_out(model, eager), measuring(model):
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    for name in readers:
        if name not in sums or not bool(sums[name].isfinite().all()):
            raise PrunekitError(
                f"the inputs of {name} are not finite, or it never ran; check the weights of the checkpoint"
            )
    return sums


def in_portions(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Batches of names whose sizes fit into `ROOM`, at least one name each.

    Args:
        sizes: name → bytes needed.
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
    readers: Mapping[str, Reader], sums: dict[str, Tensor], measure: Callable[[Tensor], Tensor], bar: Any
) -> Iterator[None]:
    """A context in which the statistic of every layer input is summed."""

    def adder(name: str) -> Callable[..., None]:
        def add(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            (x,) = (*args, *kwargs.values())
            measured = measure(wide(x).flatten(0, -2))
            sums[name] = sums[name] + measured if name in sums else measured
            bar.update()

        return add

    def add_expert(name: str, expert: int, x: Tensor) -> None:
        measured = measure(wide(x))
        if name not in sums:
            sums[name] = measured.new_zeros(readers[name].n_experts, *measured.shape)
        sums[name][expert] += measured

    with ExitStack() as hooks:
        for name, reader in readers.items():
            for module in reader.modules if not reader.n_experts else ():
                hooks.callback(module.register_forward_pre_hook(adder(name), with_kwargs=True).remove)
        stacked = {name: reader.modules[0] for name, reader in readers.items() if reader.n_experts}
        hooks.enter_context(watching_experts(stacked, add_expert))
        yield


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """A context in evaluation mode, without gradients, in which a model computes in float32 or wider."""
    with evaluating(model), computing_wide(model), torch.no_grad():
        yield


@contextmanager
def computing_wide(model: nn.Module) -> Iterator[None]:
    """A context in which each module's parameters are float32 or wider while it runs.

    A half-precision model then computes in float32; the extra memory is one module's parameters.
    """
    held: dict[nn.Module, dict[str, nn.Parameter | None]] = {}

    def enter(module: nn.Module, _args: Any) -> None:
        if module in held:  # it runs within itself
            return
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
                leaving = module.register_forward_hook(
                    leave, prepend=True, always_call=True
                )  # the last in is first out
                hooks.callback(leaving.remove)
        try:
            yield
        finally:
            for module, parameters in held.items():  # hooks do not run after an interrupt
                module._parameters.update(parameters)


Note = Callable[[str, int, Tensor], None]


def stacked_experts(model: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """Parameter name → its module and the dimension of the inputs, of stacked matrices (expert, out, in) or turned."""
    found = {}
    for path, module in model.named_modules():
        turned = vars(module).get(TRANSPOSED_EXPERTS)
        for name, p in module._parameters.items() if isinstance(turned, bool) else ():
            if p is not None and p.dim() == 3:
                found[f"{path}.{name}"] = (module, 1 if turned else 2)
    return found


@contextmanager
def watching_experts(modules: Mapping[str, nn.Module], note: Note) -> Iterator[None]:
    """A context that reports the inputs of every expert that runs, with eager experts.

    Args:
        modules: name of a stacked parameter → its module.
        note: called with the name, the expert's number and its inputs (n_tokens, n_in).
    """
    running: list[nn.Module] = []
    names = {(id(module), name.rpartition(".")[2]): name for name, module in modules.items()}

    def enter(module: nn.Module, _args: Any) -> None:
        running.append(module)

    def leave(_module: nn.Module, _args: Any, _result: Any) -> None:
        running.pop()

    def look(weight: Tensor, inputs: Tensor, *_: Any) -> None:
        """Tell which slice of which parameter the weight is; they may be widened copies while the module runs."""
        for own, p in running[-1]._parameters.items() if running and weight.dim() == 2 else ():
            name = names.get((id(running[-1]), own))
            if name and p is not None and p.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr():
                note(name, (weight.storage_offset() - p.storage_offset()) // p.stride(0), inputs.flatten(0, -2))

    with ExitStack() as hooks:
        for module in set(modules.values()):
            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        hooks.enter_context(Products(look))
        yield


class _Operands(NamedTuple):
    """Argument positions of activations, weight and bias, and whether the weight is (in, out)."""

    inputs: int
    weight: int
    bias: int | None
    in_out: bool


_PRODUCTS: dict[Any, _Operands] = {
    functional.linear: _Operands(0, 1, 2, False),
    torch.addmm: _Operands(1, 2, 0, True),
    **{f: _Operands(0, 1, None, True) for f in (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)},
    **{f: _Operands(0, 1, None, True) for f in (torch.bmm, Tensor.bmm)},
}


class Products(TorchFunctionMode):
    """A context that reports every product with a parameter: weight, inputs, outputs, bias, whether (in, out)."""

    def __init__(self, note: Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        where = _PRODUCTS.get(func)
        if where is not None:
            with without_function_modes():
                bias = _argument(args, kwargs, where.bias, "bias") if where.bias is not None else None
                weight = _argument(args, kwargs, where.weight, "weight")
                inputs = _argument(args, kwargs, where.inputs, "input")
                if isinstance(weight, Tensor) and isinstance(inputs, Tensor):
                    self._note(weight, inputs, result, bias, where.in_out)
        return result


def _argument(args: tuple, kwargs: Mapping[str, Any], place: int, name: str) -> Any:
    return args[place] if place < len(args) else kwargs.get(name)
