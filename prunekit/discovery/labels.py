"""The graph of labels that a trace writes, one node a channel, and its connected components, level by level."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

if TYPE_CHECKING:
    from prunekit.discovery.labelling import Trace

Ints = NDArray[np.int64]

CONSTANT = 0
LOCKED = 1
FIRST = 2  # kinds of nodes that are channels

# Who owns copies: a score owns the channels it weighs, an expanded activation its copies, a parameter its
# uses, a statistic what it was taken over. Only the first two ever merge into one unit.
SCORE, ACTIVATION, PARAMETER, STATISTIC = "score", "activation", "parameter", "statistic"
ARGUMENT = "argument"  # made the nodes of a constant that is passed to a module


class LabelGraph:
    """Nodes are channels; SAME joins two that are removed together; an owner (OWNS) goes with all it owns.

    Node 0 means "constant", node 1 "not understood"; neither is joined to another node.
    """

    def __init__(self) -> None:
        self.n_nodes = FIRST
        self.same: list[tuple[Ints, Ints]] = []
        self.owns: dict[str, list[tuple[Ints, Ints]]] = {kind: [] for kind in (SCORE, ACTIVATION, PARAMETER, STATISTIC)}
        self.locks: list[tuple[Tensor, str]] = []
        self.nonlinear: list[Tensor] = []
        self.embedded: list[Tensor] = []
        self.chosen: list[Tensor] = []
        self.picks: list[tuple[Tensor, int]] = []  # what is chosen from, and how many at once
        self.vocabulary: list[Tensor] = []
        self.roles = np.zeros(0, np.uint64)  # a bit for each operation that a node took part in, by its number
        self.n_operations = 0
        self.slabs: list[tuple[Tensor, Tensor]] = []  # what scores own, in its shape
        self._ends: list[int] = []  # of the ranges of nodes that were made together
        self._kinds: list[str] = []

    def new(self, shape: tuple[int, ...], kind: str) -> Tensor:
        """Fresh nodes of a shape, int64; `kind` says what their copies are owned by."""
        start = self.n_nodes
        self.n_nodes += math.prod(shape)
        self._ends.append(self.n_nodes)
        self._kinds.append(kind)
        return torch.from_numpy(np.arange(start, self.n_nodes).reshape(shape))

    def kind_of(self, labels: Tensor) -> str | None:
        """The kind of these nodes, from the first channel among them."""
        plane = labels.numpy()
        found = plane[plane > LOCKED]
        return self._kinds[bisect_right(self._ends, found[0])] if found.size else None

    def unify(self, a: Tensor, b: Tensor) -> None:
        """SAME between two planes of one shape; channels that meet a constant or unknown node are locked."""
        left, right = a.numpy().ravel(), b.numpy().ravel()
        known = (left > LOCKED) & (right > LOCKED)
        if known.all():
            self.same.append((left, right))
            return
        self.same.append((left[known], right[known]))
        met = torch.from_numpy(np.concatenate([left[~known], right[~known]]))
        self.lock(met, "meets a constant, or a channel that is not understood, in a sum or product")

    def own(self, kind: str, owner: Tensor, member: Tensor) -> None:
        """OWNS between two planes of one shape."""
        owners, members = owner.numpy().ravel(), member.numpy().ravel()
        known = owners > LOCKED
        if known.all():
            self.owns[kind].append((owners, members))
            if kind == SCORE:
                self.slabs.append((owner, member))
            return
        self.owns[kind].append((owners[known], members[known]))
        self.lock(torch.from_numpy(members[owners == LOCKED]), "is a copy of a channel that is not understood")

    def copies(self, labels: Tensor, shape: tuple[int, ...], parameter: bool) -> Tensor:
        """Fresh nodes of `shape`, each owned by the label that `labels` (broadcastable) has there."""
        kind = self.kind_of(labels)
        if kind is None:
            return labels.expand(shape)
        fixed = parameter or kind == ARGUMENT
        owner_kind = kind if kind in (SCORE, STATISTIC) else PARAMETER if fixed else ACTIVATION
        fresh = self.new(shape, kind)
        owners = labels.expand(shape)
        self.own(owner_kind, owners, fresh)
        return torch.where(owners == CONSTANT, owners, fresh) if (labels.numpy() == CONSTANT).any() else fresh

    def take_part(self, labels: Tensor) -> None:
        """Record that these nodes take part in the next operation; the rest must do so after a cut."""
        if len(self.roles) < self.n_nodes:
            self.roles = np.concatenate([self.roles, np.zeros(2 * self.n_nodes - len(self.roles), np.uint64)])
        self.roles[labels.numpy().ravel()] |= np.uint64(1 << (self.n_operations % 61))
        self.n_operations += 1

    def lock(self, labels: Tensor, reason: str) -> None:
        """Lock these nodes against cuts; `reason` is shown to the user."""
        plane = labels.numpy()
        labels = torch.from_numpy(plane[plane > LOCKED])
        if len(labels):
            self.locks.append((labels, reason))


def varying_dims(labels: Tensor) -> frozenset[int]:
    """Dimensions along which the labels differ. Expanded (stride 0) dimensions cost nothing."""
    plane = labels.numpy()
    if not plane.size:
        return frozenset()
    plane = plane[tuple([slice(None) if step else slice(1) for step in plane.strides])]
    return frozenset([d for d, n in enumerate(plane.shape) if n > 1 and _differ(plane, d)])


def _differ(plane: Ints, dim: int) -> bool:
    """Whether labels differ along a dimension; compares the first two before all."""
    first = (0,) * plane.ndim
    if plane[first] != plane[(*first[:dim], 1, *first[dim + 1 :])]:
        return True
    return bool((plane != plane.take([0], dim)).any())


def along(labels: Tensor, dims: frozenset[int] | set[int]) -> Tensor:
    """The plane with every dimension outside `dims` narrowed to size 1."""
    for d in range(labels.dim()):
        if d not in dims and labels.size(d) > 1:
            labels = labels.narrow(d, 0, 1)
    return labels


# --- components ---------------------------------------------------------------------------------

Owners = tuple[Ints, Ints, Ints]  # owners, members in their order, where each owner's members start


@dataclass(frozen=True, eq=False)
class Sites:
    """Every index of every parameter dimension, in the order of `named_parameters()`: the first nodes of a trace.

    Attributes:
        names: (parameter, dim) of each site.
        slices: where each site's indices stand among all.
    """

    names: tuple[tuple[str, int], ...]
    slices: tuple[slice, ...]

    @classmethod
    def of(cls, trace: Trace) -> Sites:
        """Number the sites of a trace."""
        stops = np.cumsum([size for _, size in trace.offsets.values()]).tolist()
        return cls(tuple(trace.offsets), tuple(slice(*ends) for ends in zip([0, *stops], stops, strict=False)))

    @property
    def n_indices(self) -> int:
        """Total over all sites."""
        return self.slices[-1].stop

    @property
    def site(self) -> Ints:
        """Site number of each index."""
        return np.repeat(np.arange(len(self.slices)), [rows.stop - rows.start for rows in self.slices])

    def of_nodes(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values of the node of each index."""
        return values[FIRST : FIRST + self.n_indices]

    def node_of(self, site: int, positions: Ints) -> int:
        """The node of the first of these positions of a site."""
        return FIRST + self.slices[site].start + int(positions[0])


