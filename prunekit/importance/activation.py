"""Activation, fluctuation and block influence: how much of the outputs comes from a unit, or from a layer."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.calibration import check_tokens, in_batches
from prunekit.discovery import CoupledGroup, discover
from prunekit.discovery.constants import leaves
from prunekit.discovery.parts import layer_of, list_elements
from prunekit.errors import PrunekitError
from prunekit.importance.ablation import ablated
from prunekit.importance.input_statistics import measuring, members_read, readers_of, sums_over_inputs, wide
from prunekit.importance.scores import (
    Calibration,
    SomeGroups,
    all_slice_scores,
    check_takes_tokens,
    tokens_for,
    unit_scores,
)


@dataclass(frozen=True)
class Activation:
    """Size of a unit's outputs: the sum of |W_ij|·‖x_j‖₂ over the weights of its consumer layer.

    W is the weight of a linear layer whose inputs the unit owns (columns of `o_proj` for a head, of `down_proj` for a
    channel), ‖x_j‖₂ its j-th input over all calibration tokens. A unit without a consumer layer, such as a whole block,
    is scored by the rows that it owns. Experts are scored by all their matrices, each over the tokens that reach it.
    Only forward passes are needed. They run in float32 or wider, one module at a time, since half precision overflows
    and is slow on a CPU.

    Source: Wanda (Sun et al. 2023), Eq. 1, |W_ij|·‖X_j‖₂. Differs: summed over all that a unit owns, to remove
        units, where Wanda compares the weights of one row and zeroes some.
    """

    needs_calibration = True  # activations come from a calibration set
    label = "activation"

    def unit_scores(self, model: nn.Module, groups: SomeGroups, calib: Calibration) -> dict[str, Tensor]:
        """Group name → (n_units,), from tokens.

        Raises:
            PrunekitError: no tokens, a group without linear layers, or activations that are not finite.
        """
        return _scored(model, groups, calib, _squares, lambda squares, weight: weight.abs() * squares.sqrt())


@dataclass(frozen=True)
class Fluctuation:
    """Variance of a unit's outputs over tokens: Σ_j Var(x_j)·‖W_:j‖² over the inputs it owns.

    An output that hardly varies can be replaced by a bias. W and x are as in `Activation`, and the
    variance is over all calibration tokens.

    Source: FLAP (An et al., AAAI 2024), the fluctuation metric. Differs: scores are not standardised layer by layer;
        `plan` ranks within a layer, or across layers by score per parameter.
    """

    needs_calibration = True  # activations come from a calibration set
    label = "fluctuation"

    def unit_scores(self, model: nn.Module, groups: SomeGroups, calib: Calibration) -> dict[str, Tensor]:
        """Group name → (n_units,), from tokens.

        Raises:
            PrunekitError: no tokens, a group without linear layers, or activations that are not finite.
        """
        return _scored(model, groups, calib, _moments, lambda sums, weight: weight.square() * _variance(sums))


def _squares(x: Tensor) -> Tensor:
    """(n_tokens, n_in) → (n_in,)."""
    return x.square().sum(0)


def _moments(x: Tensor) -> Tensor:
    """(n_tokens, n_in) → (3, n_in): count, sum and sum of squares."""
    x = x.double()
    return torch.stack([torch.ones_like(x).sum(0), x.sum(0), x.square().sum(0)])


def _variance(sums: Tensor) -> Tensor:
    n, total, squares = sums
    n = n.clamp_min(1)  # an expert may have had no token
    return ((squares - total.square() / n) / (n - 1).clamp_min(1)).clamp_min(0)  # one token has no variance


def _scored(
    model: nn.Module,
    groups: SomeGroups,
    calib: Calibration,
    measure: Callable[[Tensor], Tensor],
    weigh: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Unit scores from weight scores, each computed from sums over the inputs and the weight (out, in)."""
    tokens = tokens_for("this importance", calib)
    readers = readers_of(model)
    read = [replace(group, members=members_read(group, readers)) for group in groups]
    names = dict.fromkeys(member.parameter for group in read for member in group.members)
    sums = sums_over_inputs(model, tokens, {name: readers[name] for name in names}, measure)
    parameters = dict(model.named_parameters())

    def weight_scores(name: str) -> Tensor:
        weight = wide(parameters[name].detach())
        turned = readers[name].input_dim != weight.dim() - 1
        matrices = weight.mT if turned else weight  # ([expert,] out, in)
        if readers[name].n_experts:
            scores = torch.stack([weigh(*pair) for pair in zip(sums[name], matrices, strict=True)])
        else:
            scores = weigh(sums[name], matrices)
        return (scores.mT if turned else scores).to(weight.dtype)

    slices = all_slice_scores(read, weight_scores, "element")
    return {group.name: unit_scores(group, slices, "sum") for group in read}


