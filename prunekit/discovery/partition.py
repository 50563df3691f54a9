"""From the labels of a trace to coupled groups: connected components, level by level."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prunekit.discovery.components import Owners, Sites, joined, levels, merge, owners_of, pairs
from prunekit.discovery.depth import depth_groups
from prunekit.discovery.groups import CoupledGroup, Groups, Member
from prunekit.discovery.labelling import Trace
from prunekit.discovery.labels import CONSTANT, LOCKED, STATISTIC, Ints
from prunekit.discovery.positions import scored_alike, sized_alike


def _ragged(trace: Trace, label: Ints) -> Ints:
    """Components that fill whole slabs of some plane along no dimension, so that it could not stay a rectangle."""
    stacks: dict[tuple[int, ...], list[Ints]] = {}
    for plane in trace.rectangles.values():
        stacks.setdefault(tuple(plane.shape), []).append(plane.numpy())
    return joined(part for planes in stacks.values() for part in _tangled(label[np.stack(planes)]))


def _tangled(marks: Ints) -> Iterator[Ints]:
    """The same for planes of one shape, marks (n_planes, *shape)."""
    mixed = [_mixed(marks, d) for d in range(1, marks.ndim)]
    some, every = (np.all([test(slabs, 1) for slabs in mixed], 0) for test in (np.any, np.all))
    yield marks[every]
    for i in np.flatnonzero(some & ~every):
        yield reduce(np.intersect1d, [marks[i].compress(slabs[i], d) for d, slabs in enumerate(mixed)])


def _mixed(marks: Ints, dim: int) -> NDArray[np.bool_]:
    """Which slabs along a dimension hold more than one component, (n_planes, n_slabs)."""
    slabs = np.moveaxis(marks, dim, 1).reshape(*marks.shape[:1], marks.shape[dim], -1)
    return (slabs != slabs[..., :1]).any(-1)


@dataclass(frozen=True, eq=False)
class _Level:
    """Components at one level and what is known of each of them (arrays over components)."""

    label: Ints
    size: Ints
    locked: NDArray[np.bool_]
    ragged: NDArray[np.bool_]
    inexact: NDArray[np.bool_]
    open: NDArray[np.bool_]  # owns something outside, so it cannot go alone
    embedded: NDArray[np.bool_]
    nonlinear: NDArray[np.bool_]
    chosen: NDArray[np.bool_]
    vocabulary: NDArray[np.bool_]


def _level(trace: Trace, label: Ints) -> _Level:
    graph, size = trace.graph, np.bincount(label)

    def flags(found: Ints) -> NDArray[np.bool_]:
        out = np.zeros(len(size), np.bool_)
        out[found] = True
        return out

    def marked(planes: list[torch.Tensor]) -> NDArray[np.bool_]:
        nodes = joined(plane.numpy() for plane in planes)
        return flags(label[nodes[nodes > LOCKED]])

    statistic, counted = (label[nodes] for nodes in pairs(graph.owns[STATISTIC]))
    owner, member = (label[nodes] for nodes in pairs(chain.from_iterable(graph.owns.values())))
    return _Level(
        label,
        size,
        locked=marked([labels for labels, _ in graph.locks]) | flags(label[[CONSTANT, LOCKED]]),
        ragged=flags(_ragged(trace, label)),
        inexact=flags(counted[statistic != counted]),
        open=flags(owner[owner != member]),
        embedded=marked(graph.embedded),
        nonlinear=marked(graph.nonlinear),
        chosen=marked(graph.chosen),
        vocabulary=marked(graph.vocabulary),
    )


def _random_codes(names: tuple[tuple[str, int], ...]) -> NDArray[np.uint64]:
    """One fixed 64-bit number a site; sums of them tell sets of sites apart."""
    digests = [hashlib.blake2b(f"{p}|{d}".encode(), digest_size=8).digest() for p, d in names]
    return np.frombuffer(b"".join(digests), np.uint64)


def find_groups(trace: Trace) -> Groups:
    """Coupled groups of a traced model, and what was locked and why."""
    sites = Sites.of(trace)
    owners = owners_of(trace.graph)
    known = [_level(trace, label) for label in levels(trace.graph, owners=owners)]
    found: list[tuple[CoupledGroup, Ints]] = []
    for number, level in enumerate(known):
        usable = _fresh(known, number, sites) & ~level.locked & ~level.ragged & ~level.open
        if number:  # owned by all hidden channels together, it could only go with all of them
            usable &= ~level.embedded
        found += _assemble(sites, known, number, usable)
    found += _head_dims(trace, sites, known, owners)
    items = _unique_names([g for g, _ in sorted(found, key=lambda item: item[1][0])])
    hidden = set(np.flatnonzero(known[0].embedded[known[0].label]).tolist())
    items += depth_groups(trace, hidden)
    covered = np.zeros(trace.graph.n_nodes, np.bool_)
    for _, nodes in found:
        covered[nodes] = True
    return Groups(tuple(items), trace.shapes, _explain(trace, sites, known, covered))


def _head_dims(trace: Trace, sites: Sites, known: list[_Level], owners: Owners) -> list[tuple[CoupledGroup, Ints]]:
    """Groups of positions that all heads of a layer share."""
    label = known[0].label
    for alike in (scored_alike, sized_alike):
        label = merge(label, *alike(trace, label), owners)
    level = _level(trace, label)
    usable = _fresh([known[0], level], 1, sites) & ~level.locked & ~level.ragged & ~level.open & ~level.embedded
    groups = _assemble(sites, [known[0], level], 1, usable)
    return [(replace(g, kind="head_dim", name=g.name.replace(g.kind, "head_dim")), nodes) for g, nodes in groups]


def _fresh(levels: list[_Level], number: int, sites: Sites) -> NDArray[np.bool_]:
    """Components that hold a parameter and did not stand at a lower level already."""
    label, size = levels[number].label[sites.node], levels[number].size
    fresh = np.zeros(len(size), np.bool_)
    fresh[label] = True
    if number:
        below = levels[number - 1].label[sites.node]
        first = np.full(len(fresh), -1, np.int64)
        first[label] = below
        merged = np.zeros(len(fresh), np.bool_)
        merged[label[below != first[label]]] = True
        fresh &= merged
    return fresh & ((size > 1) | levels[number].vocabulary)  # one lone node touches nothing, but for tied embeddings


def _assemble(
    sites: Sites, levels: list[_Level], number: int, usable: NDArray[np.bool_]
) -> list[tuple[CoupledGroup, Ints]]:
    """Components with the same sites are the units of one group."""
    label = levels[number].label[sites.node]
    rows = np.flatnonzero(usable[label])
    signature = np.zeros(len(usable), np.uint64)
    private = _private(sites, label)
    shared = rows[~private[rows]]
    np.add.at(signature, label[shared], _random_codes(sites.names)[sites.site[shared]])
    alone = rows[signature[label[rows]] == 0]
    np.add.at(signature, label[alone], _random_codes(sites.names)[sites.site[alone]])
    codes = signature[label[rows]]
    order = np.argsort(codes, kind="stable")  # rows of a group stay in their order
    numbers = np.empty(len(usable), np.int64)
    parts = _runs(rows[order], codes[order])
    return [(_group(sites, levels, number, _marks(part, private), numbers), sites.node[part]) for part in parts]


def _marks(rows: Ints, private: NDArray[np.bool_]) -> Ints:
    """The rows that every unit of a group has; what one unit holds whole goes with it all the same."""
    return rows if private[rows].all() else rows[~private[rows]]


def _private(sites: Sites, label: Ints) -> NDArray[np.bool_]:
    """Rows of parameters that one component holds whole, such as the norm of one head: no mark of a group."""
    private = np.zeros(len(label), np.bool_)
    for rows in sites.of_parameters():
        inside = label[rows]
        private[rows] = inside[0] == inside[-1] and bool((inside == inside[0]).all())
    return private


def _runs(values: Ints, keys: NDArray[Any]) -> list[Ints]:
    """The values cut where their keys change."""
    return np.split(values, np.flatnonzero(keys[1:] != keys[:-1]) + 1) if len(values) else []


def _group(sites: Sites, levels: list[_Level], number: int, rows: Ints, numbers: Ints) -> CoupledGroup:
    """The group of these rows; `numbers` has room for a number a component."""
    level, members, runs = levels[number], [], _runs(rows, sites.site[rows])
    # every unit has every site, so they are numbered as they stand in the first
    units = np.array(list(dict.fromkeys(level.label[sites.node[runs[0]]].tolist())))
    numbers[units] = np.arange(len(units))
    for mine in runs:
        unit = numbers[level.label[sites.node[mine]]]
        index = sites.index[mine[np.argsort(unit, kind="stable")]]
        parameter, dim = sites.names[sites.site[mine[0]]]
        members.append(Member(parameter, dim, torch.from_numpy(index.reshape(len(units), -1))))
    kind = _kind(levels, number, sites.node[rows[0]], members)
    return CoupledGroup(f"{_prefix(members)}{kind}", kind, len(units), tuple(members), not level.inexact[units].any())


def _kind(levels: list[_Level], number: int, node: int, members: list[Member]) -> str:
    """What a group is, read off how its channels are used; no names of models or modules."""
    if number == 2:
        return "kv_head"
    unit = levels[number].label[node]
    if number == 1 and len(levels) > 2:
        return "query_head" if levels[2].size[levels[2].label[node]] > levels[1].size[unit] else "kv_head"
    if levels[0].vocabulary[unit]:
        return "vocabulary"
    if levels[0].chosen[unit]:
        return "expert"
    if levels[0].embedded[unit] or _spans_layers(members):
        return "hidden"
    return "ffn_channel" if levels[0].nonlinear[unit] else "rank"


def _layer_of(parameter: str) -> str | None:
    numbers = [i for i, part in enumerate(parameter.split(".")) if part.isdigit()]
    return ".".join(parameter.split(".")[: numbers[0] + 1]) if numbers else None


def _spans_layers(members: list[Member]) -> bool:
    return len({_layer_of(m.parameter) for m in members}) > 1


def _prefix(members: list[Member]) -> str:
    """Longest module path that holds all members, with a colon."""
    paths = [m.parameter.split(".")[:-1] for m in members]
    common = os.path.commonprefix(paths)
    return ".".join(common) + ":" if common else ""


def _unique_names(groups: list[CoupledGroup]) -> list[CoupledGroup]:
    seen: dict[str, int] = {}
    out = []
    for g in groups:
        seen[g.name] = seen.get(g.name, 0) + 1
        name = g.name if seen[g.name] == 1 else f"{g.name}#{seen[g.name]}"
        out.append(CoupledGroup(name, g.kind, g.n_units, g.members, g.exact))
    return out


def _explain(trace: Trace, sites: Sites, levels: list[_Level], covered: NDArray[np.bool_]) -> dict[str, str]:
    """Reason for every parameter dimension no group covers whole."""
    label = levels[-1].label
    reason_of = np.full(len(levels[-1].size), -1)
    for number, (labels, _) in reversed(list(enumerate(trace.graph.locks))):
        reason_of[label[labels.numpy()]] = number  # the first one stays
    locked: dict[str, str] = {}
    left = np.flatnonzero(~covered[sites.node])
    for row in left[np.unique(sites.site[left], return_index=True)[1]].tolist():
        parameter, dim = sites.names[sites.site[row]]
        number, node = reason_of[label[sites.node[row]]], sites.node[row]
        why = trace.graph.locks[number][1] if number >= 0 else _shape_reason(levels, node)
        locked[f"{parameter}[dim {dim}]"] = why
    return locked


def _shape_reason(levels: list[_Level], node: int) -> str:
    if levels[0].open[levels[0].label[node]]:
        return "every unit of a group shares it, so it stays while one of them does"
    if levels[0].ragged[levels[0].label[node]]:
        return "removing one channel alone would leave a tensor without a rectangular shape"
    return "takes no part in what reaches the output"
