"""Units of a model with LoRA: their slices of weights, A and B, their importance in training, and which go next.

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
from prunekit.recovery.lora import LoraPair, lora_pairs

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
    if group.kind == "rank":
        raise PrunekitError(f"{group.name!r} is a rank of LoRA, which goes with the merge; give heads and channels")
    weights, lora = [], []
    for member in group.members:
        name = member.parameter
        if name not in parameters:
            raise PrunekitError(
                f"{group.name!r} owns {name}, which this model does not have; discover the adapted model itself"
            )
        owned = _Owned(parameters[name], member.dim, member.index.cpu(), pairs.get(name))
        if id(owned.tensor) in trained:
            lora.append(owned)
        elif owned.tensor.requires_grad:
            raise PrunekitError(
                f"{group.name!r} owns {name}, which is trained itself and would not stay zero; attach LoRA with "
                "bias='none' and without modules_to_save"
            )
        else:
            weights.append(owned)
    return GroupUnits(group.name, group.kind, group.n_units, tuple(weights), tuple(lora))


def as_units(numbers: Sequence[int]) -> Tensor:
    """Numbers of units as an index."""
    return torch.as_tensor(list(numbers), dtype=torch.long)


def lowest_units(
    groups: Sequence[GroupUnits],
    scores: Mapping[str, Tensor],
    gone: Mapping[str, Sequence[int]],
    due: Mapping[str, int],
    min_units: int,
) -> dict[str, list[int]]:
    """The lowest-scoring remaining units, a given number per kind; every group keeps `min_units`.

    Args:
        groups: all that may lose units.
        scores: group name → (n_units,); higher means keep.
        gone: group name → units that are not to be chosen again.
        due: kind → how many are wanted.
        min_units: units that every group keeps.

    Returns:
        Group name → ascending units, for groups that lose some.

    Raises:
        PrunekitError: scores that miss a group, are not finite or not one a unit.
    """
    left = {group.name: group.n_units - len(gone[group.name]) - min_units for group in groups}
    wanted, dead = dict(due), {name: set(units) for name, units in gone.items()}
    kinds = {group.name: group.kind for group in groups}
    ranked = sorted((s, g.name, u) for g in groups for u, s in enumerate(_finite(g, scores)) if u not in dead[g.name])
    taken: dict[str, list[int]] = {}
    for _, name, unit in ranked:
        if wanted.get(kinds[name], 0) > 0 and left[name] > 0:
            taken.setdefault(name, []).append(unit)
            left[name] -= 1
            wanted[kinds[name]] -= 1
    return {group.name: sorted(taken[group.name]) for group in groups if group.name in taken}


def _finite(group: GroupUnits, scores: Mapping[str, Tensor]) -> list[float]:
    found = scores.get(group.name)
    if found is None or found.shape != (group.n_units,) or not bool(found.isfinite().all()):
        given = "nothing" if found is None else f"{tuple(found.shape)}, not all finite or not one a unit"
        raise PrunekitError(f"saliency of {group.name!r} is {given}; give {group.n_units} finite numbers")
    return found.tolist()


def check_wanted(groups: Sequence[GroupUnits], n_units: Mapping[str, int], min_units: int) -> dict[str, int]:
    """Kind → number of units to remove, checked against the model.

    Raises:
        PrunekitError: more units than there are.
    """
    for kind, wanted in n_units.items():
        most = sum(max(0, group.n_units - min_units) for group in groups if group.kind == kind)
        if wanted > most:
            kinds = ", ".join(sorted({group.kind for group in groups}))
            raise PrunekitError(
                f"{wanted} units of kind {kind!r} are to go, but only {most} may: these groups are of kind "
                f"{kinds}, and each keeps {min_units}"
            )
    return dict(n_units)
