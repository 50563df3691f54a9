"""Ablation: what the loss really does when units are silenced, and scores that are scaled to it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from prunekit.calibration import mean_loss
from prunekit.discovery.groups import CoupledGroup
from prunekit.errors import PrunekitError
from prunekit.gradients import Gradients
from prunekit.importance.reduction import check_takes_tokens, tokens_for
from prunekit.importance.scores import Scores

LEAST = 1e-9  # of the loss; a group whose loss does not rise keeps its order


@contextmanager
def silenced(model: nn.Module, group: CoupledGroup, units: Iterable[int]) -> Iterator[None]:
    """While open, all that some units own is zero; afterwards the model has its weights again.

    Args:
        model: the model that the group was discovered in.
        group: of which the units are.
        units: their numbers. What runs inside builds no graph for gradients.
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
    """How much the loss rises when a unit is silenced, each alone: measured, one pass of the calibration set a unit.

    What the other importances estimate. Too dear for every channel of a large model, not for its heads or layers. A
    unit without which the loss falls scores below 0. Where a group is inexact, what is silenced still counts in norms
    and routers.

    Source: the oracle that Molchanov et al. (2017) rank their estimates by.
    """

    @property
    def needs_calibration(self) -> bool:
        """True: losses are those of a calibration set."""
        return True

    @property
    def label(self) -> str:
        """Short name for tables and legends."""
        return "ablation"

    def unit_scores(
        self, model: nn.Module, groups: tuple[CoupledGroup, ...], calib: Tensor | Gradients | None
    ) -> dict[str, Tensor]:
        """Group name → (n_units,), nats a token.

        Raises:
            PrunekitError: no tokens, or a loss that is not finite.
        """
        tokens = _tokens(self.label, model, calib)
        dense = mean_loss(model, tokens)
        found = {group.name: torch.zeros(group.n_units, dtype=torch.float64) for group in groups}
        bar = tqdm(total=sum(group.n_units for group in groups), desc="ablation", unit="unit", leave=False, delay=1)
        with bar:
            for group in groups:
                for unit in range(group.n_units):
                    with silenced(model, group, [unit]):
                        found[group.name][unit] = mean_loss(model, tokens) - dense
                    bar.update()
        return found


def check_scalable(importance: object, groups: Iterable[CoupledGroup]) -> None:
    """Refuse what scaling to the loss would be pointless for.

    Raises:
        PrunekitError: scores that are losses already, or whole layers and blocks, whose scores would all become that.
    """
    if isinstance(importance, Ablation):
        raise PrunekitError("Ablation() measures the loss already; leave out normalize")
    whole = next((group.name for group in groups if group.kind in ("layer", "block")), None)
    if whole is not None:
        raise PrunekitError(
            f"{whole!r} goes whole, so that normalize='loss' would only measure the loss without it; score it with "
            "Ablation(), or leave out normalize"
        )


def scaled_to_loss(
    model: nn.Module, groups: Iterable[CoupledGroup], scores: Scores, calib: Tensor | Gradients | None
) -> Scores:
    """Scores in nats a token: each group's share out what the loss rises by when the whole group is silenced.

    One factor a group, so the order inside it stays; across groups and kinds, scores of any importance become
    comparable. Silencing less would be nearer to what a plan does, but a part that costs nothing tells nothing of the
    rest.

    Args:
        model: the model that was scored; it is left as it was.
        groups: those that were scored.
        scores: of any importance, none below 0.
        calib: integers (n_samples, seq_len).

    Raises:
        PrunekitError: no tokens, scores below 0, or a loss that is not finite.
    """
    tokens = _tokens("normalize='loss'", model, calib)
    for name, values in scores.items():
        if float(values.min()) < 0:
            raise PrunekitError(
                f"{scores.label} scores of {name!r} go below 0 and cannot be shared out; leave out normalize"
            )
    dense = mean_loss(model, tokens)
    for group in tqdm(list(groups), desc="scaling", unit="group", leave=False, delay=1):
        with silenced(model, group, range(group.n_units)):
            rise = max(mean_loss(model, tokens) - dense, LEAST * dense)
        total = float(scores[group.name].double().sum())
        scores[group.name] = scores[group.name] * (rise / total) if total > 0 else scores[group.name]
    scores.label = f"{scores.label}, scaled to the loss"
    return scores


def _tokens(who: str, model: nn.Module, calib: Tensor | Gradients | None) -> Tensor:
    check_takes_tokens(model)
    return tokens_for(who, calib)
