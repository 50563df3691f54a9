"""Finds the weight matrices of a model's layers: the parameters that multiply activations."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prunekit.discovery.parts import layer_of
from prunekit.importance.input_statistics import Products
from prunekit.layerwise import fewest_logits

Key = tuple[int, torch.Size, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight that multiplies activations, whole or one expert's slice of a stacked parameter.

    Attributes:
        parameter: its name, as in `model.named_parameters()`.
        tensor: that parameter.
        layer: path of its layer.
        expert: slice number along the first dimension; None for the whole parameter.
        stored_in_out: whether it is stored (in, out), as GPT-2's and some experts' are.
    """

    parameter: str
    tensor: Tensor
    layer: str
    expert: int | None
    stored_in_out: bool

    @property
    def name(self) -> str:
        """Name of the parameter, with the expert's number."""
        return self.parameter if self.expert is None else f"{self.parameter}[{self.expert}]"

    @property
    def weight(self) -> Tensor:
        """The weight as a view (out, in)."""
        stored = self.stored
        return stored.T if self.stored_in_out else stored

    @property
    def stored(self) -> Tensor:
        """The weight in its stored orientation."""
        tensor = self.tensor.detach()
        return tensor if self.expert is None else tensor[self.expert]


class Call(NamedTuple):
    """One matrix product: a matrix with its inputs and outputs.

    Attributes:
        matrix: (out, in).
        inputs: (n_tokens, in).
        outputs: (n_tokens, out), with the bias.
        bias: (out,) or None.
    """

    matrix: Matrix
    inputs: Tensor
    outputs: Tensor
    bias: Tensor | None


def key_of(stored: Tensor) -> Key:
    """A key that identifies a tensor's memory."""
    return stored.data_ptr(), stored.shape, stored.stride()


@contextmanager
def watching(
    matrices: Iterable[Matrix],
    note: Callable[[Call], None],
    note_gradient: Callable[[Matrix, Tensor], None] | None = None,
) -> Iterator[None]:
    """A context that reports every product with one of these matrices.

    Args:
        matrices: the matrices to watch.
        note: called with each product.
        note_gradient: called with the gradients (n_tokens, out) of its outputs in a backward pass.
    """
    known = {key: matrix for matrix in matrices for key in (key_of(matrix.stored), key_of(matrix.stored.T))}

    def look(weight: Tensor, inputs: Tensor, outputs: Tensor, bias: Tensor | None, _in_out: bool) -> None:
        here = [known.get(key_of(stored)) for stored in (weight if weight.dim() == 3 else [weight])]
        if not any(here):
            return

        def tell(gradient: Tensor) -> None:
            for matrix, g in zip(here, _slices(gradient, weight), strict=True):
                if matrix is not None and note_gradient is not None:
                    note_gradient(matrix, g)

        for matrix, x, y in zip(here, _slices(inputs, weight), _slices(outputs, weight), strict=True):
            if matrix is not None:
                note(Call(matrix, x, y, bias))
        if note_gradient is not None and outputs.requires_grad:
            outputs.register_hook(tell)

    with Products(look):
        yield


def _slices(activations: Tensor, weight: Tensor) -> list[Tensor]:
    """Activations (n_tokens, width) for each matrix of a weight: one, or one per expert."""
    return [part.flatten(0, -2) for part in (activations if weight.dim() == 3 else [activations])]


class Found(NamedTuple):
    """The matrices of a model.

    Attributes:
        matrices: in the order in which they first ran.
        left: parameters of two or more dimensions in the layers that stay dense → why.
    """

    matrices: list[Matrix]
    left: dict[str, str]


