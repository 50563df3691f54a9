"""Baselines that need no data: weight magnitude and random scores."""

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit.checks import Seed, check_choice, check_fields
from prunekit.discovery.groups import CoupledGroup
from prunekit.gradients import Gradients
from prunekit.importance.scores import REDUCTIONS, all_slice_scores, unit_scores


@dataclass(frozen=True)
class Magnitude:
    """Weight magnitude: the sum of |w|^p over each slice, reduced over a unit's slices.

    Attributes:
        p: 1 for L1, 2 for L2 (no root is taken).
        reduction: how the slices of a unit combine, one of `"sum" "mean" "max" "prod" "first" "second"`.

    Raises:
        PrunekitError: another `p` or reduction.

    Source: LLM-Pruner's L1 and L2 baselines, default reduction mean.
    """

    p: int = 2
    reduction: str = "mean"

    def __post_init__(self) -> None:
        check_choice("p", self.p, (1, 2))
        check_choice("reduction", self.reduction, REDUCTIONS)

    @property
    def needs_calibration(self) -> bool:
        """False: only weights are read."""
        return False

    @property
    def label(self) -> str:
        """Short name for tables and legends."""
        return f"L{self.p}" + ("" if self.reduction == "mean" else f", {self.reduction}")

    def unit_scores(
        self, model: nn.Module, groups: tuple[CoupledGroup, ...], calib: Tensor | Gradients | None
    ) -> dict[str, Tensor]:
        """Group name → (n_units,); `calib` is not read."""
        parameters = dict(model.named_parameters())

        def weight_scores(name: str) -> Tensor:
            weight = parameters[name].detach()
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
            return weight.abs() if self.p == 1 else weight.square()

        slices = all_slice_scores(groups, weight_scores, "vector")  # no negative values: the same as "element"
        return {group.name: unit_scores(group, slices, self.reduction) for group in groups}


@dataclass(frozen=True)
class Random:
    """Random scores, uniform in [0, 1): the baseline that every importance must beat.

    Attributes:
        seed: a group's scores depend on this and on the group's name alone.

    Raises:
        PrunekitError: a seed that is not an integer from 0 to 2**32 - 1.
    """

    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def needs_calibration(self) -> bool:
        """False: nothing is read."""
        return False

    @property
    def label(self) -> str:
        """Short name for tables and legends."""
        return f"random, seed {self.seed}"

    def unit_scores(
        self, model: nn.Module, groups: tuple[CoupledGroup, ...], calib: Tensor | Gradients | None
    ) -> dict[str, Tensor]:
        """Group name → (n_units,); neither model nor `calib` is read."""
        return {group.name: self._draw(group) for group in groups}

    def _draw(self, group: CoupledGroup) -> Tensor:
        seed = zlib.crc32(f"{self.seed}/{group.name}".encode())
        return torch.rand(group.n_units, generator=torch.Generator().manual_seed(seed))
