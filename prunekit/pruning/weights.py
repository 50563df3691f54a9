"""Copies a model without weights, and slices the weights that stay."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import PrunekitError, reason
from prunekit.pruning.dropping import renamed

Keep = dict[tuple[str, int], Tensor]  # (parameter, dim) → ascending indices that stay


def copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy.

    Args:
        model: to copy.
        memo: address of an object → what stands in its place in the copy.

    Raises:
        PrunekitError: something in it cannot be copied.
    """
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever an object in it refuses with
        raise PrunekitError(
            f"this {type(model).__name__} cannot be copied, and cuts are tried on a copy first "
            f"({reason(error)}); take out of it what cannot be copied, such as locks, open files, or "
            "weights that are computed from others"
        ) from error


def without_weights(model: nn.Module, keep: Keep) -> nn.Module:
    """A deep copy whose parameters have the new shapes and no weights; the old ones are never copied.

    Raises:
        PrunekitError: as `copied`.
    """
    kept = _per_parameter(keep)
    return copied(model, {id(p): _hollow(p, kept.get(name, {})) for name, p in model.named_parameters()})


def fill(skeleton: nn.Module, model: nn.Module, keep: Keep, moved: dict[str, str]) -> nn.Module:
    """Fill a model without weights with the slices that stay.

    Args:
        skeleton: what `without_weights` gave, changed in place.
        model: whose weights they are.
        keep: indices that stay.
        moved: list elements that stand elsewhere in the skeleton, path before → path after.
    """
    kept, weights = _per_parameter(keep), dict(model.named_parameters())
    came_from = {new: old for old, new in moved.items()}
    for new, hollow in list(skeleton.named_parameters()):
        name = renamed(new, came_from)
        torch.utils.swap_tensors(hollow, _slice(weights[name], kept.get(name, {})))
    return skeleton


def replace_parameters(model: nn.Module, keep: Keep) -> None:
    """Replace cut parameters by smaller ones, in place."""
    kept = _per_parameter(keep)
    small = {id(p): _slice(p, kept[name]) for name, p in model.named_parameters() if name in kept}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) in small:
                module._parameters[name] = small[id(p)]


def cut_buffers(model: nn.Module, keep: dict[str, tuple[int, Tensor]]) -> None:
    """Replace buffers by the entries that stay, in place; one that several modules hold stays one.

    Args:
        model: that holds them.
        keep: name of a buffer → dimension and ascending indices that stay.
    """
    whole = {id(b): (b, *keep[name]) for name, b in model.named_buffers() if name in keep}
    small = {key: b.index_select(dim, index.to(b.device)) for key, (b, dim, index) in whole.items()}
    for module in model.modules() if small else ():
        for name, b in module._buffers.items():
            module._buffers[name] = small.get(id(b), b)


def _per_parameter(keep: Keep) -> dict[str, dict[int, Tensor]]:
    out: dict[str, dict[int, Tensor]] = {}
    for (name, dim), index in keep.items():
        out.setdefault(name, {})[dim] = index
    return out


def _slice(p: nn.Parameter, keep: dict[int, Tensor]) -> nn.Parameter:
    data = p.detach()
    for dim, index in keep.items():
        data = data.index_select(dim, index.to(data.device))
    return nn.Parameter(data.contiguous() if keep else data.clone(), requires_grad=p.requires_grad)


def _hollow(p: nn.Parameter, keep: dict[int, Tensor]) -> nn.Parameter:
    shape = [len(keep[d]) if d in keep else n for d, n in enumerate(p.shape)]
    return nn.Parameter(torch.empty(shape, dtype=p.dtype, device="meta"), requires_grad=False)
