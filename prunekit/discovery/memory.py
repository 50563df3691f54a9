"""What `discover` has traced, carried along with what it found, so that `prune` need not trace it again."""

import weakref
from dataclasses import dataclass
from typing import Any

from torch import nn

from prunekit.discovery.labelling import Trace

Structure = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Traced:
    """A trace and the model that it is of, as long as that has the same modules with the same shapes."""

    trace: Trace
    model: weakref.ref[nn.Module]
    structure: Structure

    @classmethod
    def of(cls, trace: Trace, model: nn.Module) -> "Traced":
        """Remember a trace that was just made of `model`."""
        return cls(trace, weakref.ref(model), _structure(model))

    def is_of(self, model: nn.Module) -> bool:
        """Whether nothing that can be seen has changed; the proof that follows a cut catches what cannot."""
        return self.model() is model and self.structure == _structure(model)


def _structure(model: nn.Module) -> Structure:
    return tuple(
        (path, id(module), tuple((name, p.shape) for name, p in module._parameters.items() if p is not None))
        for path, module in model.named_modules()
    )
