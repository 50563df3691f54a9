"""Assembles coupled groups from components: components with the same sites are units of one group."""

import hashlib
import os
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from prunekit.discovery.groups import CoupledGroup, Member
from prunekit.discovery.labels import FIRST, Ints, Sites

Flags = NDArray[np.bool_]
Parts = list[tuple[int, Ints]]  # site and positions along it


@dataclass(frozen=True, eq=False)
class Level:
    """Components at one level and what is known of each of them (arrays over components)."""

    label: Ints
    size: Ints
    held: Flags  # holds an index of a parameter
    locked: Flags
    ragged: Flags
    inexact: Flags
    open: Flags  # owns something outside, so it cannot go alone
    embedded: Flags
    nonlinear: Flags
    chosen: Flags
    vocabulary: Flags
    picked: Ints  # how many are chosen at once by value; 0 where nothing chooses from them

    @property
    def removable(self) -> Flags:
        """Components that may be removed alone."""
        return ~(self.locked | self.ragged | self.open)


def assemble(sites: Sites, levels: list[Level], number: int, usable: Flags) -> list[tuple[CoupledGroup, Ints]]:
    """The groups of one level, each with the nodes of its parameters.

    Args:
        sites: of the trace.
        levels: all that are known, the lowest first.
        number: which of them.
        usable: bool (n_components,), which may be units.
    """
    if not usable.any():
        return []
    label = sites.of_nodes(levels[number].label)
    private = _private(sites, label)
    found = _alike(sites, label, usable, _signatures(sites, label, private, len(usable)))
    numbers = np.empty(len(usable), np.int64)
    return [(_group(sites, levels, number, _marks(parts, private), numbers), _nodes(sites, parts)) for parts in found]


def _alike(sites: Sites, label: Ints, usable: Flags, signature: NDArray[np.uint64]) -> list[Parts]:
    """Positions of usable components, put together by signature."""
    found: dict[int, Parts] = {}
    for site, rows in enumerate(sites.slices):
        mine = label[rows]
        fit = usable[mine]
        if fit.any():
            keys, positions = signature[mine[fit]], np.flatnonzero(fit)
            one = (keys == keys[0]).all()
            for key in keys[:1] if one else np.unique(keys):
                found.setdefault(int(key), []).append((site, positions if one else positions[keys == key]))
    return list(found.values())


def _signatures(sites: Sites, label: Ints, private: set[int], n: int) -> NDArray[np.uint64]:
    """A number for each component's sites; what one holds whole counts only where it holds nothing else."""
    signature, codes = np.zeros(n, np.uint64), _random_codes(sites.names)
    for site, rows in enumerate(sites.slices):
        if site not in private:
            np.add.at(signature, label[rows], codes[site])
    shared = signature != 0
    for site in private:
        mine = label[sites.slices[site]]
        if not shared[mine[0]]:
            np.add.at(signature, mine, codes[site])
    return signature


def _random_codes(names: tuple[tuple[str, int], ...]) -> NDArray[np.uint64]:
    """A fixed 64-bit number per site, so that sums identify sets of sites."""
    digests = [hashlib.blake2b(f"{p}|{d}".encode(), digest_size=8).digest() for p, d in names]
    return np.frombuffer(b"".join(digests), np.uint64)


def _private(sites: Sites, label: Ints) -> set[int]:
    """Sites of parameters that one component holds whole, such as the norm of one head: not specific to a group."""
    whole: dict[str, int | None] = {}
    for (name, _), rows in zip(sites.names, sites.slices, strict=True):
        inside = label[rows]
        alone = len(inside) and inside[0] == inside[-1] and bool((inside == inside[0]).all())
        mine = int(inside[0]) if alone else None
        whole[name] = mine if whole.get(name, mine) == mine else None
    return {site for site, (name, _) in enumerate(sites.names) if whole[name] is not None}


def _marks(parts: Parts, private: set[int]) -> Parts:
    """The positions that every unit of a group has; what one unit holds whole goes with it all the same."""
    return [part for part in parts if part[0] not in private] or parts


def _nodes(sites: Sites, parts: Parts) -> Ints:
    return np.concatenate([FIRST + sites.slices[site].start + positions for site, positions in parts])


def _group(sites: Sites, levels: list[Level], number: int, parts: Parts, numbers: Ints) -> CoupledGroup:
    """The group of these positions; `numbers` has room for a number a component."""
    level, label = levels[number], sites.of_nodes(levels[number].label)
    units = _number_units(label[sites.slices[parts[0][0]]][parts[0][1]], numbers)
    members = []
    for site, positions in parts:
        unit = numbers[label[sites.slices[site]][positions]]
        if (unit[1:] < unit[:-1]).any():
            positions = positions[np.argsort(unit, kind="stable")]
        members.append(Member(*sites.names[site], torch.from_numpy(positions.reshape(len(units), -1))))
    kind = _kind(levels, number, sites.node_of(*parts[0]), members)
    exact, least = not level.inexact[units].any(), max(1, int(level.picked[units].max()))
    return CoupledGroup(f"{_prefix(members)}{kind}", kind, len(units), tuple(members), exact, least)


def _number_units(found: Ints, numbers: Ints) -> Ints:
    """Components in the order in which they stand in a site; every unit has every site, so one site is enough."""
    order = np.arange(len(found))
    numbers[found[::-1]] = order[::-1]  # of a component that stands there twice, the first
    units = found[numbers[found] == order]
    numbers[units] = np.arange(len(units))
    return units


def _kind(levels: list[Level], number: int, node: int, members: list[Member]) -> str:
    """The kind of a group, from how its channels are used, without names of models or modules."""
    if number == 2:
        return "kv_head"
    unit = levels[number].label[node]
    if number == 1 and len(levels) > 2:
        return "query_head" if levels[2].size[levels[2].label[node]] > levels[1].size[unit] else "kv_head"
    if levels[0].vocabulary[unit]:
        return "vocabulary"
    if levels[0].chosen[unit]:
        return "expert"
    if levels[0].embedded[unit] or len({_layer_of(m.parameter) for m in members}) > 1:
        return "hidden"
    return "ffn_channel" if levels[0].nonlinear[unit] else "rank"


def _layer_of(parameter: str) -> str | None:
    numbers = [i for i, part in enumerate(parameter.split(".")) if part.isdigit()]
    return ".".join(parameter.split(".")[: numbers[0] + 1]) if numbers else None


def _prefix(members: list[Member]) -> str:
    """Longest module path that holds all members, with a colon."""
    paths = [m.parameter.split(".")[:-1] for m in members]
    common = os.path.commonprefix(paths)
    return ".".join(common) + ":" if common else ""


def unique_names(groups: list[CoupledGroup]) -> list[CoupledGroup]:
    """The groups, numbered if several share a name."""
    seen: dict[str, int] = {}
    out = []
    for g in groups:
        seen[g.name] = seen.get(g.name, 0) + 1
        name = g.name if seen[g.name] == 1 else f"{g.name}#{seen[g.name]}"
        out.append(replace(g, name=name))
    return out
