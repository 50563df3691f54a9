"""Reconstruction importance: the error that remains when a unit is removed and its consumer layer re-fitted."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.checks import Positive, check_fields
from prunekit.discovery.groups import CoupledGroup, Member
from prunekit.errors import PrunekitError
from prunekit.importance.input_statistics import (
    Reader,
    in_portions,
    linear_readers,
    members_read,
    sums_over_inputs,
    wide,
)
from prunekit.importance.scores import Calibration, SomeGroups, tokens_for

RIDGE = 0.01


@dataclass(frozen=True)
class Reconstruction:
    """Error of the consumer layer after a least-squares re-fit, with units removed greedily one by one.

    With X the inputs of the consumer layer (o_proj, down_proj), W its weights (in, out) and
    H = XᵀX + λI, a unit u costs tr(W_uᵀ [(H⁻¹)_uu]⁻¹ W_u). The cheapest unit is removed and W and H⁻¹ are updated,
    until one is left. A unit's score is the running maximum of the costs at its removal, as a share of ‖XW‖². So scores
    follow the order of removal, and fit `prune(..., compensate=calib)`, which re-fits.

    Attributes:
        ridge: λ, as a share of the mean diagonal of XᵀX; above 0.

    Source: OSSCAR (Meng et al. 2024) and ZipLM (Kurtic et al. 2023), after Optimal Brain Surgeon (Hassibi and
        Stork 1993). Differs: one greedy pass, no local search, no latency.
    """

    ridge: Positive = RIDGE

    def __post_init__(self) -> None:
        check_fields(self)

    needs_calibration = True  # activations come from a calibration set
    label = "reconstruction"

    def unit_scores(self, model: nn.Module, groups: SomeGroups, calib: Calibration) -> dict[str, Tensor]:
        """Group name → (n_units,), from tokens.

        Raises:
            PrunekitError: no tokens, a group without exactly one consumer layer, or activations that are not finite.
        """
        tokens = tokens_for("Reconstruction()", calib)
        return costs_of_units(
            model,
            groups,
            "Reconstruction()",
            lambda readers: sums_over_inputs(model, tokens, readers, lambda x: x.T @ x),
            lambda gram, weight, units: greedy_costs(gram.double(), weight.double(), units, self.ridge),
        )


def costs_of_units(
    model: nn.Module,
    groups: Iterable[CoupledGroup],
    who: str,
    gather: Callable[[dict[str, Reader]], Mapping[str, Any]],
    cost: Callable[[Any, Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """The cost of removing each unit, from statistics of its consumer layer; of a part of the layers at a time.

    Args:
        model: the model that the groups were discovered in.
        groups: each with one consumer layer.
        who: the importance, for messages.
        gather: parameter name → linear layers, to parameter name → their statistics.
        cost: statistics, weights (n_in, n_out) and the inputs of each unit (n_units, width) → its costs, (n_units,).

    Returns:
        Group name → float32 (n_units,).

    Raises:
        PrunekitError: a group without exactly one consumer layer, or what `gather` or `cost` raise.
    """
    readers, parameters = linear_readers(model), dict(model.named_parameters())
    read = {group.name: one_reader(group, readers, who) for group in groups}
    found: dict[str, Tensor] = {}
    for portion in in_portions({name: 8 * member.index.numel() ** 2 for name, member in read.items()}):  # XᵀX, float64
        sums = gather({read[name].parameter: readers[read[name].parameter] for name in portion})
        for name in portion:
            parameter, units = read[name].parameter, read[name].index
            weight = wide(parameters[parameter].detach())
            weight = weight.T if readers[parameter].input_dim == 1 else weight
            found[name] = cost(sums[parameter], weight, units).float()
    return {name: found[name] for name in read}


def factor(gram: Tensor, ridge: float) -> Tensor:
    """The Cholesky factor L with XᵀX + λI = LLᵀ.

    Args:
        gram: XᵀX, float64 (n_in, n_in); it may be all zero.
        ridge: λ, as a part of the mean of XᵀX's diagonal.

    Raises:
        PrunekitError: a ridge so small that it is lost to rounding.
    """
    bounds = torch.finfo(gram.dtype)
    damping = (ridge * gram.diagonal().mean()).clamp(bounds.tiny**0.5, bounds.max**0.5)  # and so is its inverse
    lower, failed = torch.linalg.cholesky_ex(gram + damping * torch.eye(len(gram)).to(gram))
    if failed:
        raise PrunekitError(f"ridge={ridge!r} is too small for inputs that depend on each other; try {RIDGE}")
    return lower


def greedy_costs(gram: Tensor, weight: Tensor, units: Tensor, ridge: float) -> Tensor:
    """Cost of each unit as a share of the layer's output, when the cheapest is removed first.

    Args:
        gram: XᵀX, float64 (n_in, n_in).
        weight: float64 (n_in, n_out).
        units: (n_units, width): the inputs of each.
        ridge: as in `Reconstruction`.

    Returns:
        float64 (n_units,), non-decreasing in the order of removal.

    Raises:
        PrunekitError: what `factor` raises.
    """
    size = (weight * (gram @ weight)).sum().clamp_min(torch.finfo(torch.float64).tiny)
    inverse = torch.cholesky_inverse(factor(gram, ridge))
    weight, units = weight.clone(), units.to(gram.device)
    left, costs, highest = list(range(len(units))), torch.zeros(len(units)).to(gram), torch.zeros(()).to(gram)
    while left:
        within = inverse[units[left][:, :, None], units[left][:, None, :]]  # (n_left, width, width)
        blocks = torch.cholesky_inverse(torch.linalg.cholesky(within))
        rows = weight[units[left]]  # (n_left, width, n_out)
        cost, at = ((blocks @ rows) * rows).sum((1, 2)).min(0)
        unit = left.pop(int(at))
        highest = costs[unit] = torch.maximum(highest, cost)
        column = inverse[:, units[unit]] @ blocks[at]  # (n_in, width)
        weight -= column @ weight[units[unit]]
        inverse -= column @ inverse[units[unit]]
    return (costs / size).cpu()


def one_reader(group: CoupledGroup, readers: Mapping[str, Reader], who: str) -> Member:
    """The member of a group in its only consumer layer.

    Raises:
        PrunekitError: not exactly one consumer layer; the message names the caller, such as `"Reconstruction()"`.
    """
    read = [m for m in members_read(group, readers) if m.dim == readers[m.parameter].input_dim]
    if len(read) != 1:
        raise PrunekitError(
            f"{group.name!r} has {len(read)} consumer layers, and {who} needs one; choose heads or FFN "
            'channels with groups.of_kind("kv_head", "ffn_channel")'
        )
    return read[0]
