"""Finds the FFNs of a layer by testing which matrix inputs are computed from the outputs of others."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunekit.sparsity.auxiliaries import Activation
from prunekit.sparsity.matrices import Call, Matrix

_ROWS = 64  # tokens for the test
_FUNCTIONS: tuple[Activation, ...] = (torch.relu, functional.silu, functional.gelu)


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a matrix: all, or one of the halves where two projections are fused.

    Attributes:
        matrix: (out, in).
        rows: a range of rows.
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
        up: outputs z.
        gate: outputs s; None in two-matrix FFNs.
        down: has inputs p.
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
    """A context that records modules without matrices that keep a tensor's shape, with its width."""

    def note(module: nn.Module, args: tuple, result: Any) -> None:
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
    """The FFNs among the matrix products of one batch; unknown forms are left out.

    Args:
        calls: the products in their order.
        activations: candidate modules → their width; ReLU, SiLU and GELU are tried too.
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
    """The FFN form that reproduces the inputs of `down` best from outputs of earlier calls."""
    p = down.inputs[:_ROWS]
    parts = [(*part, call.inputs[:_ROWS]) for call in before for part in _parts(call, p.shape[1])]
    ways: list[tuple[float, FoundFFN]] = []
    for activation in (in_float32(a) for a in activations):
        for gate, s, x in parts:
            opened = activation(s)
            if not _elementwise(activation, s):
                continue
            ways.append((_distance(opened, p), FoundFFN(gate, None, down.matrix, activation)))
            ways += [(_distance(opened * z, p), FoundFFN(up, gate, down.matrix, activation))
                     for up, z, read in parts if up is not gate and _is_same(read, x)]  # fmt: skip
    best = min(ways, key=lambda way: way[0], default=None)
    return best[1] if best is not None and best[0] <= 4 * torch.finfo(p.dtype).eps else None


def in_float32(activation: Activation) -> Activation:
    """The activation on a copy in float32 or wider, safe for in-place modules."""
    if isinstance(activation, nn.Module) and any(p.element_size() < 4 for p in activation.parameters()):
        activation = copy.deepcopy(activation).float()
    return lambda z: activation(z.to(torch.promote_types(z.dtype, torch.float32), copy=True))


def _parts(call: Call, d_ff: int) -> list[tuple[Rows, Tensor]]:
    y = call.outputs[:_ROWS]
    halves = [slice(0, d_ff)] if y.shape[1] == d_ff else [slice(0, d_ff), slice(d_ff, 2 * d_ff)]
    return [(Rows(call.matrix, rows), y[:, rows]) for rows in halves]


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two projections read the same; of two layers in a row, the second reads what the first made."""
    return one.shape == other.shape and torch.equal(one, other)


def _elementwise(activation: Activation, z: Tensor) -> bool:
    """Whether a function is elementwise."""
    kept = torch.arange(z.shape[1], device=z.device) % 2 == 0
    return _distance(activation(z * kept.to(z))[:, kept], activation(z)[:, kept]) <= 1e-5


def _distance(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    size = b.float().norm()
    return float((a - b).float().norm() / size) if size else float("inf")
