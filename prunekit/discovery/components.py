"""Connected components of a label graph, level by level."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from prunekit.discovery.labelling import Trace
from prunekit.discovery.labels import ACTIVATION, FIRST, SCORE, Ints, LabelGraph

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
    def of(cls, trace: Trace) -> "Sites":
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