@dataclass(frozen=True)
class BlockInfluence:
    """1 − cos(x, y) of a layer or block, averaged over calibration tokens; near 0 if it hardly turns the stream.

    x is the residual stream in front of it and y that behind it. Of a layer these are its input and output. Of the
    blocks inside a layer, attention and FFN, they are the layer's output with this block and all later ones ablated,
    and with the later ones alone ablated; so whatever the layer does to a block's output counts with it. Each block
    costs one more run of its layer.

    Source: ShortGPT (Men et al. 2024) for layers; He et al., "What matters in transformers? Not all attention is
        needed" (2024), Eq. 2 to 5, for blocks.
    """

    needs_calibration = True  # activations come from a calibration set
    label = "block influence"

    def unit_scores(self, model: nn.Module, groups: SomeGroups, calib: Calibration) -> dict[str, Tensor]:
        """Group name → (1,), from tokens.

        Raises:
            PrunekitError: no tokens, a group that is no whole layer or block, or activations that are not finite.
        """
        tokens = tokens_for("BlockInfluence()", calib)
        for group in groups:
            if group.kind not in ("layer", "block"):
                raise PrunekitError(
                    f"{group.name!r} is no whole layer or block, so it has no block influence; choose "
                    "groups.of_kind('layer') or groups.of_kind('block')"
                )
        check_takes_tokens(model)
        tokens = check_tokens(tokens, model)
        turned: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for path, blocks in _by_layer(model, groups).items():
                watch = partial(_add_turns, turned, model, path, blocks)
                stack.callback(model.get_submodule(path).register_forward_hook(watch, with_kwargs=True).remove)
            stack.enter_context(measuring(model))
            for batch in in_batches(tokens):
                model(input_ids=batch, use_cache=False)  # type: ignore[operator]
        for name, total in turned.items():
            if not bool(total.isfinite()):
                raise PrunekitError(
                    f"the input or output of {name.rpartition(':')[0]} is not finite; check the weights"
                )
        return {group.name: (turned[group.name] / tokens.numel())[None] for group in groups}


def _by_layer(model: nn.Module, groups: SomeGroups) -> dict[str, list[CoupledGroup]]:
    """Layer → all its blocks, in the order in which they run, where one of them is scored; else without blocks."""
    found: dict[str, list[CoupledGroup]] = {g.name.removesuffix(":layer"): [] for g in groups if g.kind == "layer"}
    if any(group.kind == "block" for group in groups):
        layers, every = list_elements(model), discover(model)
        inside = {g.name: layer_of(g.name.removesuffix(":block"), layers) or "" for g in every.of_kind("block")}
        asked = {inside[every[group.name].name] for group in groups if group.kind == "block"}
        found |= {path: [every[name] for name in inside if inside[name] == path] for path in asked}
    return found


def _add_turns(
    turned: dict[str, Tensor],
    model: nn.Module,
    path: str,
    blocks: list[CoupledGroup],
    layer: nn.Module,
    args: tuple,
    kwargs: dict,
    result: Any,
) -> None:
    """Add 1 − cos of a layer, and of each of its blocks, over the tokens of one call."""

    def without(later: list[CoupledGroup]) -> Tensor:
        with ExitStack() as stack:
            for block in later:
                stack.enter_context(ablated(model, block, [0]))
            return _stream(layer.forward(*args, **kwargs))

    behind = _stream(result)
    before = next(t for _, t in leaves(args, kwargs) if t.shape == behind.shape and t.is_floating_point())
    streams = [*(without(blocks[number:]) for number in range(len(blocks))), behind]
    pairs = {block.name: pair for block, pair in zip(blocks, pairwise(streams), strict=True)}
    for name, (x, y) in {f"{path}:layer": (before, behind), **pairs}.items():
        turn = (1 - torch.cosine_similarity(wide(x), wide(y), dim=-1)).double().sum().cpu()
        turned[name] = turned.get(name, torch.zeros((), dtype=torch.float64)) + turn


def _stream(result: Any) -> Tensor:
    """The residual stream in what a layer returns."""
    return next(tensor for _, tensor in leaves((result,), {}))
