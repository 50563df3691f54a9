"""Ablates any set of units at once: by zeros, by their mean over a text, or by their activations in another prompt."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prunekit.calibration import check_tokens
from prunekit.checks import Model, checked
from prunekit.compat import cache_name
from prunekit.discovery.groups import CoupledGroup, Member
from prunekit.errors import PrunekitError
from prunekit.importance.ablation import ablated
from prunekit.importance.input_statistics import Reader, linear_readers, sums_over_inputs
from prunekit.knowledge.measurement import check_groups
from prunekit.models import device_of, evaluating

CONSUMED = ("kv_head", "query_head", "ffn_channel")  # kinds whose outputs one linear layer consumes
Mode = Literal["zero", "mean", "patch"]


@checked
def ablate(
    model: Model,
    groups: Iterable[CoupledGroup],
    units: Mapping[str, Iterable[int]],
    *,
    mode: Mode = "zero",
    tokens: Tensor | None = None,
) -> AbstractContextManager[None]:
    """A context in which any set of units is ablated; the model is restored at its end, also after an exception.

    `"zero"` sets all weights of the units to zero. The other two leave the weights as they are and replace the units'
    outputs, which their consumer layer (`o_proj`, `down_proj`) reads. `"mean"` gives every token the mean of these
    outputs over calibration tokens. `"patch"` gives them the outputs of another prompt, position by position: token t
    takes those of the other prompt's token t, and tokens beyond its end keep their own. So the two prompts should have
    equally many tokens.

    Args:
        model: a causal language model of transformers.
        groups: groups discovered in it, which the names are looked up in.
        units: group name → numbers of the units to ablate.
        mode: `"zero"`, `"mean"` or `"patch"`; the last two are for heads and FFN channels.
        tokens: for `"mean"` a calibration set, integers (n_samples, seq_len); for `"patch"` the ids of the other
            prompt, integers (1, seq_len). `"zero"` takes none.

    Returns:
        A context manager. Ablated sets may stand inside each other.

    Raises:
        PrunekitError: no such group or unit, no units at all, tokens that the mode needs and does not have or does not
            take, or a kind of unit that only `"zero"` can ablate.
    """
    chosen = _chosen(check_groups(model, groups), units)
    if mode == "zero":
        if tokens is not None:
            raise PrunekitError("tokens= are for mode='mean' or mode='patch'; leave them out of mode='zero'")
        return _zeroed(model, chosen)
    readers = linear_readers(model)
    where = _places(readers, chosen, mode)
    if tokens is None:
        needed = "a calibration set" if mode == "mean" else "the other prompt's ids, tokenizer(…)['input_ids']"
        raise PrunekitError(f"mode={mode!r} needs tokens=: give {needed}")
    if mode == "mean":
        return changing_inputs(readers, _averages(model, readers, where, tokens))
    return _patched(model, readers, where, tokens)


def units_named(text: str, groups: Iterable[CoupledGroup]) -> dict[str, list[int]]:
    """Group name → units, of a text such as `"2.1, 6.0-3, 7.all"`: layer, a dot, then a number, a range or `all`.

    Args:
        text: what a user typed; nothing between two commas is skipped.
        groups: groups of one kind.

    Returns:
        The units in ascending order, each once; {} for an empty text.

    Raises:
        PrunekitError: something else stands there, there is no such layer or unit, or a layer has several groups.
    """
    by_layer: dict[str, list[CoupledGroup]] = {}
    for group in groups:
        by_layer.setdefault(str(group.layer), []).append(group)
    found: dict[str, set[int]] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        layer, _, units = (piece.strip() for piece in part.partition("."))
        low, dash, high = (end.strip() for end in units.partition("-"))
        ends = (low, high if dash else low)
        if units != "all" and not all(end.isdecimal() and len(end) < 10 for end in ends):
            raise PrunekitError(f"{part!r} names no units; write layer.unit, such as 2.1, 6.0-3 or 7.all")
        if layer not in by_layer:
            raise PrunekitError(f"{part!r}: no such layer; there are {', '.join(by_layer)}")
        group, *others = by_layer[layer]
        if others:
            raise PrunekitError(
                f"{part!r}: layer {layer} has {len(others) + 1} groups of this kind, such as {group.name!r}; ablate "
                "them by name: ablate(model, groups, {name: units})"
            )
        numbers = range(group.n_units) if units == "all" else range(int(ends[0]), int(ends[1]) + 1)
        check_units(group.name, group.n_units, [*numbers[:1], *numbers[-1:]] if numbers else [int(ends[0])])
        found.setdefault(group.name, set()).update(numbers)
    return {name: sorted(units) for name, units in found.items() if units}


def check_units(name: str, n_units: int, units: Iterable[int]) -> None:
    """Raises an error for a unit that a group does not have."""
    bad = next((unit for unit in units if not 0 <= unit < n_units), None)
    if bad is not None:
        raise PrunekitError(f"{name!r} has no unit {bad:,}; its units are 0 to {n_units - 1}")


def _chosen(groups: list[CoupledGroup], units: Mapping[str, Iterable[int]]) -> list[tuple[CoupledGroup, list[int]]]:
    by_name = {group.name: group for group in groups}
    for name in units:
        if name not in by_name:
            raise PrunekitError(f"no group is called {name!r}; these are {', '.join(by_name)}")
    chosen = [(by_name[name], sorted(set(several))) for name, several in units.items()]
    for group, several in chosen:
        check_units(group.name, group.n_units, several)
    if not any(several for _, several in chosen):
        raise PrunekitError("no units are named; give group name → units, such as {groups[0].name: [0, 2]}")
    return [(group, several) for group, several in chosen if several]


@contextmanager
def _zeroed(model: nn.Module, chosen: list[tuple[CoupledGroup, list[int]]]) -> Iterator[None]:
    with ExitStack() as stack:
        for group, units in chosen:
            stack.enter_context(ablated(model, group, units))
        yield


# --- the inputs of consumer layers ------------------------------------------------------------------------------------

Places = dict[str, Tensor]  # parameter of a consumer layer → which of its inputs


def consumed(group: CoupledGroup, readers: Mapping[str, Reader]) -> list[Member]:
    """The members of a group in the linear layers that consume its outputs; [] where there are no such layers."""
    if group.kind not in CONSUMED:
        return []
    return [m for m in group.members if m.parameter in readers and m.dim == readers[m.parameter].input_dim]


def _places(readers: Mapping[str, Reader], chosen: list[tuple[CoupledGroup, list[int]]], mode: str) -> Places:
    found: Places = {}
    for group, units in chosen:
        members = consumed(group, readers)
        if not members:
            raise PrunekitError(
                f"mode={mode!r} is for groups that a linear layer consumes ({', '.join(CONSUMED)}), and "
                f"{group.name!r} is not one; use mode='zero' for it"
            )
        for member in members:
            index = found.get(member.parameter, member.index.new_zeros(0))
            found[member.parameter] = torch.cat([index, member.owned_by(units)]).unique()
    return found


def _sum_and_count(x: Tensor) -> Tensor:
    """Sums of inputs (rows, features), and the number of rows: an expert's layer reads a part of the tokens."""
    return torch.cat([x.sum(0), x.new_tensor([len(x)])])


