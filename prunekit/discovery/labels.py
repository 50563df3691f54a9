"""The graph of labels that a trace writes: one node a channel, two relations between them."""

import torch
from torch import Tensor

CONSTANT = 0
LOCKED = 1

# Who owns copies: a score owns the channels it weighs, an expanded activation its copies, a parameter its
# uses, a statistic what it was taken over. Only the first two ever merge into one unit.
SCORE, ACTIVATION, PARAMETER, STATISTIC = "score", "activation", "parameter", "statistic"
ARGUMENT = "argument"  # what made the nodes of a constant that is handed to a module


class LabelGraph:
    """Nodes are channels; SAME joins two that live and die together, OWNS one that dies with all it owns.

    Node 0 stands for "constant", node 1 for "not understood"; neither is ever joined to another.
    """

    def __init__(self) -> None:
        self.n_nodes = 2
        self.same: list[tuple[Tensor, Tensor]] = []
        self.owns: dict[str, list[tuple[Tensor, Tensor]]] = {
            kind: [] for kind in (SCORE, ACTIVATION, PARAMETER, STATISTIC)
        }
        self.locks: list[tuple[Tensor, str]] = []
        self.nonlinear: list[Tensor] = []
        self.embedded: list[Tensor] = []
        self.chosen: list[Tensor] = []
        self._ranges: list[tuple[int, str]] = []

    def new(self, shape: tuple[int, ...], kind: str) -> Tensor:
        """Fresh nodes of a shape, int64; `kind` says what their copies are owned by."""
        n = int(torch.Size(shape).numel())
        labels = torch.arange(self.n_nodes, self.n_nodes + n).view(shape)
        self.n_nodes += n
        self._ranges.append((self.n_nodes, kind))
        return labels

    def kind_of(self, labels: Tensor) -> str | None:
        """What made these nodes: read off the first that is one."""
        found = labels[labels > LOCKED]
        if not len(found):
            return None
        low, high, node = 0, len(self._ranges) - 1, int(found.flatten()[0])
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if node < self._ranges[middle][0] else (middle + 1, high)
        return self._ranges[low][1]

    def unify(self, a: Tensor, b: Tensor) -> None:
        """SAME between two planes of one shape; what meets a constant or the unknown is locked."""
        a, b = a.flatten(), b.flatten()
        known = (a > LOCKED) & (b > LOCKED)
        if known.all():
            self.same.append((a, b))
            return
        self.same.append((a[known], b[known]))
        self.lock(torch.cat([a[~known], b[~known]]), "meets a constant, or what is not understood, in a sum or product")

    def own(self, kind: str, owner: Tensor, member: Tensor) -> None:
        """OWNS between two planes of one shape."""
        owner, member = owner.flatten(), member.flatten()
        known = owner > LOCKED
        self.owns[kind].append((owner[known], member[known]))
        self.lock(member[owner == LOCKED], "is a copy of what is not understood")

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
        return torch.where(owners == CONSTANT, owners, fresh)

    def lock(self, labels: Tensor, reason: str) -> None:
        """These may not be cut; `reason` is what the user reads."""
        labels = labels[labels > LOCKED].flatten()
        if len(labels):
            self.locks.append((labels, reason))


def varying_dims(labels: Tensor) -> frozenset[int]:
    """Dimensions along which the labels differ. Expanded (stride 0) dimensions cost nothing."""
    free = [d for d in range(labels.dim()) if labels.size(d) > 1 and labels.stride(d) != 0]
    compact = labels
    for d in set(range(labels.dim())) - set(free):
        compact = compact.narrow(d, 0, min(1, labels.size(d)))
    return frozenset(d for d in free if bool((compact != compact.narrow(d, 0, 1)).any()))


def along(labels: Tensor, dims: frozenset[int] | set[int]) -> Tensor:
    """The plane with every dimension outside `dims` narrowed to size 1."""
    for d in range(labels.dim()):
        if d not in dims and labels.size(d) > 1:
            labels = labels.narrow(d, 0, 1)
    return labels
