"""Importance by outputs on calibration tokens: of units, of whole layers, and of experts that a router chooses."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from prunekit.calibration import check_tokens, in_batches
from prunekit.discovery.constants import leaves
from prunekit.discovery.groups import CoupledGroup
from prunekit.errors import PrunekitError
from prunekit.importance.input_statistics import (
    measuring,
    members_read,
    readers_of,
    stacked_experts,
    sums_over_inputs,
    wide,
)
from prunekit.importance.scores import Calibration, SomeGroups, all_slice_scores, tokens_for, unit_scores


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
        tokens = check_tokens(tokens, model)
        turned: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for group in groups:
                layer = model.get_submodule(group.name.removesuffix(":layer"))
                stack.enter_context(layer.register_forward_hook(_adder(turned, group.name), with_kwargs=True))
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


# --- experts ----------------------------------------------------------------------------------------------------------


class _Routed(NamedTuple):
    """What a module of experts is called with: hidden states (n, d_model); chosen experts and weights, both (n, k)."""

    hidden: Tensor
    chosen: Tensor
    weights: Tensor


@dataclass(frozen=True)
class REAP:
    """Router-weighted output of an expert: the mean of g·‖f(x)‖ over the tokens x that are routed to it.

    g is the router's weight of the expert f for the token, as it multiplies f(x). An expert that no token reaches
    scores 0.

    Source: router-weighted expert activation pruning, REAP (Lasby et al. 2025).
    """

    needs_calibration = True  # tokens are routed
    label = "REAP"

    def unit_scores(self, model: nn.Module, groups: SomeGroups, calib: Calibration) -> dict[str, Tensor]:
        """Group name → (n_experts,), from tokens.

        Raises:
            PrunekitError: no tokens, a group that is not of experts, or experts that are not one module with a router's
                choice and weights as arguments.
        """
        sums = _summed("REAP()", model, groups, calib, _sizes)
        return {name: total / n.clamp_min(1) for name, (n, total) in sums.items()}


@dataclass(frozen=True)
class RouterFrequency:
    """How often the router chooses an expert: its share of all choices.

    Source: the baseline that REAP (Lasby et al. 2025) compares with.
    """

    needs_calibration = True  # tokens are routed
    label = "router frequency"

    def unit_scores(self, model: nn.Module, groups: SomeGroups, calib: Calibration) -> dict[str, Tensor]:
        """Group name → (n_experts,), from tokens.

        Raises:
            PrunekitError: as `REAP.unit_scores`.
        """
        sums = _summed("RouterFrequency()", model, groups, calib, lambda *_: torch.zeros(1))
        return {name: n / n.sum().clamp_min(1) for name, (n, _) in sums.items()}


def _sizes(module: nn.Module, routed: _Routed, expert: int, rows: Tensor) -> Tensor:
    """g·‖f(x)‖ of each token that is routed to an expert."""
    only = torch.full((len(rows), 1), expert, dtype=routed.chosen.dtype, device=routed.chosen.device)
    result = module(routed.hidden[rows], only, routed.weights.new_ones(len(rows), 1))
    return (routed.weights * (routed.chosen == expert))[rows].sum(1) * result.norm(dim=-1)


def _summed(
    who: str,
    model: nn.Module,
    groups: SomeGroups,
    calib: Calibration,
    measure: Callable[[nn.Module, _Routed, int, Tensor], Tensor],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Group name → tokens routed to each expert, and sums of a measure over them, float64 (n_experts,)."""
    tokens = check_tokens(tokens_for(who, calib), model)
    places = {group.name: _place(model, group) for group in groups}
    found = {g.name: (torch.zeros(g.n_units).double(), torch.zeros(g.n_units).double()) for g in groups}

    def adder(name: str) -> Any:
        def add(module: nn.Module, args: tuple, kwargs: dict, _result: Any) -> None:
            if id(module) in inside:  # one expert alone
                return
            routed, (counts, sums) = _routed(places[name], args, kwargs), found[name]
            inside.add(id(module))
            for expert in range(len(counts)):
                rows = (routed.chosen == expert).any(1).nonzero().flatten()
                if len(rows):
                    counts[expert] += len(rows)
                    sums[expert] += measure(module, routed, expert, rows).double().sum().cpu()
            inside.discard(id(module))

        return add

    inside: set[int] = set()
    with ExitStack() as stack:
        stack.enter_context(measuring(model))
        for name, place in places.items():
            stack.enter_context(model.get_submodule(place).register_forward_hook(adder(name), with_kwargs=True))
        for batch in tqdm(in_batches(tokens), desc="experts", unit="batch", leave=False, delay=1):
            model(input_ids=batch, use_cache=False)  # type: ignore[operator]
    return found


def _place(model: nn.Module, group: CoupledGroup) -> str:
    """Path of the module that holds the stacked experts of a group."""
    if group.kind != "expert":
        raise PrunekitError(f"{group.name!r} is not a group of experts; choose groups.of_kind('expert')")
    stacked = stacked_experts(model)
    places = {member.parameter.rpartition(".")[0] for member in group.members if member.parameter in stacked}
    if len(places) != 1:
        raise PrunekitError(
            f"the experts of {group.name!r} are not stacked in one module, so their router's choice is not seen; "
            "choose another importance, such as Magnitude()"
        )
    return places.pop()


def _routed(place: str, args: tuple, kwargs: dict) -> _Routed:
    """The arguments of a module of experts, found by their types and shapes."""
    tensors = [tensor for _, tensor in leaves(args, kwargs)]
    chosen = [t for t in tensors if t.dim() == 2 and not t.is_floating_point()]
    weights = [t for t in tensors if t.is_floating_point() and chosen and t.shape == chosen[0].shape]
    hidden = [t for t in tensors if t.is_floating_point() and t.dim() == 2 and chosen and len(t) == len(chosen[0])]
    if len(tensors) != 3 or not chosen or not weights or tensors[0] is not hidden[0]:
        raise PrunekitError(
            f"{place} is not called with hidden states, chosen experts and their weights, so its router is not "
            "understood; choose another importance, such as Magnitude()"
        )
    return _Routed(hidden[0], chosen[0], weights[0])
