"""Reconstruction importance: what is lost for good when a unit goes and its readers are re-fitted."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit.calibration import Gradients
from prunekit.discovery.groups import CoupledGroup, Member
from prunekit.errors import PrunekitError
from prunekit.importance.inputs import Reader, linear_readers, members_read, sums_over_inputs, wide

ROOM = 2**30  # bytes of XᵀX that are held at once


@dataclass(frozen=True)
class Reconstruction:
    """Error of a unit's reader after a least-squares re-fit, units taken one after the other, greedily.

    With X the inputs of the layer that reads a group (o_proj, down_proj), W its weights (in, out) and
    H = XᵀX + λI, a unit u costs tr(W_uᵀ [(H⁻¹)_uu]⁻¹ W_u). The cheapest goes, W and H⁻¹ are brought up to date, and so
    on until one is left; a unit's score is what it cost when it went, or a cheaper one before it, as a part of ‖XW‖².
    So scores follow the order of the choice, and are right with `prune(..., compensate=calib)`, which re-fits.

    Attributes:
        ridge: λ, as a part of the mean of XᵀX's diagonal; above 0.

    Source: OSSCAR (Meng et al. 2024) and ZipLM (Kurtic et al. 2023), after Optimal Brain Surgeon (Hassibi and
        Stork 1993). Differs: one greedy pass, no local search, no latency.
    """

    ridge: float = 0.01

    def __post_init__(self) -> None:
        if isinstance(self.ridge, bool) or not isinstance(self.ridge, (int, float)) or not 0 < self.ridge < 1e9:
            raise PrunekitError(f"ridge={self.ridge!r} is not allowed; give a number above 0, such as 0.01")

    @property
    def needs_calibration(self) -> bool:
        """True: activations come from a calibration set."""
        return True

    @property
    def label(self) -> str:
        """Short name for tables and legends."""
        return "reconstruction"

    def unit_scores(
        self, model: nn.Module, groups: tuple[CoupledGroup, ...], calib: Tensor | Gradients | None
    ) -> dict[str, Tensor]:
        """Group name → (n_units,), from tokens.

        Raises:
            PrunekitError: no tokens, a group that no linear layer or more than one reads, or activations that are not
                finite.
        """
        if not isinstance(calib, Tensor):
            raise PrunekitError(f"Reconstruction() reads tokens, not {calib!r}; give integers (n_samples, seq_len)")
        readers = linear_readers(model)
        found: dict[str, Tensor] = {}
        parameters = dict(model.named_parameters())
        for read in _in_portions({group.name: _one_reader(group, readers) for group in groups}):
            names = {member.parameter: readers[member.parameter] for member in read.values()}
            grams = sums_over_inputs(model, calib, names, lambda x: x.T @ x)
            for name, member in read.items():
                weight = wide(parameters[member.parameter].detach())
                weight = weight.T if names[member.parameter].input_dim == 1 else weight
                found[name] = greedy_costs(grams[member.parameter].double(), weight.double(), member.index, self.ridge)
        return {group.name: found[group.name].float() for group in groups}


def greedy_costs(gram: Tensor, weight: Tensor, units: Tensor, ridge: float) -> Tensor:
    """What each unit costs when the cheapest goes first, as a part of what the layer puts out.

    Args:
        gram: XᵀX, float64 (n_in, n_in).
        weight: float64 (n_in, n_out).
        units: (n_units, width): the inputs of each.
        ridge: as in `Reconstruction`.

    Returns:
        float64 (n_units,), each at least that of the unit which went before it.
    """
    size = (weight * (gram @ weight)).sum().clamp_min(torch.finfo(torch.float64).tiny)
    damping = ridge * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram + damping))
    weight, units = weight.clone(), units.to(gram.device)
    left, costs, highest = list(range(len(units))), torch.zeros(len(units)).to(gram), torch.zeros(()).to(gram)
    while left:
        blocks = torch.linalg.inv(inverse[units[left][:, :, None], units[left][:, None, :]])  # (n_left, width, width)
        rows = weight[units[left]]  # (n_left, width, n_out)
        cost, at = ((blocks @ rows) * rows).sum((1, 2)).min(0)
        unit = left.pop(int(at))
        highest = costs[unit] = torch.maximum(highest, cost)
        column = inverse[:, units[unit]] @ blocks[at]  # (n_in, width)
        weight -= column @ weight[units[unit]]
        inverse -= column @ inverse[units[unit]]
    return (costs / size).cpu()


def _one_reader(group: CoupledGroup, readers: Mapping[str, Reader]) -> Member:
    read = [m for m in members_read(group, dict(readers)) if m.dim == readers[m.parameter].input_dim]
    if len(read) != 1:
        raise PrunekitError(
            f"{group.name!r} is read by {len(read)} linear layers, and Reconstruction() needs one; choose heads or FFN "
            'channels with groups.of_kind("kv_head", "ffn_channel")'
        )
    return read[0]


def _in_portions(read: Mapping[str, Member]) -> Iterator[dict[str, Member]]:
    """As many at once as there is room for."""
    portion: dict[str, Member] = {}
    for name, member in read.items():
        if portion and sum(8 * m.index.numel() ** 2 for m in (*portion.values(), member)) > ROOM:
            yield portion
            portion = {}
        portion[name] = member
    yield portion
