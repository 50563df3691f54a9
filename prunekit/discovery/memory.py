"""Stores the trace with the groups, so that `prune` need not trace the same model again."""

import weakref
from dataclasses import dataclass
from typing import Any

from torch import nn

from prunekit.discovery.labelling import Trace

Structure = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Traced:
    """A trace and its model; valid while the model has the same modules and shapes."""

    trace: Trace
    model: weakref.ref[nn.Module]
    structure: Structure

    @classmethod
    def of(cls, trace: Trace, model: nn.Module) -> "Traced":
        """Store a new trace of `model`."""
        return cls(trace, weakref.ref(model), _structure(model))

    def is_of(self, model: nn.Module) -> bool:
        """Whether the model is unchanged as far as can be seen; the check after a cut catches the rest."""
        return self.model() is model and self.structure == _structure(model)


def _structure(model: nn.Module) -> Structure:
    return tuple(
        (path, id(module), tuple((name, p.shape) for name, p in module._parameters.items() if p is not None))
        for path, module in model.named_modules()
    )
