"""`plan`: chooses the units that stay, from scores and a budget."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from prunekit.checks import Count, checked
from prunekit.discovery import Groups
from prunekit.pruning.budgets import held_by_rounding, units_to_go
from prunekit.pruning.plan_options import Ratio, check_outcome, read_options
from prunekit.pruning.plans import PruningPlan
from prunekit.pruning.steps import Counter, Step


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
            `of="units"` of the units, and it may then be a mapping kind → fraction.
        of: `"parameters"` or `"units"`.
        ranking: `"local"` or `"global"`; by default what the scores say: `"global"` for `Curvature`, which share the
            budget out among layers by what each would lose, else `"local"`. With `of="units"`, `"local"`.
        kinds: kinds of groups that may be cut, inexact ones too; by default those of the mapping, else the exact ones
            of `"kv_head"` and `"ffn_channel"`, and where attention has a single KV head, its query heads where they are
            scored.
        protect_layers: layers whose groups stay whole, counted from 0.
        round_to: a cut group keeps a multiple of this; an int or kind → int.
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
    options = read_options(
        groups, scores, pruning_ratio, of=of, ranking=ranking, kinds=kinds, protect_layers=protect_layers,
        round_to=round_to, min_units=min_units, after=after,
    )  # fmt: skip
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