def joined(parts: Iterable[Ints]) -> Ints:
    """Concatenate arrays as one flat array."""
    return np.concatenate([np.zeros(0, np.int64), *(part.ravel() for part in parts)])


def pairs(edges: Iterable[tuple[Ints, Ints]]) -> tuple[Ints, Ints]:
    """Relations, flat: the one side and the other."""
    edges = list(edges)
    return joined(a for a, _ in edges), joined(b for _, b in edges)


def levels(graph: LabelGraph, dead: NDArray[np.bool_] | None = None, owners: Owners | None = None) -> Iterator[Ints]:
    """Component of every node: channels; then with what scores own (query heads); then KV groups.

    Each level is made of the components of the one below. An owner whose members all lie in one component
    joins it, whatever its kind: it dies exactly when they do.

    Args:
        graph: nodes and relations.
        dead: bool (n_nodes,), nodes to leave out with all their relations.
        owners: of the graph, where they are known already.
    """

    def alive(edges: Iterable[tuple[Ints, Ints]]) -> tuple[Ints, Ints]:
        a, b = pairs(edges)
        return (a, b) if dead is None else (a[~dead[a] & ~dead[b]], b[~dead[a] & ~dead[b]])

    label = np.arange(graph.n_nodes)
    if owners is None:
        owners = by_owner(*alive(chain.from_iterable(graph.owns.values())))
    for relation in (graph.same, graph.owns[SCORE], graph.owns[ACTIVATION]):
        a, b = (label[nodes] for nodes in alive(relation))
        label = merge(label, a, b, owners)
        yield label


def merge(label: Ints, a: Ints, b: Ints, owners: Owners) -> Ints:
    """Components after joining pairs, and owners whose members joined."""
    label = _connect(a, b, int(label.max()) + 1)[label]
    owner, member, starts = label[owners[0]], label[owners[1]], owners[2]
    above = np.arange(int(label.max()) + 1)  # components of components, which are few
    while len((news := _settled_owners(above[owner], above[member], starts))[0]):
        above = _connect(*news, int(above.max()) + 1)[above]
    return above[label]


def roles(graph: LabelGraph, label: Ints) -> NDArray[np.uint64]:
    """The operations that each component took part in, one bit each."""
    found = np.zeros(int(label.max()) + 1, np.uint64)
    noted = graph.roles[: len(label)]
    np.bitwise_or.at(found, label[: len(noted)], noted)
    return found


def _connect(a: Ints, b: Ints, n: int) -> Ints:
    if not len(a):
        return np.arange(n)
    matrix = coo_matrix((np.ones(len(a), np.bool_), (a, b)), shape=(n, n))
    return connected_components(matrix, directed=False)[1].astype(np.int64)


def by_owner(owner: Ints, member: Ints) -> Owners:
    """Owners (each once), members in their order, and where each owner's members start."""
    order = np.argsort(owner, kind="stable")
    owner, member = owner[order], member[order]
    starts = np.flatnonzero(np.concatenate([owner[:1] == owner[:1], owner[1:] != owner[:-1]]))
    return owner[starts], member, starts


def _settled_owners(owner: Ints, member: Ints, starts: Ints) -> tuple[Ints, Ints]:
    """Pairs of components to join: an owner's, and the one that holds all its members, where they differ."""
    if not len(owner):
        return owner, member
    low, high = (f.reduceat(member, starts) for f in (np.minimum, np.maximum))
    news = (low == high) & (low != owner)
    return owner[news], low[news]


def spread_death(graph: LabelGraph, dead: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Every node removed with these: nodes that are SAME, and owners all of whose members are removed."""
    label = next(levels(graph))
    owner, member = pairs(chain.from_iterable(graph.owns.values()))
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
