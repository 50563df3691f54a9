"""Head dimensions: the same position of every head of a layer, as one unit.

A head has the size of its siblings, so a position can go only from all of them. Queries and keys meet position by
position in their scores, and rotary embedding turns positions in pairs; values have positions of their own, but where
a module keeps one number for both sizes, both must change alike.
"""

import operator
from collections.abc import Iterable

import numpy as np

from prunekit.discovery.integer_positions import Span
from prunekit.discovery.labelling import Trace
from prunekit.discovery.labels import LOCKED, Ints, LabelGraph
from prunekit.discovery.stored_integers import Attribute, Operation

Pairs = tuple[Ints, Ints]


def scored_alike(trace: Trace, label: Ints) -> Pairs:
    """Pairs of components that hold the same position of heads, for queries and keys, and for values.

    Args:
        trace: of the model.
        label: component of every node, channel for channel.
    """
    found = [label[slab] for slab in _slabs(trace.graph)]  # (heads, positions) each
    return _flat((slab[1:], np.broadcast_to(slab[0], slab[1:].shape)) for slab in found)


def _flat(edges: Iterable[Pairs]) -> Pairs:
    pairs = [(a.ravel(), b.ravel()) for a, b in edges]
    nothing = np.zeros(0, np.int64)
    return np.concatenate([nothing, *(a for a, _ in pairs)]), np.concatenate([nothing, *(b for _, b in pairs)])


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
    return _flat(edges)


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
