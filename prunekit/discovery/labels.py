"""The graph of labels that a trace writes: one node a channel, two relations between them."""

import math
from bisect import bisect_right

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
