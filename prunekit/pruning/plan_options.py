"""The options of `plan`, read and checked together: what cannot be followed is refused before units are chosen."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from prunekit.checks import Count, Share, check_choice, checked
from prunekit.discovery import KINDS, CoupledGroup, Groups
from prunekit.errors import BudgetError, PrunekitError

DEFAULT_KINDS = ("kv_head", "ffn_channel")

Ratio = Share | Mapping[str, Share]


@dataclass(frozen=True, eq=False)
class Options:
    """What `plan` was asked for, on the model at hand.

    Attributes:
        of: `"parameters"` or `"units"`.
        ranking: `"local"` or `"global"`.
        fractions: kind → fraction that is to go, for each kind that may be cut.
        candidates: the groups that may be cut.
        rounding: group name → multiple of units that is kept.
        min_units: units that every group keeps at least.
        limits: `round_to` and `min_units` for messages, such as `"round_to=16"`; empty where neither limits.
        gone_before: group name → units that an earlier plan removed.
    """

    of: str
    ranking: str
    fractions: Mapping[str, float]
    candidates: list[CoupledGroup]
    rounding: Mapping[str, int]
    min_units: int
    limits: str
    gone_before: Mapping[str, set[int]]


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
    check_choice("of", of, ("parameters", "units"))
    shares = pruning_ratio if isinstance(pruning_ratio, Mapping) else {}
    chosen = tuple(shares or DEFAULT_KINDS) if kinds is None else tuple(kinds)
    if not chosen:
        raise PrunekitError(f"kinds is empty; give at least one of {', '.join(KINDS)}")
    for kind in (*chosen, *shares):
        check_choice("kind", kind, KINDS)
    if not isinstance(pruning_ratio, Mapping):
        return dict.fromkeys(chosen, pruning_ratio)
    if of != "units":
        raise PrunekitError(f"pruning_ratio={dict(shares)} by kind is only allowed with of='units'; give one number")
    if not shares:
        raise PrunekitError("pruning_ratio={} names no kind; give a share for each, such as {'ffn_channel': 0.25}")
    for kind in {*chosen} ^ {*shares}:
        has, lacks = ("kinds", "pruning_ratio") if kind in chosen else ("pruning_ratio", "kinds")
        raise PrunekitError(
            f"{has} names {kind!r}, and {lacks} does not; name the same kinds in both, or leave out kinds"
        )
    return dict(shares)


def limits_of(round_to: int | Mapping[str, int], min_units: int) -> str:
    """What limits the numbers of units, for messages; empty where nothing does."""
    rounds = any(n > 1 for n in round_to.values()) if isinstance(round_to, Mapping) else round_to > 1
    limits = [f"round_to={round_to}"] * rounds + [f"min_units={min_units}"] * (min_units > 1)
    return " and ".join(limits)


def default_units(groups: Groups) -> tuple[CoupledGroup, ...]:
    """The groups that may be cut where no kinds are asked for, exact ones.

    KV heads with their query heads, and FFN channels. A single KV head cannot go: its query heads stand in its place.
    """
    single = {_place(g) for g in groups.of_kind("kv_head") if g.n_units == 1}
    split = {_place(g) for g in groups.of_kind("query_head") if g.exact and g.n_units > 1} & single
    found = groups.of_kind(*DEFAULT_KINDS, "query_head")
    return tuple(g for g in found if g.exact and g.kind != ("kv_head" if _place(g) in split else "query_head"))


def _place(group: CoupledGroup) -> str:
    return group.name.rpartition(":")[0]


def candidates_of(
    groups: Groups, scores: Mapping[str, Tensor], among: Iterable[CoupledGroup], protected: tuple[int, ...]
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
    layers = groups.layers
    for layer in protected:
        if isinstance(layer, bool) or layer not in layers:
            span = f"layers {layers[0]} to {layers[-1]}; name some of those" if layers else "no numbered layers"
            raise PrunekitError(f"protect_layers names {layer!r}; this model has {span}")
    found = [g for g in among if g.layer is None or g.layer not in protected]
    owner: dict[tuple[str, int], CoupledGroup] = {}
    for g in found:
        check_scores(g, scores)
        for m in g.members:
            other = owner.setdefault((m.parameter, m.dim), g)
            if other.kind != g.kind:
                advice = (
                    "; search.solve_budgets chooses among both" if {"layer", "block"} & {g.kind, other.kind} else ""
                )
                raise PrunekitError(
                    f"{g.name!r} and {other.name!r} cut the same rows of {m.parameter}; give kinds that do not "
                    f"overlap{advice}"
                )
    return found


def check_scores(g: CoupledGroup, scores: Mapping[str, Tensor]) -> None:
    """Raise an error where a group has not one finite score per unit."""
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


def check_rounding(round_to: object, candidates: Iterable[CoupledGroup], ratio: object) -> None:
    """Raise an error where a kind is rounded of which nothing may go.

    Raises:
        PrunekitError: names the kind and those that may go.
    """
    there = sorted({group.kind for group in candidates})
    unheeded = [kind for kind in round_to if kind not in there] if isinstance(round_to, Mapping) else []
    if unheeded:
        raise PrunekitError(
            f"round_to names {unheeded[0]!r}, of which this plan takes none (pruning_ratio={ratio}, "
            f"{', '.join(there) or 'nothing'} may go); leave it out, or allow it by kinds="
        )


def check_outcome(options: Options, gone: Mapping[str, Collection[int]]) -> dict[str, str]:
    """What stays whole although a share of it was asked for: kind → why.

    Args:
        options: what was asked for.
        gone: group name → units that go.

    Raises:
        PrunekitError: an earlier plan removes what this one keeps; or nothing goes.
    """
    earlier, fractions = options.gone_before, options.fractions
    kept = [(name, unit) for name, units in earlier.items() for unit in sorted(units - set(gone.get(name, ())))]
    if kept:
        name, unit = kept[0]
        raise PrunekitError(
            f"after= removes {len(kept)} units that this plan keeps, such as unit {unit} of {name!r}; give an earlier "
            "plan that removes less, of kinds and layers that may be cut here"
        )
    if options.of == "parameters":
        return {}
    few = {}
    for kind, fraction in fractions.items():
        groups = [g for g in options.candidates if g.kind == kind]
        if fraction > 0 and groups and not any(gone[g.name] for g in groups):
            most = max(g.n_units for g in groups)
            few[kind] = f"{fraction:.4g} of {most} units a group are fewer than can go at once"
    if any(fractions.values()) and not any(gone.values()):
        why = "; ".join(f"{kind}: {reason}" for kind, reason in few.items())
        why = why or "what is protected, or not of the chosen kinds, leaves no units"
        limits = f", with {options.limits}" if options.limits else ""
        raise BudgetError(f"nothing would go ({why}{limits}); ask for a larger pruning_ratio, or allow more kinds")
    return few
