"""Units of a model with LoRA: their slices of weights, and of A and B, and their importance in training.

A pair A, B is one composed unit with its weight: removing an output takes rows of W and of B, removing an input takes
columns of W and of A (LoRAShear, Alg. 2). The ranks in between stay.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prunekit.discovery.groups import CoupledGroup
from prunekit.errors import PrunekitError
from prunekit.sparsity.zero_masks import plain_lora_weight

_TINY = 1e-30


class UpdateStatistics(NamedTuple):
    """Norms and inner products of each unit's weights x and their update u = γ·B·A.

    Attributes:
        norm: ‖x‖, float64 (n_units,).
        update: ‖u‖, float64 (n_units,).
        dot: x·u, float64 (n_units,).
    """

    norm: Tensor
    update: Tensor
    dot: Tensor


def lora_saliency(statistics: Mapping[str, UpdateStatistics]) -> dict[str, Tensor]:
    """One score a unit, the mean of five: ‖x‖, ‖x‖/‖u‖, 1 + cos(x, u), |x·u| and ½(x·u)².

    Each is divided by its L2 norm over all units of all groups first. For a unit with no update, the
    cosine is 0 and ‖x‖/‖u‖ is the largest found, or 0 if the unit is zero already.

    Args:
        statistics: group name → sums of its units.

    Returns:
        Group name → float64 (n_units,); higher means keep.

    Raises:
        PrunekitError: nothing to score.

    Source: the optimiser family that the authors of LoRAShear released, with the gradient replaced by the update.
        Their code paths disagree about the sign of the cosine. An update is minus a gradient, so here a unit is
        important if gradient descent moves it away from zero.
    """
    if not statistics:
        raise PrunekitError("no group to score; give the groups that discover found in the adapted model")
    x, u, dot = (torch.cat(sums) for sums in zip(*statistics.values(), strict=True))
    moved = u > 0
    steady = torch.where(moved, x / u.clamp(min=_TINY), 0.0)
    steady = torch.where(moved | (x == 0), steady, steady.max())
    cosine = torch.where(moved, dot / (x * u).clamp(min=_TINY), 0.0)
    proxies = (x, steady, 1 + cosine, dot.abs(), dot.square() / 2)
    mean = sum(proxy / proxy.norm().clamp(min=_TINY) for proxy in proxies) / len(proxies)
    return dict(zip(statistics, torch.as_tensor(mean).split([len(s.norm) for s in statistics.values()]), strict=True))


@dataclass(frozen=True)
class LoraPair:
    """A weight and its LoRA pair, which updates it by γ·B·A.

    Attributes:
        weight: the parameter that the pair updates.
        a: (r, in).
        b: (out, r).
        scale: γ, alpha / r.
        transposed: whether the weight is stored (in, out).
    """

    weight: nn.Parameter
    a: nn.Parameter
    b: nn.Parameter
    scale: float
    transposed: bool

    def update(self, dim: int, index: Tensor) -> Tensor:
        """γ·B·A at some indices along a dimension of the weight, (n, size of the other dimension)."""
        if (dim == 0) != self.transposed:
            return self.scale * (self.b[index] @ self.a)
        return self.scale * (self.b @ self.a[:, index]).T

    @torch.no_grad()
    def merge(self) -> None:
        """Merge the update into the weight; the model's function stays the same."""
        whole = self.scale * (self.b @ self.a)
        self.weight.add_((whole.T if self.transposed else whole).to(self.weight.dtype))
        self.b.zero_()


