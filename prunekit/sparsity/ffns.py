"""Which matrices of a layer make an FFN: found by trying whether the input of one is what others put out."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunekit.sparsity.activations import Activation
from prunekit.sparsity.matrices import Call, Matrix

_ROWS = 64  # tokens by which it is tried
_FUNCTIONS: tuple[Activation, ...] = (torch.relu, functional.silu, functional.gelu)


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a matrix: all, or one of the halves where two projections are fused.

    Attributes:
        matrix: (out, in).
        rows: of it.
    """

    matrix: Matrix
    rows: slice

    @property
    def weight(self) -> Tensor:
        """A view (rows, in)."""
        return self.matrix.weight[self.rows]


@dataclass(frozen=True, eq=False)
class FoundFFN:
    """An FFN of a layer: p = φ(z), or φ(s)⊙z.

    Attributes:
        up: puts out z.
        gate: puts out s; None in two-matrix FFNs.
        down: reads p.
        activation: φ.
    """

    up: Rows
    gate: Rows | None
    down: Matrix
    activation: Activation

    @property
    def matrices(self) -> list[Matrix]:
        """All its matrices, each once."""
        parts = [self.up.matrix, *([self.gate.matrix] if self.gate else []), self.down]
        return list(dict.fromkeys(parts))


@contextmanager
def activations_of(layer: nn.Module, found: dict[nn.Module, int]) -> Iterator[None]:
    """While open, modules without matrices that turn a tensor into one of its shape are noted, with its width."""

    def note(module: nn.Module, args: tuple, result: Any) -> None:  # noqa: ANN401
        alike = len(args) == 1 and isinstance(result, Tensor) and isinstance(args[0], Tensor)
        if alike and args[0].shape == result.shape and result.dim():
            found[module] = result.shape[-1]

    with ExitStack() as hooks:
        for module in layer.modules():
            if not module._modules and _may_be_activation(module):
                hooks.callback(module.register_forward_hook(note).remove)
        yield


def _may_be_activation(module: nn.Module) -> bool:
    scalars = all(p is None or p.numel() == 1 for p in module._parameters.values())
    return scalars and not isinstance(module, nn.Dropout | nn.Identity | nn.LayerNorm | nn.RMSNorm)


def find_ffns(calls: list[Call], activations: dict[nn.Module, int]) -> list[FoundFFN]:
    """The FFNs among the products of one batch; what is not understood is none.

    Args:
        calls: in the order of the products.
        activations: modules that may be one → the width at which they ran; ReLU, SiLU and GELU are tried too.
    """
    found: list[FoundFFN] = []
    for number, down in enumerate(calls):
        before = [call for call in calls[:number] if _may_feed(call, down)]
        fitting = [module for module, width in activations.items() if width == down.inputs.shape[1]]
        ffn = _matching(before, down, [*fitting, *_FUNCTIONS]) if len(down.inputs) else None
        if ffn is not None:
            found.append(ffn)
    return found


def _may_feed(call: Call, down: Call) -> bool:
    width, d_ff = call.outputs.shape[1], down.inputs.shape[1]
    return len(call.outputs) == len(down.inputs) and width in (d_ff, 2 * d_ff) and call.matrix is not down.matrix


def _matching(before: list[Call], down: Call, activations: list[Activation]) -> FoundFFN | None:
    """The first way to get what `down` reads out of what the calls before it put out."""
    p = down.inputs[:_ROWS]
    parts = [part for call in before for part in _parts(call, p.shape[1])]
    for activation in activations:
        for rows, z in parts:
            if _close(activation(z), p) and _elementwise(activation, z):
                return FoundFFN(rows, None, down.matrix, activation)
        for gate, s in parts:
            opened = activation(s)
            for up, z in parts:
                if up is not gate and _close(opened * z, p) and _elementwise(activation, s):
                    return FoundFFN(up, gate, down.matrix, activation)
    return None


def _parts(call: Call, d_ff: int) -> list[tuple[Rows, Tensor]]:
    y = call.outputs[:_ROWS]
    halves = [slice(0, d_ff)] if y.shape[1] == d_ff else [slice(0, d_ff), slice(d_ff, 2 * d_ff)]
    return [(Rows(call.matrix, rows), y[:, rows]) for rows in halves]


def _elementwise(activation: Activation, z: Tensor) -> bool:
    """Whether a value does not depend on those beside it."""
    kept = torch.arange(z.shape[1]) % 2 == 0
    return _close(activation(z * kept.to(z))[:, kept], activation(z)[:, kept])


def _close(a: Tensor, b: Tensor) -> bool:
    eps = torch.finfo(b.dtype).eps
    return bool(b.any()) and bool((a - b).norm() <= 16 * eps * b.norm())
