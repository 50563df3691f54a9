"""Activation importance: what a unit hands on, measured where it is read."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from prunekit.calibration import TOKENS_A_BATCH, Gradients, check_tokens
from prunekit.discovery.groups import CoupledGroup, Member
from prunekit.discovery.preparing import evaluating
from prunekit.errors import PrunekitError
from prunekit.importance.reduction import all_slice_scores, check_takes_tokens, unit_scores

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


@dataclass(frozen=True)
class Activation:
    """Size of what a unit hands on: the sum of |W_ij|·‖x_j‖₂ over the weights that read it.

    W is the weight of a linear layer whose inputs the unit owns (columns of `o_proj` for a head, of `down_proj` for a
    channel), ‖x_j‖₂ its j-th input over all calibration tokens. A unit that nothing reads, such as a whole block, is
    scored by the rows that it owns. Forward passes are all it needs. They are made in float32 at least, one module
    at a time: halves overflow, and are slow on a CPU.

    Source: Wanda (Sun et al. 2023), Eq. 1, |W_ij|·‖X_j‖₂. Differs: summed over all that a unit owns, to remove
        units, where Wanda compares the weights of one row and zeroes some.
    """

    @property
    def needs_calibration(self) -> bool:
        """True: activations come from a calibration set."""
        return True

    @property
    def label(self) -> str:
        """Short name for tables and legends."""
        return "activation"

    def unit_scores(
        self, model: nn.Module, groups: tuple[CoupledGroup, ...], calib: Tensor | Gradients | None
    ) -> dict[str, Tensor]:
        """Group name → (n_units,), from tokens.

        Raises:
            PrunekitError: no tokens, a group without linear layers, or activations that are not finite.
        """
        if not isinstance(calib, Tensor):
            raise PrunekitError(f"Activation() reads tokens, not {calib!r}; give integers (n_samples, seq_len)")
        readers = linear_readers(model)
        read = [replace(group, members=_members_read(group, readers)) for group in groups]
        names = dict.fromkeys(member.parameter for group in read for member in group.members)
        norms = input_norms(model, calib, {name: readers[name] for name in names})
        parameters = dict(model.named_parameters())

        def weight_scores(name: str) -> Tensor:
            inputs = norms[name] if readers[name].input_dim == 1 else norms[name][:, None]
            return _wide(parameters[name].detach()) * inputs

        slices = all_slice_scores(read, weight_scores, "element")
        return {group.name: unit_scores(group, slices, "sum") for group in read}


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


def _members_read(group: CoupledGroup, readers: dict[str, Reader]) -> tuple[Member, ...]:
    linear = tuple(m for m in group.members if m.parameter in readers)
    if not linear:
        raise PrunekitError(
            f"no linear layer reads {group.name!r}, so Activation() cannot score it; choose other groups with "
            "groups.of_kind(...), or another importance such as Magnitude()"
        )
    return tuple(m for m in linear if m.dim == readers[m.parameter].input_dim) or linear


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least; what is as wide already is not copied."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def input_norms(model: nn.Module, calib: Tensor, readers: Mapping[str, Reader]) -> dict[str, Tensor]:
    """‖x_j‖₂ over all calibration tokens of each input j of some linear layers, in one pass.

    Args:
        model: a causal LM; left as it was. Its weights may be views of mapped files: each module's are widened
            while it runs and freed after it.
        calib: integers (n_samples, seq_len).
        readers: parameter name → where it is read.

    Returns:
        Parameter name → (n_in,), float32 at least.

    Raises:
        PrunekitError: a model that does not take tokens as those of transformers do, bad tokens, or an input that
            is not finite.
    """
    check_takes_tokens(model)
    tokens = check_tokens(calib, model)
    batches = tokens.split(max(1, TOKENS_A_BATCH // tokens.shape[1]))
    squares: dict[str, Tensor] = {}
    n_calls = len(batches) * sum(len(reader.modules) for reader in readers.values())
    bar = tqdm(total=n_calls, desc="activations", unit="layer", leave=False, delay=1)
    with bar, _watching(readers, squares, bar), computing_wide(model), evaluating(model), torch.no_grad():
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    for name in readers:
        if name not in squares or not bool(squares[name].isfinite().all()):
            raise PrunekitError(f"what {name} reads is not finite, or never came: check the weights of the checkpoint")
    return {name: total.sqrt() for name, total in squares.items()}


@contextmanager
def _watching(readers: Mapping[str, Reader], squares: dict[str, Tensor], bar: Any) -> Iterator[None]:  # noqa: ANN401
    """While open, the squares of what the layers read are added up."""

    def adder(name: str) -> Callable[..., None]:
        def add(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            (x,) = (*args, *kwargs.values())
            total = _wide(x).flatten(0, -2).square().sum(0)  # (tokens, n_in) → (n_in,)
            squares[name] = squares[name] + total if name in squares else total
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

    def enter(module: nn.Module, _args: Any) -> None:  # noqa: ANN401
        held[module] = dict(module._parameters)
        for name, p in held[module].items():
            if p is not None and p.is_floating_point():
                module._parameters[name] = nn.Parameter(_wide(p.detach()), requires_grad=False)

    def leave(module: nn.Module, _args: Any, _result: Any) -> None:  # noqa: ANN401
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
