"""Chooses the next units to remove, and checks the requested numbers."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from prunekit.errors import PrunekitError
from prunekit.recovery.lora_units import GroupUnits


def lowest_units(
    groups: Sequence[GroupUnits],
    scores: Mapping[str, Tensor],
    gone: Mapping[str, Sequence[int]],
    due: Mapping[str, int],
    min_units: int,
) -> dict[str, list[int]]:
    """The lowest-scoring remaining units, a given number per kind; every group keeps `min_units`.

    Args:
        groups: all that may lose units.
        scores: group name → (n_units,); higher means keep.
        gone: group name → units that are not to be chosen again.
        due: kind → how many are wanted.
        min_units: units that every group keeps.

    Returns:
        Group name → ascending units, for groups that lose some.

    Raises:
        PrunekitError: scores that miss a group, are not finite or not one a unit.
    """
    left = {group.name: group.n_units - len(gone[group.name]) - min_units for group in groups}
    wanted, dead = dict(due), {name: set(units) for name, units in gone.items()}
    kinds = {group.name: group.kind for group in groups}
    ranked = sorted((s, g.name, u) for g in groups for u, s in enumerate(_finite(g, scores)) if u not in dead[g.name])
    taken: dict[str, list[int]] = {}
    for _, name, unit in ranked:
        if wanted.get(kinds[name], 0) > 0 and left[name] > 0:
            taken.setdefault(name, []).append(unit)
            left[name] -= 1
            wanted[kinds[name]] -= 1
    return {group.name: sorted(taken[group.name]) for group in groups if group.name in taken}


def _finite(group: GroupUnits, scores: Mapping[str, Tensor]) -> list[float]:
    found = scores.get(group.name)
    if found is None or found.shape != (group.n_units,) or not bool(found.isfinite().all()):
        given = "nothing" if found is None else f"{tuple(found.shape)}, not all finite or not one a unit"
        raise PrunekitError(f"saliency of {group.name!r} is {given}; give {group.n_units} finite numbers")
    return found.tolist()


def check_wanted(groups: Sequence[GroupUnits], n_units: Mapping[str, int], min_units: int) -> dict[str, int]:
    """Kind → number of units to remove, checked against the model.

    Raises:
        PrunekitError: more units than there are.
    """
    for kind, wanted in n_units.items():
        most = sum(max(0, group.n_units - min_units) for group in groups if group.kind == kind)
        if wanted > most:
            kinds = ", ".join(sorted({group.kind for group in groups}))
            raise PrunekitError(
                f"{wanted} units of kind {kind!r} are to go, but only {most} may: these groups are of kind "
                f"{kinds}, and each keeps {min_units}"
            )
    return dict(n_units)
