"""Importance of weights: Taylor's estimate from gradients, and the baselines, magnitude and random scores."""

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunekit.checks import Seed, check_choice, check_fields
from prunekit.discovery.groups import CoupledGroup
from prunekit.errors import PrunekitError
from prunekit.gradients import Gradients, gather_gradients
from prunekit.importance.input_statistics import wide
from prunekit.importance.scores import (
    GRANULARITIES,
    REDUCTIONS,
    Calibration,
    GradientSource,
    SomeGroups,
    all_slice_scores,
    unit_scores,
)

ORDERS = ("first", "second", "mixed")


@dataclass(frozen=True)
class Taylor:
    """Estimated change of the loss when weights become zero, summed over each slice and each unit.

    With g the gradient of the mean loss and h the mean of the squared per-sample gradients, a weight
    scores S = w·g (`"first"`), w²·h (`"second"`) or w·g − ½·w²·h (`"mixed"`); a row or column scores |Σ S|
    (`"vector"`) or Σ|S| (`"element"`).

    Attributes:
        granularity: `"vector"` or `"element"`.
        order: `"first"`, `"second"` or `"mixed"`.
        reduction: how the slices of a unit combine, one of `"sum" "mean" "max" "prod" "first" "second"`.

    Raises:
        PrunekitError: another value.

    Source: LLM-Pruner, Eq. 3 to 5: `vectorize` is ("vector", "first"), Element¹ ("element", "first"),
        Element² ("element", "second"), `param_mix` ("element", "mixed").
        Differs: Element² without the ½ of the expansion, as the released code has it.
    """

    granularity: str = "element"
    order: str = "first"
    reduction: str = "sum"

    def __post_init__(self) -> None:
        check_choice("granularity", self.granularity, GRANULARITIES)
        check_choice("order", self.order, ORDERS)
        check_choice("reduction", self.reduction, REDUCTIONS)

    needs_calibration = True  # gradients come from a calibration set

    @property
    def label(self) -> str:
        """Short name for tables and legends."""
        return f"Taylor {self.granularity} {self.order}" + ("" if self.reduction == "sum" else f", {self.reduction}")

    def unit_scores(self, model: nn.Module, groups: SomeGroups, calib: GradientSource) -> dict[str, Tensor]:
        """Group name → (n_units,), from tokens or from gradients already gathered.

        Raises:
            PrunekitError: gradients without what the order needs, or what `gather_gradients` raises.
        """
        gradients = self.gathered(model, groups, calib)
        parameters = dict(model.named_parameters())

        def weight_scores(name: str) -> Tensor:
            return taylor_weight_scores(parameters[name].detach(), gradients, name, self.order)

        slices = all_slice_scores(groups, weight_scores, self.granularity)
        return {group.name: unit_scores(group, slices, self.reduction) for group in groups}

    def gathered(self, model: nn.Module, groups: SomeGroups, calib: GradientSource) -> Gradients:
        """The gradients of the groups' parameters, computed from tokens or taken from `calib`.

        Raises:
            PrunekitError: gradients without what the order needs, or what `gather_gradients` raises.
        """
        names = dict.fromkeys(member.parameter for group in groups for member in group.members)
        second = self.order != "first"
        if not isinstance(calib, Gradients):
            return gather_gradients(model, calib, names, second=second)  # type: ignore[arg-type]
        missing = [name for name in names if name not in calib.g]
        if missing or (second and calib.h is None):
            lack = f"those of {missing[0]}" if missing else "second-order ones"
            raise PrunekitError(f"{calib!r} lack {lack}: gather_gradients(model, calib, names, second={second})")
        return calib


def taylor_weight_scores(weight: Tensor, gradients: Gradients, name: str, order: str) -> Tensor:
    """S of each weight, signed, in the parameter's shape.

    Args:
        weight: the parameter's values.
        gradients: gathered over the calibration set, with `h` unless `order` is `"first"`.
        name: the parameter's name.
        order: `"first"`, `"second"` or `"mixed"`.

    Returns:
        float32 (float64 for float64 weights), shaped like `weight`.
    """
    weight = wide(weight)
    first = weight * gradients.g[name].to(weight)
    if order == "first" or gradients.h is None:
        return first
    second = weight.square() * gradients.h[name].to(weight)
    return second if order == "second" else first - second / 2


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

    needs_calibration = False  # only weights are read

    @property
    def label(self) -> str:
        """Short name for tables and legends."""
        return f"L{self.p}" + ("" if self.reduction == "mean" else f", {self.reduction}")

    def unit_scores(self, model: nn.Module, groups: SomeGroups, calib: Calibration) -> dict[str, Tensor]:
        """Group name → (n_units,); `calib` is not read."""
        parameters = dict(model.named_parameters())

        def weight_scores(name: str) -> Tensor:
            weight = wide(parameters[name].detach())
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

    needs_calibration = False  # nothing is read

    @property
    def label(self) -> str:
        """Short name for tables and legends."""
        return f"random, seed {self.seed}"

    def unit_scores(self, model: nn.Module, groups: SomeGroups, calib: Calibration) -> dict[str, Tensor]:
        """Group name → (n_units,); neither model nor `calib` is read."""
        return {group.name: self._draw(group) for group in groups}

    def _draw(self, group: CoupledGroup) -> Tensor:
        seed = zlib.crc32(f"{self.seed}/{group.name}".encode())
        return torch.rand(group.n_units, generator=torch.Generator().manual_seed(seed))
