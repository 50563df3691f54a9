"""Ablation: the measured loss without a unit, and scores scaled to it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from prunekit.calibration import mean_loss
from prunekit.discovery.groups import CoupledGroup
from prunekit.errors import PrunekitError
from prunekit.importance.scores import Calibration, Scores, SomeGroups, check_takes_tokens, tokens_for

LEAST = 1e-9  # share of the loss; keeps the order of a group whose loss does not rise


@contextmanager
def ablated(model: nn.Module, group: CoupledGroup, units: Iterable[int]) -> Iterator[None]:
    """A context in which all weights of some units are zero; the weights are restored at its end.

    Args:
        model: the model that the group was discovered in.
        group: the group of the units.
        units: numbers of the units. Gradients are off inside.
    """
    parameters, owned, held = dict(model.named_parameters()), list(units), []
    with torch.no_grad():
        try:
            for member in group.members:
                p = parameters[member.parameter]
                index = member.owned_by(owned).to(p.device)
                held.append((p, member.dim, index, p.index_select(member.dim, index)))
                p.index_fill_(member.dim, index, 0.0)
            yield
        finally:
            for p, dim, index, before in reversed(held):
                p.index_copy_(dim, index, before)


@dataclass(frozen=True)
class Ablation:
    """The measured rise of the loss when each unit is ablated alone, one pass of the calibration set per unit.

    The other importances estimate this. It is too slow for every channel of a large model, but not for its heads or
    layers. A unit scores below 0 if the loss falls without it. In an inexact group, norms and routers still see the
    zeros.

    Source: the oracle that Molchanov et al. (2017) rank their estimates by.
    """

    needs_calibration = True  # losses are those of a calibration set
    label = "ablation"

    def unit_scores(self, model: nn.Module, groups: SomeGroups, calib: Calibration) -> dict[str, Tensor]:
        """Group name → (n_units,), nats per token.

        Raises:
            PrunekitError: no tokens, or a loss that is not finite.
        """
        check_takes_tokens(model)
        tokens = tokens_for(self.label, calib)
        dense = mean_loss(model, tokens)
        found = {group.name: torch.zeros(group.n_units, dtype=torch.float64) for group in groups}
        bar = tqdm(total=sum(group.n_units for group in groups), desc="ablation", unit="unit", leave=False, delay=1)
        with bar:
            for group in groups:
                for unit in range(group.n_units):
                    with ablated(model, group, [unit]):
                        found[group.name][unit] = mean_loss(model, tokens) - dense
                    bar.update()
        return found


def check_scalable(importance: object, groups: Iterable[CoupledGroup]) -> None:
    """Raise an error if scaling to the loss makes no sense for these scores.

    Raises:
        PrunekitError: scores that are losses already, or groups of one unit (layers and blocks).
    """
    if isinstance(importance, Ablation):
        raise PrunekitError("Ablation() measures the loss already; leave out normalize")
    whole = next((group.name for group in groups if group.kind in ("layer", "block")), None)
    if whole is not None:
        raise PrunekitError(
            f"{whole!r} is one unit, so normalize='loss' would only measure the loss without it; score it with "
            "Ablation(), or leave out normalize"
        )


def scaled_to_loss(model: nn.Module, groups: Iterable[CoupledGroup], scores: Scores, calib: Calibration) -> Scores:
    """Scores in nats per token: each group's scores are scaled to sum to the rise of the loss without the group.

    Each group gets one factor, so its order stays; scores of any importance become comparable across groups and
    kinds. Ablating part of a group would be closer to a plan, but its cost says little about the rest.

    Args:
        model: the model that was scored; it is unchanged afterwards.
        groups: the scored groups.
        scores: scores of any importance, none below 0.
        calib: integers (n_samples, seq_len).

    Raises:
        PrunekitError: no tokens, scores below 0, or a loss that is not finite.
    """
    check_takes_tokens(model)
    tokens = tokens_for("normalize='loss'", calib)
    for name, values in scores.items():
        if float(values.min()) < 0:
            raise PrunekitError(
                f"{scores.label} scores of {name!r} go below 0 and cannot be scaled; leave out normalize"
            )
    dense = mean_loss(model, tokens)
    for group in tqdm(list(groups), desc="scaling", unit="group", leave=False, delay=1):
        with ablated(model, group, range(group.n_units)):
            rise = max(mean_loss(model, tokens) - dense, LEAST * dense)
        total = float(scores[group.name].double().sum())
        scores[group.name] = scores[group.name] * (rise / total) if total > 0 else scores[group.name]
    scores.label = f"{scores.label}, scaled to the loss"
    return scores
