"""From the labels of a trace to coupled groups: connected components, level by level."""

import hashlib
import os
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from prunekit.discovery.groups import CoupledGroup, Groups, Member
from prunekit.discovery.labels import ACTIVATION, LOCKED, SCORE, STATISTIC, LabelGraph
from prunekit.discovery.tracing import Trace

Ints = NDArray[np.int64]

# Channels; then what a score owns (query heads); then what an expanded activation owns (KV groups).
LEVELS: tuple[tuple[str, ...], ...] = ((), (SCORE,), (SCORE, ACTIVATION))


@dataclass(frozen=True, eq=False)
class Sites:
    """Every index of every parameter dimension, in the order of `named_parameters()`.

    Attributes:
        names: (parameter, dim) of each site.
        node: node of each index.
        site: site number of each index.
        index: position along the dimension.
    """

    names: tuple[tuple[str, int], ...]
    node: Ints
    site: Ints
    index: Ints

    @classmethod
    def of(cls, trace: Trace) -> "Sites":
        """Lay out the sites of a trace."""
        spans = list(trace.offsets.items())
        sizes = [size for _, (_, size) in spans]
        return cls(
            names=tuple(name for name, _ in spans),
            node=np.concatenate([np.arange(start, start + size) for _, (start, size) in spans]),
            site=np.repeat(np.arange(len(spans)), sizes),
            index=np.concatenate([np.arange(size) for size in sizes]),
        )


def _pairs(edges: list[tuple[Ints, Ints]]) -> tuple[Ints, Ints]:
    if not edges:
        empty = np.zeros(0, np.int64)
        return empty, empty
    a, b = (np.concatenate([edge[i] for edge in edges]) for i in (0, 1))
    return a, b


def components(graph: LabelGraph, merging: tuple[str, ...], dead: NDArray[np.bool_] | None = None) -> Ints:
    """Component of every node under SAME and the OWNS relations named in `merging`.

    An owner whose members all lie in one component joins it, whatever its kind: it dies exactly
    when they do.

    Args:
        graph: nodes and relations.
        merging: kinds of OWNS that join owner and members.
        dead: bool (n_nodes,), nodes to leave out with all their relations.
    """

    def pairs(edges: list[tuple[Ints, Ints]]) -> tuple[Ints, Ints]:
        a, b = _pairs(edges)
        return (a, b) if dead is None else (a[~dead[a] & ~dead[b]], b[~dead[a] & ~dead[b]])

    same = pairs(graph.same)
    owns = pairs([edge for kind in graph.owns for edge in graph.owns[kind]])
    merged = pairs([edge for kind in merging for edge in graph.owns[kind]])
    a, b = np.concatenate([same[0], merged[0]]), np.concatenate([same[1], merged[1]])
    while True:
        label = _connect(a, b, graph.n_nodes)
        extra = _settled_owners(label, *owns)
        if not len(extra[0]):
            return label
        a, b = np.concatenate([a, extra[0]]), np.concatenate([b, extra[1]])


def _connect(a: Ints, b: Ints, n: int) -> Ints:
    matrix = coo_matrix((np.ones(len(a), np.bool_), (a, b)), shape=(n, n))
    return connected_components(matrix, directed=False)[1].astype(np.int64)


def _settled_owners(label: Ints, owner: Ints, member: Ints) -> tuple[Ints, Ints]:
    """(owner, member) pairs for owners whose members share a component that they are not yet in."""
    if not len(owner):
        return owner, member
    order = np.argsort(owner, kind="stable")
    owner, member = owner[order], member[order]
    starts = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]])
    low, high = (f.reduceat(label[member], starts) for f in (np.minimum, np.maximum))
    news = (low == high) & (low != label[owner[starts]])
    return owner[starts][news], member[starts][news]


