"""Pads an uneven model with zeros to even widths, for programs that support only one width."""

from typing import Any

import torch
from torch import Tensor

from prunekit.discovery import Groups, discover
from prunekit.errors import PrunekitError
from prunekit.models import empty_model, own_tensors
from prunekit.pruning.cuts import Cuts, with_width
from prunekit.pruning.describing import first_logits, reads_back

ROUNDING = 64  # units in the last place: more zeros in a sum change its order and nothing else
COARSE = 0.03  # half precision: what is wrong differs far more


def padded_model(model: Any, cuts: Cuts) -> Any:
    """A padded copy that plain `transformers` loads and that computes the same as `model`.

    Every width is that of the widest layer, or the next that the family takes; where its configuration has no
    field for a width, the uncut one. What `model` lacks there is zero: a head whose values are zero adds nothing,
    nor does a channel that nothing reads.

    Args:
        model: as returned by `prune`.
        cuts: what was cut from it.

    Raises:
        PrunekitError: zeros would change what it computes, as where a norm's statistics span what was cut.
    """
    if cuts.biases:
        raise _refusal("some of its layers were given biases, others not; re-fit with fit='weights', which adds none")
    padded = empty_model(_roomy(cuts))
    survivors, like = _survivors(discover(padded), cuts), next(model.parameters())
    state = {name: torch.zeros(p.shape, dtype=like.dtype, device=like.device) for name, p in padded.named_parameters()}
    shapes = {name: t.shape for name, t in own_tensors(padded).items()}
    state |= {name: _spread(name, t.detach(), shapes[name], survivors) for name, t in own_tensors(model).items()}
    padded.load_state_dict(state, strict=False, assign=True)
    padded.tie_weights()
    padded.generation_config = model.generation_config
    padded.to(like.device).eval()
    difference = relative_difference(padded, model)
    if not difference <= tolerance(next(model.parameters()).dtype):
        raise _refusal(
            f"its logits would change by a factor of {difference:.1g}: zeros cannot replace the removed units, as "
            "where a "
            "norm spans it or each head has a norm of its own"
        )
    return padded


def relative_difference(a: Any, b: Any) -> float:
    """‖a − b‖ / ‖b‖ of two models' logits on the same tokens."""
    found, expected = first_logits(a).double(), first_logits(b).double()
    return float((found - expected).norm() / expected.norm())


def tolerance(dtype: torch.dtype) -> float:
    """Allowed relative difference of two computations of the same logits."""
    return min(ROUNDING * torch.finfo(dtype).eps, COARSE)


def _roomy(cuts: Cuts) -> Any:
    config = cuts.config
    for name, groups in cuts.roles.items():
        widest = max(cuts.n_left(group) for group in groups)
        tried = (with_width(config, cuts.fields[name], width) for width in range(widest, groups[0].n_units + 1))
        config = next(filter(reads_back, tried), config)
    return config


def _survivors(groups: Groups, cuts: Cuts) -> dict[tuple[str, int], Tensor]:
    """(parameter, dim) of the padded model → the indices that are not filling.

    Units stand where they stood where the width is the uncut one, because a place may mean something (ALiBi's slopes).
    """
    gone: dict[tuple[str, int], list[Tensor]] = {}
    for name, units in cuts.left.items():
        group = _group(groups, name)
        kept = units if group.n_units == cuts.groups[name].n_units else list(range(len(units)))
        filling = sorted(set(range(group.n_units)) - set(kept))
        for member in group.members:
            gone.setdefault((member.parameter, member.dim), []).append(member.owned_by(filling))
    return {site: _others(groups.shapes[site[0]][site[1]], torch.cat(parts)) for site, parts in gone.items()}


def _group(groups: Groups, name: str) -> Any:
    try:
        return groups[name]
    except PrunekitError:
        raise _refusal(f"with even widths it has no {name}") from None


def _others(size: int, gone: Tensor) -> Tensor:
    stays = torch.ones(size, dtype=torch.bool)
    stays[gone] = False
    return stays.nonzero().flatten()


def _spread(name: str, tensor: Tensor, shape: torch.Size, survivors: dict[tuple[str, int], Tensor]) -> Tensor:
    """A padded tensor: the remaining values in place, zeros elsewhere."""
    for dim, size in enumerate(shape):
        if tensor.shape[dim] == size:
            continue
        index = survivors.get((name, dim), torch.empty(0))
        if len(index) != tensor.shape[dim]:
            raise _refusal(
                f"where the units left of {name} (dimension {dim}) belong is unknown; save it with prunekit.save "
                "instead"
            )
        wider = tensor.new_zeros([*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]])
        tensor = wider.index_copy_(dim, index.to(tensor.device), tensor)
    return tensor


def _refusal(why: str) -> PrunekitError:
    return PrunekitError(f"this model cannot be padded: {why}; save it with prunekit.save, which keeps uneven widths")