def lora_pairs(model: nn.Module) -> dict[str, LoraPair]:
    """Every LoRA pair of a peft model, by the name of the weight that it updates.

    Raises:
        PrunekitError: a model without LoRA, with more than one adapter, merged ones, or a kind of LoRA whose update is
            not γ·B·A alone.
    """
    from peft.tuners.lora import LoraLayer

    names = {parameter: name for name, parameter in model.named_parameters()}
    found: dict[str, LoraPair] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            weight = plain_lora_weight(path, layer)
            adapter = layer.active_adapters[0]
            if names[weight] in found:
                raise PrunekitError(f"{path} shares its weight with another adapted module: leave one out of targets")
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            transposed = bool(getattr(layer, "fan_in_fan_out", False))
            found[names[weight]] = LoraPair(weight, a, b, layer.scaling[adapter], transposed)
    if not found:
        raise PrunekitError("the model carries no LoRA: attach it first, with recovery.lora.attach or peft")
    return found


@dataclass(frozen=True)
class _Owned:
    """Slices that the units of a group own of one tensor: `index` (n_units, width) along `dim`."""

    tensor: nn.Parameter
    dim: int
    index: Tensor
    pair: LoraPair | None = None

    def rows(self, units: Tensor) -> Tensor:
        """The values of each unit, one row per unit, (n, width · rest)."""
        return self.tensor.index_select(self.dim, self._at(units)).movedim(self.dim, 0).reshape(len(units), self._row)

    def updates(self, units: Tensor) -> Tensor | None:
        """The update γ·B·A of each unit, (n, width · rest); None if the tensor has no LoRA pair."""
        if self.pair is None:
            return None
        return self.pair.update(self.dim, self._at(units)).reshape(len(units), self._row)

    @property
    def _row(self) -> int:
        """Numbers that one unit owns."""
        return self.index.shape[1] * self.tensor.numel() // self.tensor.shape[self.dim]

    def write(self, units: Tensor, rows: Tensor) -> None:
        """The reverse of `rows`."""
        index = self._at(units)
        rest = [size for dim, size in enumerate(self.tensor.shape) if dim != self.dim]
        values = rows.to(self.tensor.dtype).reshape(len(index), *rest).movedim(0, self.dim)
        self.tensor.index_copy_(self.dim, index, values)

    def zero(self, units: Tensor) -> None:
        self.tensor.index_fill_(self.dim, self._at(units), 0.0)

    def _at(self, units: Tensor) -> Tensor:
        """Their indices, where the tensor is now: a Trainer moves the model after the optimiser was made."""
        return self.index[units].flatten().to(self.tensor.device)


@dataclass(frozen=True)
class GroupUnits:
    """The units of one coupled group in an adapted model, as the optimiser handles them.

    Attributes:
        name: of the group.
        kind: of the group.
        n_units: how many there are.
        weights: slices of x, the frozen weights.
        lora: slices of A and B.
    """

    name: str
    kind: str
    n_units: int
    weights: tuple[_Owned, ...]
    lora: tuple[_Owned, ...]

    @torch.no_grad()
    def statistics(self, units: Tensor | None = None) -> UpdateStatistics:
        """‖x‖, ‖γ·B·A‖ and their product, for all units or some."""
        chosen = torch.arange(self.n_units) if units is None else units
        x_sq, u_sq, dot = (torch.zeros(len(chosen), dtype=torch.float64) for _ in range(3))
        for owned in self.weights:
            x, u = owned.rows(chosen).cpu().double(), owned.updates(chosen)
            x_sq += x.square().sum(1)
            if u is not None:
                u = u.cpu().double()
                u_sq += u.square().sum(1)
                dot += (x * u).sum(1)
        return UpdateStatistics(x_sq.sqrt(), u_sq.sqrt(), dot)

    @torch.no_grad()
    def shrink(self, units: Tensor, remaining: int, epsilon: float) -> Tensor:
        """One projection step: add the update, step towards zero, and set to zero outside the half-space.

        Args:
            units: int64 (n,), those that are to end at zero.
            remaining: steps until they must be there, this one counted.
            epsilon: a unit falls to zero where x̃·x ≤ ε‖x‖².

        Returns:
            ‖x‖ afterwards, float64 (n,).

        Source: LoRAShear, Eq. 2 and Alg. 4 (x̃ = [x + γBA] − λ·x/‖x‖). The paper leaves λ open: here
            λ = (x + γBA)·x / (‖x‖·remaining), so that x̃·x = (x + γBA)·x·(1 - 1/remaining), which is 0 in the last
            step and thus behind the half-space for every ε ≥ 0. Without an update λ = ‖x‖/remaining, as in the
            released code.
        """
        x, after = self.statistics(units), torch.zeros(len(units), dtype=torch.float64)
        along = x.norm.square() + x.dot  # (x + γBA)·x
        falls = along * (1 - 1 / remaining) <= epsilon * x.norm.square()
        step = along / x.norm.square().clamp(min=1e-30) / remaining
        for owned in self.weights:
            rows, u = owned.rows(units), owned.updates(units)
            kept = (rows * (1 - step).to(rows)[:, None] + (0 if u is None else u)) * (~falls).to(rows)[:, None]
            owned.write(units, kept)
            after += kept.to(rows.dtype).cpu().double().square().sum(1)
        self.zero_lora(units)
        return after.sqrt()

    @torch.no_grad()
    def zero_lora(self, units: Tensor) -> None:
        """Set rows of B and columns of A to zero, so that training does not restore the units."""
        for owned in self.lora:
            owned.zero(units)