def _ragged(trace: Trace, label: Ints) -> Ints:
    """Components whose removal would leave some tensor without a rectangular shape."""
    bad: set[int] = set()
    for plane in trace.rectangles:
        marks = label[plane.numpy()]
        per_dim = [_not_slabs(marks, d) for d in range(marks.ndim) if marks.shape[d] > 1]
        bad |= set.intersection(*per_dim)
    return np.array(sorted(bad), np.int64)


def _not_slabs(marks: Ints, dim: int) -> set[int]:
    rows = np.moveaxis(marks, dim, 0).reshape(marks.shape[dim], -1)
    mixed = rows.min(1) != rows.max(1)
    return set(np.unique(rows[mixed]).tolist())


def spread_death(graph: LabelGraph, dead: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Every node that dies with these: what is SAME with them, and owners all of whose members die."""
    label = components(graph, ())
    owner, member = _pairs([edge for kind in graph.owns for edge in graph.owns[kind]])
    dying = np.zeros(int(label.max()) + 1, np.bool_)
    while True:
        dying[label[dead]] = True
        spread = dying[label]
        bereft = np.zeros(len(label), np.bool_)
        bereft[owner] = True
        bereft[owner[~spread[member]]] = False
        if not (bereft & ~spread).any():
            return spread
        dead = spread | bereft


@dataclass(frozen=True, eq=False)
class _Level:
    """Components at one level and what is known of each of them (arrays over components)."""

    label: Ints
    locked: NDArray[np.bool_]
    ragged: NDArray[np.bool_]
    inexact: NDArray[np.bool_]
    open: NDArray[np.bool_]  # owns something outside, so it cannot go alone


def _level(trace: Trace, merging: tuple[str, ...]) -> _Level:
    label = components(trace.graph, merging)
    n = int(label.max()) + 1

    def flags(found: Ints) -> NDArray[np.bool_]:
        out = np.zeros(n, np.bool_)
        out[found] = True
        return out

    locks = [labels.numpy() for labels, _ in trace.graph.locks]
    owner, member = _pairs(trace.graph.owns[STATISTIC])
    spanning = label[member][label[owner] != label[member]]
    owner, member = _pairs([edge for kind in trace.graph.owns for edge in trace.graph.owns[kind]])
    return _Level(
        label,
        locked=flags(label[np.concatenate([*locks, np.array([0, LOCKED])])]),
        ragged=flags(_ragged(trace, label)),
        inexact=flags(spanning),
        open=flags(label[owner][label[owner] != label[member]]),
    )


def _random_codes(names: tuple[tuple[str, int], ...]) -> NDArray[np.uint64]:
    """One fixed 64-bit number a site; sums of them tell sets of sites apart."""
    digests = [hashlib.blake2b(f"{p}|{d}".encode(), digest_size=8).digest() for p, d in names]
    return np.frombuffer(b"".join(digests), np.uint64)


def find_groups(trace: Trace) -> Groups:
    """Coupled groups of a traced model, and what was locked and why."""
    sites = Sites.of(trace)
    levels = [_level(trace, merging) for merging in LEVELS]
    found: list[tuple[str, CoupledGroup, Ints]] = []
    for number, level in enumerate(levels):
        fresh = _fresh(levels, number, sites)
        usable = fresh & ~level.locked & ~level.ragged & ~level.open
        found += [(g.name, g, nodes) for g, nodes in _assemble(trace, sites, levels, number, usable)]
    items = _unique_names([g for _, g, _ in sorted(found, key=lambda f: f[2][0])])
    covered = np.zeros(trace.graph.n_nodes, np.bool_)
    for _, _, nodes in found:
        covered[nodes] = True
    return Groups(tuple(items), trace.shapes, _explain(trace, sites, levels, covered))


def _fresh(levels: list[_Level], number: int, sites: Sites) -> NDArray[np.bool_]:
    """Components that hold a parameter and did not stand at a lower level already."""
    label = levels[number].label
    fresh = np.zeros(int(label.max()) + 1, np.bool_)
    fresh[label[sites.node]] = True
    if number:
        below = levels[number - 1].label[sites.node]
        first = np.full(len(fresh), -1, np.int64)
        first[label[sites.node]] = below
        merged = np.zeros(len(fresh), np.bool_)
        merged[label[sites.node][below != first[label[sites.node]]]] = True
        fresh &= merged
    return fresh & (np.bincount(label, minlength=len(fresh)) > 1)  # one lone node touches nothing


def _assemble(
    trace: Trace, sites: Sites, levels: list[_Level], number: int, usable: NDArray[np.bool_]
) -> list[tuple[CoupledGroup, Ints]]:
    """Components with the same sites are the units of one group."""
    label = levels[number].label[sites.node]
    rows = np.flatnonzero(usable[label])
    if not len(rows):
        return []
    signature = np.zeros(len(usable), np.uint64)
    np.add.at(signature, label[rows], _random_codes(sites.names)[sites.site[rows]])
    order = np.argsort(signature[label[rows]], kind="stable")
    rows = rows[order]
    cuts = np.flatnonzero(np.diff(signature[label[rows]])) + 1
    parts = [np.sort(part) for part in np.split(rows, cuts)]
    return [(_group(trace, sites, levels, number, part), sites.node[part]) for part in parts]


def _group(trace: Trace, sites: Sites, levels: list[_Level], number: int, rows: Ints) -> CoupledGroup:
    unit_of = levels[number].label[sites.node[rows]]
    first = {unit: i for i, unit in enumerate(dict.fromkeys(unit_of.tolist()))}
    unit = np.array([first[u] for u in unit_of.tolist()])
    members = []
    for site in dict.fromkeys(sites.site[rows].tolist()):
        mine = sites.site[rows] == site
        order = np.lexsort((sites.index[rows][mine], unit[mine]))
        index = sites.index[rows][mine][order].reshape(len(first), -1)
        parameter, dim = sites.names[site]
        members.append(Member(parameter, dim, torch.from_numpy(index)))
    kind = _kind(trace, levels, number, unit_of[:1], members)
    exact = not levels[number].inexact[unit_of].any()
    return CoupledGroup(f"{_prefix(members)}{kind}", kind, len(first), tuple(members), exact)


def _kind(trace: Trace, levels: list[_Level], number: int, unit: Ints, members: list[Member]) -> str:
    """What a group is, read off how its channels are used; no names of models or modules."""
    if number == 2:
        return "kv_head"
    if number == 1:
        inside = np.flatnonzero(levels[1].label == unit[0])
        return (
            "query_head"
            if len(np.flatnonzero(levels[2].label == levels[2].label[inside[0]])) > len(inside)
            else ("kv_head")
        )
    if _touches(trace.graph.embedded, levels[0], unit) or _spans_layers(members):
        return "hidden"
    return "ffn_channel" if _touches(trace.graph.nonlinear, levels[0], unit) else "rank"


def _touches(marked: list[torch.Tensor], level: _Level, unit: Ints) -> bool:
    if not marked:
        return False
    nodes = torch.cat(marked).numpy()
    return bool((level.label[nodes[nodes > LOCKED]] == unit[0]).any())


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
    reason_of: dict[int, str] = {}
    for labels, reason in trace.graph.locks:
        for component in np.unique(levels[-1].label[labels.numpy()]).tolist():
            reason_of.setdefault(component, reason)
    locked: dict[str, str] = {}
    left = np.flatnonzero(~covered[sites.node])
    for row in left[np.unique(sites.site[left], return_index=True)[1]].tolist():
        parameter, dim = sites.names[sites.site[row]]
        component = int(levels[-1].label[sites.node[row]])
        why = reason_of.get(component, _shape_reason(levels, sites.node[row]))
        locked[f"{parameter}[dim {dim}]"] = why
    return locked


def _shape_reason(levels: list[_Level], node: int) -> str:
    if levels[0].open[levels[0].label[node]]:
        return "every unit of a group shares it, so it stays while one of them does"
    if levels[0].ragged[levels[0].label[node]]:
        return "removing one channel alone would leave a tensor without a rectangular shape"
    return "takes no part in what reaches the output"