def find_matrices(model: nn.Module, layers: list[str], batch: Tensor) -> Found:
    """All weight matrices in the layers of a model, from one pass of a batch.

    A parameter is a weight matrix if it, or each of its experts' slices, multiplies activations in one orientation and
    one layer. Routers, and parameters used in another way, stay dense.

    Args:
        model: a causal LM in evaluation mode, its eager experts.
        layers: paths of the layers.
        batch: int64 (batch, seq).
    """
    within: dict[nn.Parameter, tuple[str, str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        layer = layer_of(name, set(layers))
        if layer is not None:
            within.setdefault(p, (name, layer))
    owners = {p.untyped_storage().data_ptr(): p for p in within if p.dim() > 1}
    seen: dict[nn.Parameter, bool] = {}  # whether it is stored (in, out)
    odd: dict[str, str] = {}

    def look(weight: Tensor, _inputs: Tensor, _outputs: Tensor, _bias: Tensor | None, in_out: bool) -> None:
        p = owners.get(weight.untyped_storage().data_ptr())
        if p is None:
            return
        turned = {key_of(view): view is not as_is for as_is in _views(p, weight.dim()) for view in (as_is, as_is.mT)}
        stored_in_out = in_out != turned.get(key_of(weight), False)
        if key_of(weight) not in turned or seen.setdefault(p, stored_in_out) != stored_in_out:
            odd[within[p][0]] = "it is not used as one matrix"

    with Products(look), torch.no_grad():
        model(input_ids=batch, use_cache=False, **fewest_logits(model, batch))
    _add_fellows(seen, within)
    odd |= _shared(model, layers)
    odd |= _routers(model, {p: within[p] for p in seen})
    matrices: list[Matrix] = []
    for p, in_out in seen.items():
        name, layer = within[p]
        experts: Iterable[int | None] = range(len(p)) if p.dim() == 3 else [None]
        matrices += [Matrix(name, p, layer, expert, in_out) for expert in experts if name not in odd]
    idle = {within[p][0]: "it multiplies no activations" for p in owners.values() if p not in seen}
    return Found(matrices, odd | idle)


def _views(parameter: Tensor, dim: int) -> list[Tensor]:
    """The views of a parameter that may be used: the whole, or one expert's slice."""
    return [*parameter.detach()] if parameter.dim() == 3 and dim == 2 else [parameter.detach()]


def _add_fellows(seen: dict[nn.Parameter, bool], within: Mapping[nn.Parameter, tuple[str, str]]) -> None:
    """Adds matrices of unreached experts, in the orientation of the other experts."""
    alike = {_place(*within[p]): in_out for p, in_out in seen.items()}
    for p, (name, layer) in within.items():
        place = _place(name, layer)
        if p not in seen and p.dim() == 2 and "*" in place and place in alike:
            seen[p] = alike[place]


def _place(name: str, layer: str) -> str:
    """Place of a parameter in its layer, without the number of a list element."""
    return f"{layer}:{re.sub(r'(?<=[.])[0-9]+(?=[.])', '*', name.removeprefix(layer))}"


def _shared(model: nn.Module, layers: list[str]) -> dict[str, str]:
    """Parameters used in several places, which cannot be pruned in only one."""
    places: dict[nn.Parameter, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        places.setdefault(p, []).append(name)
    return {
        names[0]: f"it is tied to {names[1]}"
        for names in places.values()
        if len(names) > 1 and layer_of(names[0], set(layers))
    }


def _routers(model: nn.Module, seen: Mapping[nn.Parameter, tuple[str, str]]) -> dict[str, str]:
    """Routers: matrices next to experts with one output, or one output per expert."""
    numbers: dict[str, set[int]] = {}  # path of a module with experts → how many
    for p, (name, _) in seen.items():
        if p.dim() == 3:
            numbers.setdefault(_above(name, 2), {1}).add(len(p))
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and any(name.startswith(f"{path}.") for name, _ in seen.values()):
            nested = any(layer and path.startswith(f"{layer}.") for _, layer in seen.values())
            if nested:
                numbers.setdefault(_above(path, 1), {1}).add(len(module))
    return {
        name: "it chooses experts"
        for p, (name, _) in seen.items()
        if p.dim() == 2 and any(name.startswith(f"{path}.") and min(p.shape) in ns for path, ns in numbers.items())
    }


def _above(path: str, levels: int) -> str:
    return ".".join(path.split(".")[:-levels])
