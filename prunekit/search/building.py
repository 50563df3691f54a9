"""A plan as plain data becomes what is measured: a smaller model, or the model itself with zeros for a while."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from prunekit.discovery import Groups, discover
from prunekit.errors import PrunekitError
from prunekit.evaluation.likelihood import device_of, evaluating
from prunekit.importance.ablation import silenced
from prunekit.pruning import PruningPlan, prune

Fields = Mapping[str, Any]  # of a PruningPlan, all but its groups and notes
COARSE = 1000  # times the model's own precision: by what cut and zeroed may differ, relative to the largest logit

# What a worker need not do again for the same model.
_GROUPS: "WeakKeyDictionary[nn.Module, Groups]" = WeakKeyDictionary()
_CHECKED: "WeakSet[nn.Module]" = WeakSet()


def cut(model: nn.Module, plan: Fields, *, calib: Tensor | None = None) -> nn.Module:
    """A smaller model.

    Args:
        model: the dense one; it is left alone.
        plan: fields of the plan.
        calib: what to re-fit on; None leaves the rest as it is.
    """
    return prune(model, PruningPlan(**plan, groups=_groups(model)), compensate=calib, measure=False)


@contextmanager
def masked(model: nn.Module, plan: Fields) -> Iterator[nn.Module]:
    """While open, what a plan removes is zero in the model itself, which needs no second one.

    The first plan that a model is given is cut as well, and both must say the same.

    Args:
        model: the dense one; afterwards it is as it was.
        plan: fields of the plan, whose groups are exact.

    Raises:
        PrunekitError: the zeroed model says other than the cut one.
    """
    groups, gone = _groups(model), PruningPlan(**plan)
    with ExitStack() as zeros:
        for name in gone.keep:
            zeros.enter_context(silenced(model, groups[name], gone.removed(name)))
        if model not in _CHECKED:
            _check(model, cut(model, plan))
            _CHECKED.add(model)
        yield model


def _groups(model: nn.Module) -> Groups:
    if model not in _GROUPS:
        _GROUPS[model] = discover(model)
    return _GROUPS[model]


def _check(zeroed: nn.Module, small: nn.Module) -> None:
    """Refuse masks where they are not exact."""
    ids = torch.arange(1, 17, device=device_of(zeroed))[None]
    with evaluating(zeroed), evaluating(small):
        one, other = (model(input_ids=ids, use_cache=False).logits.double() for model in (zeroed, small))
    error, largest = float((one - other).abs().max()), float(one.abs().max())
    if not error <= COARSE * torch.finfo(next(zeroed.parameters()).dtype).eps * largest:
        raise PrunekitError(
            f"with zeros the logits differ from those of the cut model by {error:.2g}; measure with as_masks=False"
        )
