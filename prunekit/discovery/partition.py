"""From the labels of a trace to coupled groups: connected components, level by level.

A head has the size of its siblings, so a head dimension can go only from all heads of a layer. Queries and keys meet
position by position in their scores, and rotary embedding turns positions in pairs; values have positions of their
own, but where a module keeps one number for both sizes, both must change alike.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from itertools import chain, pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from prunekit.discovery.assembly import Flags, Level, assemble, unique_names
from prunekit.discovery.groups import CoupledGroup, Groups
from prunekit.discovery.integer_positions import Span
from prunekit.discovery.labelling import Trace
from prunekit.discovery.labels import (
    CONSTANT,
    LOCKED,
    STATISTIC,
    Ints,
    LabelGraph,
    Owners,
    Sites,
    by_owner,
    joined,
    levels,
    merge,
    pairs,
)
from prunekit.discovery.parts import depth_groups
from prunekit.discovery.stored_integers import Attribute, Operation


def _ragged(trace: Trace, label: Ints) -> Ints:
    """Components that fill whole slabs of some plane along no dimension, so that it could not stay a rectangle."""
    stacks: dict[tuple[int, ...], list[Ints]] = {}
    for plane in trace.rectangles.values():
        stacks.setdefault(tuple(plane.shape), []).append(plane.numpy())
    return joined(part for planes in stacks.values() for part in _tangled(label[np.stack(planes)]))


def _tangled(marks: Ints) -> Iterator[Ints]:
    """The same for planes of one shape, (n_planes, *shape)."""
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
class _Noted:
    """Flat arrays of a trace's notes on its nodes.

    Attributes:
        trace: the same, as it was noted.
        owns: owners and members of all relations.
        counts: statistics and the nodes that they are computed over.
        marks: field name of `Level` → its nodes.
    """

    trace: Trace
    owns: tuple[Ints, Ints]
    counts: tuple[Ints, Ints]
    marks: dict[str, Ints]

    @classmethod
    def of(cls, trace: Trace) -> "_Noted":
        graph = trace.graph
        locked = [labels for labels, _ in graph.locks] + [torch.tensor([CONSTANT, LOCKED])]
        marks = {name: getattr(graph, name) for name in ("embedded", "nonlinear", "chosen", "vocabulary")}
        flat = {name: joined(plane.numpy() for plane in planes) for name, planes in marks.items()}
        real = {name: nodes[nodes > LOCKED] for name, nodes in flat.items()}
        every = pairs(chain.from_iterable(graph.owns.values()))
        return cls(trace, every, pairs(graph.owns[STATISTIC]), real | {"locked": joined(t.numpy() for t in locked)})


def _level(noted: _Noted, sites: Sites, label: Ints) -> Level:
    size = np.bincount(label)

    def flags(found: Ints) -> Flags:
        out = np.zeros(len(size), np.bool_)
        out[found] = True
        return out

    picked = np.zeros(len(size), np.int64)
    for labels, n in noted.trace.graph.picks:
        np.maximum.at(picked, label[labels.numpy()], n)
    statistic, counted = (label[nodes] for nodes in noted.counts)
    owner, member = (label[nodes] for nodes in noted.owns)
    return Level(
        label,
        size,
        held=flags(sites.of_nodes(label)),
        ragged=flags(_ragged(noted.trace, label)),
        inexact=flags(counted[statistic != counted]),
        open=flags(owner[owner != member]),
        picked=picked,
        **{name: flags(label[nodes]) for name, nodes in noted.marks.items()},
    )


def find_groups(trace: Trace) -> Groups:
    """Coupled groups of a traced model, and what was locked and why."""
    sites, noted = Sites.of(trace), _Noted.of(trace)
    owners = by_owner(*noted.owns)
    known = [_level(noted, sites, label) for label in levels(trace.graph, owners=owners)]
    found = assemble(sites, known, 0, _fresh(sites, known[0]))
    for number, (below, level) in enumerate(pairwise(known), 1):
        # what all hidden channels together own could only go with all of them
        found += assemble(sites, known, number, _fresh(sites, below, level) & ~level.embedded)
    found += _head_dims(noted, sites, known, owners)
    items = unique_names([g for g, _ in sorted(found, key=lambda item: item[1][0])])
    items += depth_groups(trace, known[0].embedded[known[0].label])
    covered = np.zeros(trace.graph.n_nodes, np.bool_)
    for _, nodes in found:
        covered[nodes] = True
    return Groups(tuple(items), trace.shapes, *_explain(trace, sites, known, covered))


def _head_dims(noted: _Noted, sites: Sites, known: list[Level], owners: Owners) -> list[tuple[CoupledGroup, Ints]]:
    """Groups of positions that all heads of a layer share."""
    label = known[0].label
    for alike in (scored_alike, sized_alike):
        label = merge(label, *alike(noted.trace, label), owners)
    level = _level(noted, sites, label)
    groups = assemble(sites, [known[0], level], 1, _fresh(sites, known[0], level) & ~level.embedded)
    return [(replace(g, kind="head_dim", name=g.name.replace(g.kind, "head_dim")), nodes) for g, nodes in groups]


def _fresh(sites: Sites, *levels: Level) -> Flags:
    """Components of the last level that may be units and are new at this level."""
    level = levels[-1]
    fresh = level.held & level.removable & ((level.size > 1) | level.vocabulary)  # one lone node touches nothing
    for below in levels[:-1]:
        above = np.zeros(len(below.held), np.int64)
        above[sites.of_nodes(below.label)] = sites.of_nodes(level.label)
        fresh &= np.bincount(above[below.held], minlength=len(fresh)) > 1
    return fresh


def _explain(
    trace: Trace, sites: Sites, levels: list[Level], covered: NDArray[np.bool_]
) -> tuple[dict[str, str], dict[str, str]]:
    """Reason for every parameter dimension no group covers whole, and the first of these of each kind."""
    label = levels[-1].label
    reason_of = np.full(len(levels[-1].size), -1)
    for number, (labels, _) in reversed(list(enumerate(trace.graph.locks))):
        reason_of[label[labels.numpy()]] = number  # the first one stays
    locked: dict[str, str] = {}
    kinds: dict[str, str] = {}
    for site, (parameter, dim) in enumerate(sites.names):
        left = np.flatnonzero(~sites.of_nodes(covered)[sites.slices[site]])
        if not len(left):
            continue
        node = sites.node_of(site, left)
        number = reason_of[label[node]]
        why = trace.graph.locks[number][1] if number >= 0 else _shape_reason(levels, node)
        place = f"{parameter}[dim {dim}]"
        locked[place] = why
        unit = levels[0].label[node]
        for kind, marks in (("expert", levels[0].picked), ("hidden", levels[0].embedded)):
            if marks[unit]:
                kinds.setdefault(kind, place)
    return locked, kinds


def _shape_reason(levels: list[Level], node: int) -> str:
    if levels[0].open[levels[0].label[node]]:
        return "every unit of a group shares it, so it stays while one of them does"
    if levels[0].ragged[levels[0].label[node]]:
        return "removing one channel alone would leave a tensor without a rectangular shape"
    return "takes no part in what reaches the output"


# --- head dimensions ----------------------------------------------------------------------------

Pairs = tuple[Ints, Ints]


def scored_alike(trace: Trace, label: Ints) -> Pairs:
    """Pairs of components that hold the same position of heads, for queries and keys, and for values.

    Args:
        trace: of the model.
        label: component of every node, channel for channel.
    """
    found = [label[slab] for slab in _slabs(trace.graph)]  # (heads, positions) each
    return pairs((slab[1:], np.broadcast_to(slab[0], slab[1:].shape)) for slab in found)


def _slabs(graph: LabelGraph) -> list[Ints]:
    """(heads, positions) of the channels that scores own."""
    found = []
    for owner, member in graph.slabs:
        heads = [d for d, step in enumerate(owner.stride()) if step and owner.shape[d] > 1]
        positions = [d for d, n in enumerate(member.shape) if n > 1 and d not in heads]
        if heads and positions:
            plane = member.permute(*heads, *positions, *(d for d in range(member.dim()) if member.shape[d] == 1))
            n_heads = int(np.prod([member.shape[d] for d in heads]))
            found.append(plane.reshape(n_heads, -1).numpy())
    return found


def sized_alike(trace: Trace, label: Ints) -> Pairs:
    """Pairs of components at the same position of dimensions whose size is the same stored integer.

    Args:
        trace: of the model.
        label: component of every node, with the positions of heads joined.
    """
    inside = np.zeros(int(label.max()) + 1, np.bool_)
    for slab in _slabs(trace.graph):
        inside[label[slab]] = True
    first: dict[Attribute | Operation, Ints] = {}
    edges = []
    for equation in trace.equations:
        positions = _positions(equation.span, label)
        if positions is None or not inside[positions].all():
            continue
        number, times = _factors(equation.expression)
        for part in np.split(positions, times) if len(positions) % times == 0 else ():
            lead = first.setdefault(number, part)
            if len(lead) == len(part):
                edges.append((part, lead))
    return pairs(edges)


def _factors(expression: Attribute | Operation) -> tuple[Attribute | Operation, int]:
    """A stored integer and its multiple, as in 3 · head_size for queries, keys and values."""
    if isinstance(expression, Operation) and expression.function is operator.mul:
        sides = (expression.left, expression.right)
        for side, other in (sides, sides[::-1]):
            if isinstance(side, int) and not isinstance(other, int):
                return other, side
    return expression, 1


def _positions(span: Span, label: Ints) -> Ints | None:
    """The component at every position along a span, where each position has one and they are not all the same."""
    if len(span.planes) != 1 or span.stop is not None or not span.planes[0].numel():
        return None
    plane = np.moveaxis(span.planes[0].numpy(), span.dim, 0)
    found = label[plane.reshape(len(plane), -1)]
    alike = (found == found[:, :1]).all() and (plane > LOCKED).all() and len(found) > 1
    return found[:, 0] if alike and (found[:, 0] != found[0, 0]).any() else None
