"""Importance of experts by their router: how often they are chosen, and how much they then add."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from prunekit.calibration import check_tokens, in_batches
from prunekit.discovery.constants import leaves
from prunekit.discovery.groups import CoupledGroup
from prunekit.errors import PrunekitError
from prunekit.importance.input_statistics import measuring, stacked_experts
from prunekit.importance.scores import Calibration, SomeGroups, tokens_for


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
