"""Activation, fluctuation and block influence: how much of the outputs comes from a unit, or from a layer."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.calibration import check_tokens, in_batches
from prunekit.discovery.constants import leaves
from prunekit.errors import PrunekitError
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
    """1 − cos(x, f(x)) of a layer f, averaged over calibration tokens; near 0 if the layer hardly changes its input.

    Source: ShortGPT (Men et al. 2024).
    """

    needs_calibration = True  # activations come from a calibration set
    label = "block influence"

    def unit_scores(self, model: nn.Module, groups: SomeGroups, calib: Calibration) -> dict[str, Tensor]:
        """Group name → (1,), from tokens.

        Raises:
            PrunekitError: no tokens, a group that is no whole layer, or activations that are not finite.
        """
        tokens = tokens_for("BlockInfluence()", calib)
        for group in groups:
            if group.kind != "layer":
                raise PrunekitError(
                    f"{group.name!r} is not a whole layer, so it has no block influence; choose groups.of_kind('layer')"
                )
        check_takes_tokens(model)
        tokens = check_tokens(tokens, model)
        turned: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for group in groups:
                layer = model.get_submodule(group.name.removesuffix(":layer"))
                stack.callback(layer.register_forward_hook(_adder(turned, group.name), with_kwargs=True).remove)
            stack.enter_context(measuring(model))
            for batch in in_batches(tokens):
                model(input_ids=batch, use_cache=False)  # type: ignore[operator]
        for name, total in turned.items():
            if not bool(total.isfinite()):
                raise PrunekitError(
                    f"the input or output of {name.removesuffix(':layer')} is not finite; check the weights"
                )
        return {name: (total / tokens.numel())[None] for name, total in turned.items()}


def _adder(turned: dict[str, Tensor], name: str) -> Any:
    def add(_module: nn.Module, args: tuple, kwargs: dict, result: Any) -> None:
        after = next(tensor for _, tensor in leaves((result,), {}))
        before = next(t for _, t in leaves(args, kwargs) if t.shape == after.shape and t.is_floating_point())
        cosines = torch.cosine_similarity(wide(before), wide(after), dim=-1)
        turned[name] = turned.get(name, torch.zeros((), dtype=torch.float64)) + (1 - cosines).double().sum().cpu()

    return add
