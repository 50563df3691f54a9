"""Refuses options of `plan` that would change nothing, where they cannot be followed."""

from collections.abc import Collection, Iterable, Mapping

from prunekit.discovery import CoupledGroup
from prunekit.errors import PrunekitError
from prunekit.pruning.plans import PruningPlan


def check_shares(kinds: Collection[str], shares: Mapping[str, float]) -> None:
    """Raise an error where kinds and a ratio by kind name different ones, or no kind at all is named.

    Raises:
        PrunekitError: names a kind that only one of the two names.
    """
    if not shares:
        raise PrunekitError("pruning_ratio={} names no kind; give a share for each, such as {'ffn_channel': 0.25}")
    for kind in {*kinds} ^ {*shares}:
        has, lacks = ("kinds", "pruning_ratio") if kind in kinds else ("pruning_ratio", "kinds")
        raise PrunekitError(
            f"{has} names {kind!r}, and {lacks} does not; name the same kinds in both, or leave out kinds"
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


def check_after(after: PruningPlan | None, gone: Mapping[str, Collection[int]]) -> None:
    """Raise an error where an earlier plan removes what the new one keeps.

    Args:
        after: the earlier plan, or None.
        gone: group name → units that the new plan removes.

    Raises:
        PrunekitError: says how many, and names one.
    """
    earlier = {} if after is None else {name: set(after.removed(name)) for name in after.keep}
    kept = [(name, unit) for name, units in earlier.items() for unit in sorted(units - set(gone.get(name, ())))]
    if kept:
        name, unit = kept[0]
        raise PrunekitError(
            f"after= removes {len(kept)} units that this plan keeps, such as unit {unit} of {name!r}; give an earlier "
            "plan that removes less, of kinds and layers that may be cut here"
        )
