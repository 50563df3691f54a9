"""`plan` and `plan_in_steps`: choose the units that stay, from scores and a budget."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
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
from prunekit.pruning.budgets import WHOLE_KINDS, Counter, Step, held_by_rounding, units_to_go
from prunekit.pruning.gaps import counterparts
from prunekit.pruning.plan_options import (
    Options,
    Ratio,
    candidates_of,
    check_options,
    check_outcome,
    check_rounding,
    default_units,
    limits_of,
)
from prunekit.pruning.plans import PruningPlan
from prunekit.pruning.surgery import cut


@checked
def plan(
    groups: Groups,
    scores: Mapping[str, Tensor],
    pruning_ratio: Ratio,
    *,
    of: str = "parameters",
    ranking: str | None = None,
    kinds: Iterable[str] | None = None,
    protect_layers: Iterable[int] = (),
    round_to: Count | Mapping[str, Count] = 1,
    min_units: Count = 1,
    after: PruningPlan | None = None,
) -> PruningPlan:
    """Makes a pruning plan: which units stay, so that a fraction of the model is removed.

    Units go in the order of their scores, lowest first. With `ranking="local"` every group loses the same
    share; with `"global"` units compete across groups by score per parameter removed, which makes a head
    and a channel comparable where scores of all groups are in one unit: Taylor's and ablation's estimate the loss,
    and `score(..., normalize="loss")` scales any others to it.

    Args:
        groups: what `discover` found.
        scores: group name → (n_units,); higher means keep.
        pruning_ratio: fraction in [0, 1) of all the model's parameters, embeddings counted. With
            `of="units"` of the units; in Python it may then be a mapping kind → fraction.
        of: `"parameters"` or `"units"`.
        ranking: `"local"` or `"global"`; by default what the scores say: `"global"` for those of `Curvature`, which
            share the budget out among layers by what each would lose, else `"local"`. With `of="units"`, `"local"`.
        kinds: kinds of groups that may be cut, inexact ones too; by default those of the mapping, else the exact ones
            of `"kv_head"` and `"ffn_channel"`, and where attention has a single KV head, its query heads where they are
            scored.
        protect_layers: layers whose groups stay whole, counted from 0.
        round_to: a cut group keeps a multiple of this; in Python also kind → multiple.
        min_units: units every group keeps at least.
        after: an earlier, smaller plan; its removed units are removed first.

    Returns:
        A plan whose parameter count is within 0.5% of the model's parameters of what was asked. `notes["whole"]` says
        which kinds stay whole though they were asked for, and why.

    Raises:
        PrunekitError: bad arguments, kinds that the model has no groups of, an option that cannot be followed (a kind
            that is rounded and not cut, an earlier plan that removes what this one keeps), a budget that cannot be met,
            with the nearest one that can, or one by which nothing goes.

    Source: LLM-Pruner (Ma et al. 2023), local and global selection. Differs: its global mode compares head
    sums with single channels and so never removes a head; here scores are taken per parameter.
    """
    named, protected = None if kinds is None else tuple(kinds), tuple(protect_layers)
    fractions = check_options(pruning_ratio, of=of, ranking=ranking, kinds=named, round_to=round_to)
    if ranking is None:
        ranking = getattr(scores, "ranking", "local") if of == "parameters" else "local"
    if named is None and not isinstance(pruning_ratio, Mapping):
        found = tuple(g for g in default_units(groups) if g.kind != "query_head" or g.name in scores)
        fractions.update((g.kind, pruning_ratio) for g in found)
    else:
        groups.check_kinds(fractions)
        found = groups.of_kind(*fractions)  # asked for by name: inexact ones too
    candidates = candidates_of(groups, scores, found, protected)
    check_rounding(round_to, candidates, pruning_ratio)
    rounding = {g.name: round_to.get(g.kind, 1) if isinstance(round_to, Mapping) else round_to for g in candidates}
    earlier = {} if after is None else {name: set(after.removed(name)) for name in after.keep}
    limits = limits_of(round_to, min_units)
    options = Options(of, ranking, fractions, candidates, rounding, min_units, limits, earlier)
    gone = units_to_go(groups, scores, options)
    few = check_outcome(options, gone)
    held = held_by_rounding(groups, scores, options)
    why = [f"{', '.join(held)}: no smaller number of units for {options.limits}"] if held else []
    why += [f"{kind}: {reason}" for kind, reason in few.items() if kind not in held]
    notes = {
        "pruning_ratio": dict(pruning_ratio) if isinstance(pruning_ratio, Mapping) else pruning_ratio,
        "of": of, "ranking": options.ranking, "importance": getattr(scores, "label", None),
    }  # fmt: skip
    notes |= {"whole": "; ".join(why)} if why else {}
    return replace(plan_without(groups, gone, notes), tokens=getattr(scores, "tokens", None))


def plan_without(groups: Groups, gone: Mapping[str, Collection[int]], notes: Mapping[str, Any]) -> PruningPlan:
    """The plan that removes given units.

    Args:
        groups: what `discover` found.
        gone: group name → its units that go; groups that are cut nowhere may be named with none.
        notes: how the units were chosen.
    """
    counter, keep = Counter(groups), {}
    for name, units in gone.items():
        counter.take(Step(groups[name], tuple(units), 0.0))
        left_out = set(units)
        keep[name] = [unit for unit in range(groups[name].n_units) if unit not in left_out]
    n_units = {name: groups[name].n_units for name in gone}
    return PruningPlan(keep, n_units, counter.total, counter.left, dict(notes), groups)


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
        options: of `plan`. Of whole parts, layers alone (`kinds=("layer",)`) or blocks alone: with `BlockInfluence` and
            as many steps as go, they go one at a time, each chosen by the influence measured without those before.

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
    if set(kinds) & set(WHOLE_KINDS) and len(kinds) > 1:
        raise PrunekitError(f"kinds={kinds} has whole layers or blocks with others; remove those by a separate plan")
    groups = discover(model) if groups is None else groups
    alike = {group.name: torch.ones(group.n_units) for group in groups}
    chosen, small = plan(groups, alike, _part(pruning_ratio, 0.0), **options), model
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


def _part(ratio: Ratio, share: float) -> Ratio:
    return ratio * share if isinstance(ratio, (int, float)) else {kind: part * share for kind, part in ratio.items()}


def _names_now(model: nn.Module, small: nn.Module, chosen: PruningPlan) -> dict[str, str]:
    """Name of each group that is left, in the dense model → in the smaller one, where layers moved up."""
    left = [name for name, units in chosen.keep.items() if units]
    if not chosen.removed_layers:
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