def units_of(model: nn.Module, groups: Iterable[CoupledGroup]) -> tuple[GroupUnits, ...]:
    """The groups of an adapted model, tied to its tensors.

    Raises:
        PrunekitError: no LoRA, no group, groups of another model, of ranks or that overlap, or weights that train.
    """
    pairs = lora_pairs(model)
    parameters = dict(model.named_parameters())
    trained = {id(tensor) for pair in pairs.values() for tensor in (pair.a, pair.b)}
    listed = list(groups)
    found = tuple(_tied(group, parameters, pairs, trained) for group in listed)
    if not found:
        raise PrunekitError("no group is to be pruned; give some that discover finds in the adapted model")
    _check_apart(listed)
    return found


def _check_apart(groups: list[CoupledGroup]) -> None:
    """Raise an error for groups whose units own the same weights."""
    seen: dict[tuple[str, int], tuple[str, Tensor]] = {}
    for group in groups:
        for member in group.members:
            name, before = seen.get((member.parameter, member.dim), ("", torch.zeros(0)))
            both = torch.cat([before.long(), member.index.flatten()])
            if name and len(both.unique()) < len(both):
                raise PrunekitError(
                    f"{group.name!r} and {name!r} own the same of {member.parameter}; give groups that do not overlap"
                )
            seen[member.parameter, member.dim] = group.name, both


def _tied(
    group: CoupledGroup, parameters: dict[str, nn.Parameter], pairs: dict[str, LoraPair], trained: set[int]
) -> GroupUnits:
    missing = [member.parameter for member in group.members if member.parameter not in parameters]
    if missing:
        raise PrunekitError(
            f"{group.name!r} owns {missing[0]}, which this model does not have; discover the adapted model itself"
        )
    if group.kind == "rank":
        raise PrunekitError(f"{group.name!r} is a rank of LoRA, which goes with the merge; give heads and channels")
    owned = [_Owned(parameters[m.parameter], m.dim, m.index.cpu(), pairs.get(m.parameter)) for m in group.members]
    weights, lora = ([o for o in owned if (id(o.tensor) in trained) == flag] for flag in (False, True))
    free = [
        m.parameter
        for m, o in zip(group.members, owned, strict=True)
        if o.tensor.requires_grad and id(o.tensor) not in trained
    ]
    if free:
        raise PrunekitError(
            f"{group.name!r} owns {free[0]}, which is trained itself and would not stay zero; attach LoRA with "
            "bias='none' and without modules_to_save"
        )
    return GroupUnits(group.name, group.kind, group.n_units, tuple(weights), tuple(lora))


def as_units(numbers: Sequence[int]) -> Tensor:
    """Numbers of units as an index."""
    return torch.as_tensor(list(numbers), dtype=torch.long)
