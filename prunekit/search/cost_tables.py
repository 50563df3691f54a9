"""Measured cost tables: multiply-accumulates and latency of each group."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from prunekit.checks import Count, Model, Seed, check_choice, checked
from prunekit.discovery import CoupledGroup, Groups
from prunekit.errors import PrunekitError
from prunekit.evaluation.footprint import (
    cache_of,
    check_length,
    count_macs,
    random_tokens,
    time_decode,
    time_prefill,
)
from prunekit.models import evaluating
from prunekit.pruning import prune
from prunekit.pruning.budgets import WHOLE_KINDS
from prunekit.pruning.plan_options import DEFAULT_KINDS
from prunekit.pruning.planning import plan_without
from prunekit.search.architectures import PlanSpace
from prunekit.search.costs import CostTable

PHASES = ("decode", "prefill")
SHARES = (0.25, 0.5, 0.75, 1.0)  # of a group's units, at which time is measured; between them it is interpolated
_SHORT = 8  # tokens of the pass by which a cache is measured
ROUNDS = 5  # of timing the dense and the cut model in turn, so that other load affects both
Measure = Callable[[nn.Module], float]


@checked
def mac_table(model: Model, groups: Groups, *, kinds: Iterable[str] = DEFAULT_KINDS, seq_len: Count = 64) -> CostTable:
    """A table of multiply-accumulates of one forward pass over one sequence.

    Args:
        model: in which the groups were discovered; unchanged.
        groups: what `discover` found.
        kinds: in the table; with `"layer"` whole layers too.
        seq_len: tokens.

    Raises:
        PrunekitError: what `cost` refuses, or a cut that cannot be made.
    """
    check_length(model, seq_len)
    measure = partial(_macs, seq_len=seq_len)
    return _measured("macs", model, groups, kinds, measure)


@checked
def weight_table(model: Model, groups: Groups, *, kinds: Iterable[str] = DEFAULT_KINDS) -> CostTable:
    """A table of the bytes that the weights take in memory, tied ones once.

    Args:
        model: in which the groups were discovered; unchanged.
        groups: what `discover` found.
        kinds: in the table; with `"layer"` whole layers too.

    Raises:
        PrunekitError: a cut that cannot be made.
    """
    return _measured("weight_bytes", model, groups, kinds, _weight_bytes)


@checked
def cache_table(
    model: Model,
    groups: Groups,
    *,
    context: Count,
    batch_size: Count = 1,
    kinds: Iterable[str] = DEFAULT_KINDS,
) -> CostTable:
    """A table of the bytes of keys and values that are kept while text is generated.

    They are those of one short pass, scaled to the context: layers with a sliding window keep less of a long one.

    Args:
        model: in which the groups were discovered; unchanged.
        groups: what `discover` found.
        context: tokens of each sequence.
        batch_size: sequences.
        kinds: in the table; with `"layer"` whole layers too.

    Raises:
        PrunekitError: a model without a cache of keys and values, or a cut that cannot be made.
    """
    check_length(model, context)
    measure = partial(_cache_bytes, context=context, batch_size=batch_size)
    return _measured("cache_bytes", model, groups, kinds, measure)


@checked
def latency_table(
    model: Model,
    groups: Groups,
    *,
    phase: str = "decode",
    kinds: Iterable[str] = DEFAULT_KINDS,
    seq_len: Count = 64,
    batch_size: Count = 1,
    repeats: Count = 10,
) -> CostTable:
    """Latencies in ms on this machine: one token with the KV cache (`"decode"`), or a sequence (`"prefill"`).

    All groups of one shape are cut together, so that the saving exceeds the noise; each gets an equal share.

    Args:
        model: in which the groups were discovered; unchanged.
        groups: what `discover` found.
        phase: `"decode"` or `"prefill"`.
        kinds: in the table; with `"layer"` whole layers too.
        seq_len: tokens of the sequence, or before the one that is decoded.
        batch_size: sequences.
        repeats: timed runs of each model in each of 5 rounds.

    Raises:
        PrunekitError: what `cost` refuses, or a cut that cannot be made.

    Source: lookup tables of latency, as in ZipLM (Kurtic et al. 2023), which times one layer at each width.
    """
    check_choice("phase", phase, PHASES)
    check_length(model, seq_len)
    measure = partial(_milliseconds, phase=phase, seq_len=seq_len, batch_size=batch_size, repeats=repeats)
    return _measured(f"{phase}_ms", model, groups, kinds, measure, SHARES, ROUNDS)


@checked
def check_table(table: CostTable, model: Model, space: PlanSpace, *, n: Count = 8, seed: Seed = 0) -> pd.DataFrame:
    """Compares a cost table with measurements of whole pruned models.

    Args:
        table: a measured table.
        model: the dense model.
        space: where plans are drawn; one of its budgets must use the table.
        n: number of models to build.
        seed: seed of the random plans.

    Returns:
        One row per model: expected, measured, error (relative to what is measured).

    Raises:
        PrunekitError: a counted table, or a table of none of the space's budgets.
    """
    if table.measure is None:
        raise PrunekitError(f"{table.name} are counted, not measured; give a table of latency_table(…) or mac_table(…)")
    rows = []
    for point in tqdm(space.sample(n, np.random.default_rng(seed)), desc="checking", leave=False, delay=1):
        costs = space.costs(point)
        if table.name not in costs:
            raise PrunekitError(f"the space has no budget of {table.name}; give one with [table.at_most(…)]")
        small = prune(model, space.plan(point), measure=False)
        measured = float(np.median([table.measure(small) for _ in range(ROUNDS)]))
        rows.append((costs[table.name], measured, costs[table.name] / measured - 1))
    return pd.DataFrame(rows, columns=["expected", "measured", "error"])


def _measured(
    name: str,
    model: nn.Module,
    groups: Groups,
    kinds: Iterable[str],
    measure: Measure,
    shares: Sequence[float] = (1.0,),
    rounds: int = 1,
) -> CostTable:
    """The table, measured by cutting all groups of one shape to each share."""
    cuts = [(alike, number) for alike in _alike(groups, tuple(kinds)) for number in _numbers(alike, shares)]
    dense: list[float] = []
    found: dict[str, dict[int, float]] = {}
    for alike, number in tqdm(cuts, desc=name, unit="width", leave=False, delay=1):
        chosen = alike if alike[0].n_units > 1 else alike[1::2]  # some layers must stay
        small = prune(model, plan_without(groups, {group.name: range(number) for group in chosen}, {}), measure=False)
        pairs = [(measure(model), measure(small)) for _ in range(rounds)]
        dense += [whole for whole, _ in pairs]
        saved = float(np.median([whole - cut for whole, cut in pairs])) / len(chosen)
        for group in alike:
            found.setdefault(group.name, {0: 0.0})[number] = saved
    sizes = {group.name: group.n_units for group in groups}
    return CostTable(name, float(np.median(dense)), {g: _filled(sizes[g], at) for g, at in found.items()}, measure)


def _filled(n_units: int, at: Mapping[int, float]) -> np.ndarray:
    """The saving for every number of units, interpolated and non-decreasing."""
    numbers = sorted(at)
    known = np.maximum.accumulate([at[number] for number in numbers])
    every = np.interp(np.arange(n_units + 1), numbers, known)
    if numbers[-1] < n_units:  # the last units go at the rate of those before
        every[-1] = every[-2] + (known[-1] - known[-2]) / (numbers[-1] - numbers[-2])
    return every


def _alike(groups: Groups, kinds: tuple[str, ...]) -> Iterable[list[CoupledGroup]]:
    """Lists of groups with the same kind and shape."""
    found: dict[tuple, list[CoupledGroup]] = {}
    for group in groups.of_kind(*kinds):
        if group.exact:
            shapes = tuple((m.dim, m.width, groups.shapes[m.parameter]) for m in group.members)
            found.setdefault((group.kind, group.n_units, shapes), []).append(group)
    if not found:
        raise PrunekitError(f"no exact group of {', '.join(kinds)} is in this model; give other kinds")
    return found.values()


def _numbers(alike: list[CoupledGroup], shares: Sequence[float]) -> list[int]:
    """How many units each of these groups loses; nothing for the only layer or block, or a single KV head."""
    n_units = alike[0].n_units
    if n_units == 1:
        return [1] if len(alike) > 1 and alike[0].kind in WHOLE_KINDS else []
    return sorted({min(round(share * n_units), n_units - 1) for share in shares} - {0})


def _macs(model: nn.Module, *, seq_len: int) -> float:
    with evaluating(model), torch.no_grad():
        return float(count_macs(model, random_tokens(model, 1, seq_len)))


def _weight_bytes(model: nn.Module) -> float:
    return float(sum(p.numel() * p.element_size() for p in model.parameters()))


def _cache_bytes(model: Any, *, context: int, batch_size: int) -> float:
    ids = random_tokens(model, 1, _SHORT)
    with evaluating(model), torch.no_grad():
        cache = next(iter(cache_of(model, ids).values()), None)
    layers = getattr(cache, "layers", ())
    found = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    kept = [tensor for tensor in found if tensor is not None]
    if not kept:
        raise PrunekitError(f"a {type(model).__name__} keeps no keys and values; give another budget")
    return float(sum(t.numel() * t.element_size() for t in kept)) * context * batch_size / _SHORT


def _milliseconds(model: nn.Module, *, phase: str, seq_len: int, batch_size: int, repeats: int) -> float:
    run = time_decode if phase == "decode" else time_prefill
    with evaluating(model), torch.no_grad():
        return run(model, random_tokens(model, batch_size, seq_len), repeats).median
