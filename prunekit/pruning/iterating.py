"""Plans in several steps, with new scores between them."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from prunekit.checks import Count, Network, checked
from prunekit.discovery import CoupledGroup, Groups, discover
from prunekit.errors import BudgetError, PrunekitError
from prunekit.importance import Scores, score
from prunekit.importance.scoring import AnyImportance
from prunekit.pruning.gaps import counterparts, takes_layers
from prunekit.pruning.plan_options import Ratio, check_options
from prunekit.pruning.planning import plan
from prunekit.pruning.plans import PruningPlan
from prunekit.pruning.steps import WHOLE_KINDS
from prunekit.pruning.surgery import cut


@checked
def plan_in_steps(
    model: Network,
    importance: AnyImportance,
    pruning_ratio: Ratio,
    calib: Tensor | None = None,
    *,
    n_steps: Count,
    normalize: str | None = None,
    groups: Groups | None = None,
    **options: Any,
) -> PruningPlan:
    """Makes a plan in equal steps: after each step the smaller model is scored again.

    Args:
        model: the dense model; it is left alone.
        importance: as for `score`.
        pruning_ratio: as for `plan`, of the dense model, after the last step.
        calib: as for `score`.
        n_steps: 1 or more. A step that is too small for a unit is passed over; its share goes with the next.
        normalize: as for `score`.
        groups: what `discover(model)` returned, where it was called before; None discovers.
        options: of `plan`. Of whole parts, layers alone (`kinds=("layer",)`): with `BlockInfluence` and as many steps
            as layers they go one at a time, each chosen by the influence measured without those before. No blocks.

    Returns:
        One plan for the dense model. What went in a step stays gone.

    Raises:
        PrunekitError: an invalid number of steps, kinds of one unit, or errors of `score`, `plan` and `prune`.

    Source: LLM-Pruner (Ma et al. 2023), iterative pruning. Differs: a step smaller than one head does not fail.
    """
    options = {name: tuple(value) if isinstance(value, Iterator) else value for name, value in options.items()}
    kinds = tuple(check_options(pruning_ratio, **options))
    if "vocabulary" in kinds and calib is not None:
        raise PrunekitError("kinds has vocabulary, after which calib would name other tokens; take tokens in one step")
    if set(kinds) & set(WHOLE_KINDS) and kinds != ("layer",):
        raise PrunekitError(f"kinds={kinds} includes blocks, or layers with others; remove those by a separate plan")
    groups = discover(model) if groups is None else groups
    chosen, small = plan(groups, _ones(groups), _part(pruning_ratio, 0.0), **options), model
    scored = partial(score, importance=importance, calib=calib, normalize=normalize)
    scores: Scores | None = None
    for step in tqdm(range(1, n_steps + 1), desc="steps", leave=False, delay=1):
        if scores is None:  # a step that was passed over changed nothing
            left = groups if small is model else discover(small)
            names = _names_now(model, small, chosen)
            scores = _scores(groups, left, chosen, names, partial(scored, small))
        try:
            chosen = plan(groups, scores, _part(pruning_ratio, step / n_steps), **options, after=chosen)
        except BudgetError:
            if step == n_steps:
                raise
            continue
        if step < n_steps:
            small, scores = cut(model, chosen, inplace=False), None
    return chosen


def _ones(groups: Groups) -> dict[str, Tensor]:
    return {group.name: torch.ones(group.n_units) for group in groups}


def _part(ratio: Ratio, share: float) -> Ratio:
    return ratio * share if isinstance(ratio, (int, float)) else {kind: part * share for kind, part in ratio.items()}


def _names_now(model: nn.Module, small: nn.Module, chosen: PruningPlan) -> dict[str, str]:
    """Name of each group that is left, in the dense model → in the smaller one, where layers moved up."""
    left = [name for name, units in chosen.keep.items() if units]
    if not takes_layers(chosen):
        return dict(zip(left, left, strict=True))
    moved = counterparts(small, model, chosen)
    return {name: f"{moved[name.removesuffix(':layer')]}:layer" for name in left}


def _scores(
    groups: Groups,
    left: Groups,
    chosen: PruningPlan,
    names: dict[str, str],
    scored: Callable[[list[CoupledGroup]], Scores],
) -> Scores:
    """Scores of the remaining units in the dense model's numbering; removed units score lowest."""
    missing = [name for name, now in names.items() if now not in {group.name for group in left}]
    if missing:
        raise PrunekitError(f"{missing[0]!r} is not found again after a step; plan it in one step")
    fresh = scored([left[now] for now in names.values()])
    lowest = min(float(values.min()) for values in fresh.values()) - 1
    scores = {}
    for name, units in chosen.keep.items():
        scores[name] = torch.full((groups[name].n_units,), lowest, dtype=next(iter(fresh.values())).dtype)
        if units:
            scores[name][units] = fresh[names[name]]
    found = Scores(scores, label=f"{fresh.label}, in steps", kinds=fresh.kinds, ranking=fresh.ranking)
    found.tokens = fresh.tokens
    return found