def _averages(
    model: nn.Module, readers: Mapping[str, Reader], where: Places, tokens: Tensor
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Parameter → a function that puts the mean in place of some inputs."""
    sums = sums_over_inputs(model, tokens, {name: readers[name] for name in where}, _sum_and_count)

    def averaged(index: Tensor, mean: Tensor) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            at = index.to(x.device)
            return x.index_copy(-1, at, mean.to(x)[at].expand(*x.shape[:-1], len(at)))

        return change

    return {name: averaged(index, sums[name][:-1] / sums[name][-1].clamp_min(1)) for name, index in where.items()}


@contextmanager
def changing_inputs(readers: Mapping[str, Reader], changes: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """A context in which consumer layers read changed inputs.

    Args:
        readers: parameter → its layers, of one input each.
        changes: parameter → a function of the inputs.
    """
    with ExitStack() as hooks:
        for name, change in changes.items():
            for module in readers[name].modules:
                hooks.enter_context(changing_input(module, change))
        yield


def changing_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """A hook, and a context, with which a module with one input reads a changed one."""

    def enter(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: change(kwargs[name])}

    return module.register_forward_pre_hook(enter, with_kwargs=True)


@contextmanager
def _patched(model: nn.Module, readers: Mapping[str, Reader], where: Places, tokens: Tensor) -> Iterator[None]:
    """A context in which inputs come from another prompt, by position."""
    record = _record(model, readers, where, tokens)
    placed: list[Tensor] = []  # positions of the tokens of the present call, (batch, seq) or (1, seq)

    def note(_model: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
        placed[:] = [_positions(_args, kwargs)]

    def patched(index: Tensor, other: Tensor) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            at, positions = index.to(x.device), placed[0].to(x.device)
            if x.shape[-2] != positions.shape[-1]:
                raise PrunekitError(
                    f"a consumer layer reads {tuple(x.shape)} instead of (batch, seq, features), so activations "
                    "cannot be patched by position; use mode='zero' or mode='mean'"
                )
            theirs = other.to(x)[positions.clamp(max=len(other) - 1)][..., at]  # (B or 1, T, n)
            inside = (positions < len(other))[..., None]
            return x.index_copy(-1, at, torch.where(inside, theirs, x[..., at]))

        return change

    changes = {name: patched(index, record[name]) for name, index in where.items()}
    with model.register_forward_pre_hook(note, with_kwargs=True), changing_inputs(readers, changes):
        yield


def _positions(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Positions of the tokens that a model is called with: those given, or counted on from the cache's."""
    if kwargs.get("position_ids") is not None:
        given: Tensor = kwargs["position_ids"]
        return given
    ids = next(x for x in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if x is not None)
    cache = kwargs.get(cache_name(kwargs) or "")
    seen = int(cache.get_seq_length()) if cache is not None else 0
    return torch.arange(seen, seen + ids.shape[1])[None]


def _record(model: nn.Module, readers: Mapping[str, Reader], where: Places, tokens: Tensor) -> dict[str, Tensor]:
    """Parameter → what its layer reads in a prompt, (seq, features)."""
    ids = check_tokens(tokens, model)
    if len(ids) != 1:
        raise PrunekitError(f"mode='patch' takes one prompt, tokens (1, seq_len), and not {tuple(ids.shape)}")
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], Tensor]:
        def note(x: Tensor) -> Tensor:
            found[name] = x.detach().reshape(-1, x.shape[-1]).clone()
            return x

        return note

    with evaluating(model), torch.no_grad(), changing_inputs(readers, {name: keep(name) for name in where}):
        model(input_ids=ids.to(device_of(model)), use_cache=False)
    for name in where:
        if len(found.get(name, ())) != ids.shape[1]:
            raise PrunekitError(
                f"{name} does not read every token of the prompt once (a layer of experts?); use mode='zero'"
            )
    return found
