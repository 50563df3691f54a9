"""Importance during LoRA training, from a unit's weights and their low-rank update, without gradients."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from prunekit.errors import PrunekitError

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


def lora_saliency(statistics: Mapping[str, UpdateStatistics], *, cosine_sign: int = 1) -> dict[str, Tensor]:
    """One score a unit, the mean of five: ‖x‖, ‖x‖/‖u‖, 1 + cos(x, u), |x·u| and ½(x·u)².

    Each is divided by its L2 norm over all units of all groups first. For a unit with no update, the
    cosine is 0 and ‖x‖/‖u‖ is the largest found, or 0 if the unit is zero already.

    Args:
        statistics: group name → sums of its units.
        cosine_sign: 1 gives a high score to units that the update lengthens, -1 to units that it shortens.

    Returns:
        Group name → float64 (n_units,); higher means keep.

    Raises:
        PrunekitError: another sign, or nothing to score.

    Source: the optimiser family that the authors of LoRAShear released, with the gradient replaced by the update.
        Their code paths disagree about the sign of the cosine. An update is minus a gradient, so with 1 a unit
        is important if gradient descent moves it away from zero.
    """
    if cosine_sign not in (1, -1):
        raise PrunekitError(f"cosine_sign={cosine_sign!r}; it is 1 or -1")
    if not statistics:
        raise PrunekitError("no group to score; give the groups that discover found in the adapted model")
    x, u, dot = (torch.cat(sums) for sums in zip(*statistics.values(), strict=True))
    moved = u > 0
    steady = torch.where(moved, x / u.clamp(min=_TINY), 0.0)
    steady = torch.where(moved | (x == 0), steady, steady.max())
    cosine = torch.where(moved, dot / (x * u).clamp(min=_TINY), 0.0)
    proxies = (x, steady, 1 + cosine_sign * cosine, dot.abs(), dot.square() / 2)
    mean = sum(proxy / proxy.norm().clamp(min=_TINY) for proxy in proxies) / len(proxies)
    return dict(zip(statistics, torch.as_tensor(mean).split([len(s.norm) for s in statistics.values()]), strict=True))
