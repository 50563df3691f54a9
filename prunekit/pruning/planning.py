"""`plan`: chooses the units that stay, from scores and a budget."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from prunekit.checks import Count, Share, check_choice, checked
from prunekit.discovery import KINDS, CoupledGroup, Groups
from prunekit.errors import BudgetError, PrunekitError
from prunekit.pruning.budgets import by_group, held_by_rounding, take_parameters, take_shares, take_units
from prunekit.pruning.heeded import check_after, check_rounding, check_shares
from prunekit.pruning.plans import PruningPlan
from prunekit.pruning.steps import WHOLE_KINDS, Counter, Step, all_steps, gone_first, lowest

DEFAULT_KINDS = ("kv_head", "ffn_channel")

Ratio = Share | Mapping[str, Share]


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
    chosen = DEFAULT_KINDS if kinds is None else tuple(kinds)
    protected = tuple(protect_layers)
    fractions = check_options(
        pruning_ratio, of=of, ranking=ranking, kinds=chosen, round_to=round_to, min_units=min_units
    )
    if isinstance(pruning_ratio, Mapping):
        check_shares(pruning_ratio if kinds is None else chosen, pruning_ratio)
    if ranking is None:
        ranking = getattr(scores, "ranking", "local") if of == "parameters" else "local"
    if kinds is None and not isinstance(pruning_ratio, Mapping):
        found = tuple(g for g in default_units(groups) if g.kind != "query_head" or g.name in scores)
        fractions.update((g.kind, pruning_ratio) for g in found)
    else:
        groups.check_kinds(fractions)
        found = groups.of_kind(*fractions)  # asked for by name: inexact ones too
    candidates = candidates_of(groups, scores, found, protected)
    check_rounding(round_to, candidates, pruning_ratio)
    rounding = {g.name: round_to.get(g.kind, 1) if isinstance(round_to, Mapping) else round_to for g in candidates}
    counter, rounded = Counter(groups), _limits(round_to, min_units)
    gone_before = {} if after is None else {name: set(after.removed(name)) for name in after.keep}
    ordered = lowest(scores, gone_before)
    if of == "units" and ranking == "local" and not set(fractions) & set(WHOLE_KINDS):
        taken = take_shares(groups, candidates, ordered, fractions, rounding, min_units)
    else:
        steps = all_steps(groups, candidates, ordered, ranking, rounding, min_units)
        steps = gone_first(steps, gone_before)
        if of == "units":
            taken = take_units(steps, candidates, fractions, ranking)
        else:
            taken = take_parameters(steps, next(iter(fractions.values()), 0.0), counter, rounded)
    gone = by_group(taken, candidates)
    check_after(after, gone)
    notes = {
        "pruning_ratio": dict(pruning_ratio) if isinstance(pruning_ratio, Mapping) else pruning_ratio,
        "of": of, "ranking": ranking, "importance": getattr(scores, "label", None),
    }  # fmt: skip
    held = held_by_rounding(groups, candidates, scores, rounding, min_units) if rounded else []
    few: dict[str, str] = {}
    if of == "units":
        few = _too_few(gone, candidates, fractions)
        _check_some_go(gone, fractions, few, rounded)
    whole = [f"{', '.join(held)}: no smaller number of units for {rounded}"] if held else []
    if whole or few:
        notes["whole"] = "; ".join(whole + [f"{kind}: {why}" for kind, why in few.items() if kind not in held])
    return replace(plan_without(groups, gone, notes), tokens=getattr(scores, "tokens", None))


def default_units(groups: Groups) -> tuple[CoupledGroup, ...]:
    """The groups that may be cut where no kinds are asked for, exact ones.

    KV heads with their query heads, and FFN channels. A single KV head cannot go: its query heads stand in its place.
    """
    single = {_place(g) for g in groups.of_kind("kv_head") if g.n_units == 1}
    split = {_place(g) for g in groups.of_kind("query_head") if g.exact and g.n_units > 1} & single
    found = groups.of_kind(*DEFAULT_KINDS, "query_head")
    return tuple(g for g in found if g.exact and g.kind != ("kv_head" if _place(g) in split else "query_head"))


def _too_few(
    gone: Mapping[str, Collection[int]], candidates: list[CoupledGroup], fractions: Mapping[str, float]
) -> dict[str, str]:
    """Kind → why none of its units is removed, although a share was requested."""
    found = {}
    for kind, fraction in fractions.items():
        units = [g.n_units for g in candidates if g.kind == kind]
        if fraction > 0 and units and not any(gone[g.name] for g in candidates if g.kind == kind):
            found[kind] = f"{fraction:.4g} of {max(units)} units a group are fewer than can go at once"
    return found


def _check_some_go(
    gone: Mapping[str, Collection[int]], fractions: Mapping[str, float], few: Mapping[str, str], rounded: str
) -> None:
    """Raise an error for shares of units by which nothing goes."""
    if any(fractions.values()) and not any(gone.values()):
        why = "; ".join(f"{kind}: {reason}" for kind, reason in few.items())
        why = why or "what is protected, or not of the chosen kinds, leaves no units"
        limits = f", with {rounded}" if rounded else ""
        raise BudgetError(f"nothing would go ({why}{limits}); ask for a larger pruning_ratio, or allow more kinds")


def _place(group: CoupledGroup) -> str:
    return group.name.rpartition(":")[0]


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
def check_options(
    pruning_ratio: Ratio,
    *,
    of: str = "parameters",
    ranking: str | None = None,
    kinds: Iterable[str] | None = None,
    protect_layers: Iterable[int] = (),
    round_to: Count | Mapping[str, Count] = 1,
    min_units: Count = 1,
) -> dict[str, float]:
    """Raise an error for options of `plan` that hold for no model, before there is one.

    Returns:
        Fraction that is to go, for each kind that may be cut.

    Raises:
        PrunekitError: bad arguments.
    """
    check_choice("ranking", "local" if ranking is None else ranking, ("local", "global"))
    for kind in round_to if isinstance(round_to, Mapping) else ():
        check_choice("round_to: kind", kind, KINDS)
    return _check_ratio(pruning_ratio, of, DEFAULT_KINDS if kinds is None else tuple(kinds))


def _limits(round_to: int | Mapping[str, int], min_units: int) -> str:
    """What limits the numbers of units, for messages; empty where nothing does."""
    rounds = any(n > 1 for n in round_to.values()) if isinstance(round_to, Mapping) else round_to > 1
    limits = [f"round_to={round_to}"] * rounds + [f"min_units={min_units}"] * (min_units > 1)
    return " and ".join(limits)


def _check_ratio(ratio: Ratio, of: str, kinds: tuple[str, ...]) -> dict[str, float]:
    """Fraction for each kind that may be cut."""
    check_choice("of", of, ("parameters", "units"))
    if not kinds:
        raise PrunekitError(f"kinds is empty; give at least one of {', '.join(KINDS)}")
    for kind in (*kinds, *(ratio if isinstance(ratio, Mapping) else ())):
        check_choice("kind", kind, KINDS)
    if isinstance(ratio, Mapping):
        if of != "units":
            raise PrunekitError(f"pruning_ratio={dict(ratio)} by kind is only allowed with of='units'; give one number")
        return dict(ratio)
    return dict.fromkeys(kinds, ratio)


def candidates_of(
    groups: Groups,
    scores: Mapping[str, Tensor],
    among: Iterable[CoupledGroup],
    protected: tuple[int, ...],
) -> list[CoupledGroup]:
    """The groups that may be cut, each with one score per unit.

    Args:
        groups: what `discover` found.
        scores: group name → (n_units,).
        among: the groups of which they are.
        protected: layers whose groups stay whole.

    Raises:
        PrunekitError: layers that the model does not have, scores that cannot be, or kinds that cut the same rows.
    """
    layers = sorted({g.layer for g in groups if g.layer is not None})
    for layer in protected:
        if isinstance(layer, bool) or layer not in layers:
            span = f"layers {layers[0]} to {layers[-1]}; name some of those" if layers else "no numbered layers"
            raise PrunekitError(f"protect_layers names {layer!r}; this model has {span}")
    found = [g for g in among if g.layer is None or g.layer not in protected]
    owner: dict[tuple[str, int], CoupledGroup] = {}
    for g in found:
        _check_scores(g, scores)
        for m in g.members:
            other = owner.setdefault((m.parameter, m.dim), g)
            if other.kind != g.kind:
                raise PrunekitError(
                    f"{g.name!r} and {other.name!r} cut the same rows of {m.parameter}; give kinds that do not overlap"
                )
    return found


def _check_scores(g: CoupledGroup, scores: Mapping[str, Tensor]) -> None:
    if g.name not in scores:
        raise PrunekitError(f"scores have no entry for {g.name!r}; score the groups of this model first")
    found = scores[g.name]
    if not isinstance(found, Tensor):
        raise PrunekitError(
            f"scores of {g.name!r} are a {type(found).__name__}; give a tensor of {g.n_units} numbers, one a unit"
        )
    if tuple(found.shape) != (g.n_units,) or not bool(found.isfinite().all()):
        raise PrunekitError(
            f"scores of {g.name!r} must be {g.n_units} finite numbers; got shape {tuple(found.shape)}, "
            f"{int((~found.isfinite()).sum())} of them not finite; score the groups of this model again"
        )
