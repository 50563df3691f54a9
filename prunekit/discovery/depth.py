"""Groups of one unit: whole layers, and the blocks in them."""

import numpy as np
import torch
from numpy.typing import NDArray

from prunekit.discovery.groups import CoupledGroup, Member
from prunekit.discovery.labelling import Trace
from prunekit.discovery.parts import Part


def depth_groups(trace: Trace, hidden: NDArray[np.bool_]) -> list[CoupledGroup]:
    """Layers and outermost blocks that pass the hidden channels unchanged when their parameters are zero.

    Args:
        trace: of the model.
        hidden: (n_nodes,), True for hidden channels.
    """
    parts = [part for part in trace.parts.values() if hidden[part.node]]
    layers = [part for part in parts if part.path == part.layer and part.echo]
    inside = [part for part in parts if part.path != part.layer]
    blocks = [part for part in inside if not any(part.path.startswith(f"{other.path}.") for other in inside)]
    found = [_group(trace, part, kind) for kind, chosen in (("block", blocks), ("layer", layers)) for part in chosen]
    return [group for group in found if group.members]


def _group(trace: Trace, part: Part, kind: str) -> CoupledGroup:
    """All parameters of a module, whole, as the one unit of a group."""
    shapes = {name: shape for name, shape in trace.shapes.items() if name.startswith(f"{part.path}.")}
    members = (Member(name, 0, torch.arange(shape[0])[None]) for name, shape in shapes.items() if shape and shape[0])
    return CoupledGroup(f"{part.path}:{kind}", kind, 1, tuple(members), exact=True)
