"""Bridges gaps of removed layers by a linear map that is merged into the layer in front of each gap."""

import math
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from prunekit.calibration import check_tokens, in_batches, mean_loss
from prunekit.discovery.parts import outermost_elements
from prunekit.importance.input_statistics import computing_wide, linear_readers, wide
from prunekit.layerwise import first_float
from prunekit.models import evaluating
from prunekit.pruning.compensation import SavedWeights, judged, oriented, refit_layer, split_windows, token_weights
from prunekit.pruning.least_squares import Fit, choose
from prunekit.pruning.plans import PruningPlan

_NUDGE = 0.5  # added to outputs, to see whether they reach the residual stream as they are


@dataclass(frozen=True)
class Gap:
    """Layers that go, one behind the other.

    Attributes:
        before: path of the last layer in front of them, in the dense model.
        last: path of the last of them.
        writer: path of the linear layer in `before` that is the last to write the residual stream.
    """

    before: str
    last: str
    writer: str


@torch.no_grad()
def bridge(small: nn.Module, model: nn.Module, plan: PruningPlan, calib: Tensor) -> pd.DataFrame:
    """Fits what removed layers added to the residual stream, in place.

    The last linear layer in front of a gap writes M to the residual stream, and the layers of the gap add Y to it. With
    Δ = argmin ‖Y - MΔ‖² the outputs of that linear layer become M(1 + Δ), which is merged into its weights: the model
    does not grow. M and Y are those of the dense model; the ridge is chosen on held-out windows, massive tokens are
    held down, and the loss on these windows judges, all as in `compensate`.

    A gap with no layer in front of it is left, and so is one whose layer in front norms or scales what its last linear
    layer gives, and every gap where the residual stream is narrower too.

    Args:
        small: the cut model.
        model: the dense model.
        plan: by which it was cut.
        calib: integers (n_samples, seq_len).

    Returns:
        One row per gap in the form of `compensate`, also at the end of `small.compensation`: module is the path in the
        cut model, inputs the width of M; of a gap that is left, the last layer of it that went, and 0 inputs.

    Raises:
        PrunekitError: bad tokens, or a map that is not finite.

    Source: ReplaceMe (Shopkhoev et al. 2025), which fits h + MT to the stream behind the gap. Differs: the ridge draws
        towards no change and is chosen on held-out tokens; a map that does not help there is not applied.
    """
    tokens = check_tokens(calib, model)
    learnt, held = split_windows(tokens)
    gaps, left = gaps_of(model, plan, tokens[:1])
    rows: list[tuple[Any, ...]] = [(last, 0, math.nan, math.nan, math.nan) for last in left]
    places, old, before = counterparts(small, model, plan), SavedWeights(small), None
    if gaps:
        sums = _sums(model, gaps, learnt)
        judges = [None] * len(gaps) if held is None else _sums(model, gaps, held)
        before = None if held is None else mean_loss(small, held)
        for gap, found, judge in zip(gaps, sums, judges, strict=True):
            choice = choose(found, judge, "weights", None)
            path = places[gap.before] + gap.writer.removeprefix(gap.before)
            if choice.change is not None:
                old.change(path, partial(_apply, change=choice.change))
            rows.append((path, found.cross.shape[1], *choice[1:]))
    return noted(small, judged(rows, small, old, before, held))


def noted(small: Any, table: pd.DataFrame) -> pd.DataFrame:
    """The table, once it stands behind what was fitted before."""
    fitted = getattr(small, "compensation", None)  # of units
    small.compensation = table if fitted is None else pd.concat([fitted, table], ignore_index=True)
    return table


def gaps_of(model: nn.Module, plan: PruningPlan, window: Tensor) -> tuple[list[Gap], list[str]]:
    """The gaps that a plan leaves and that can be bridged, and the last layers of the others.

    Args:
        model: the dense model.
        plan: what goes.
        window: integers (1, seq_len), on which writers are found: a number added to their outputs is added to the
            residual stream behind their layer.
    """
    found: list[Gap] = []
    left: list[str] = []
    narrows = "hidden" in plan.cut_kinds
    for before, last in spans_of(model, plan):
        writer = None if before is None or narrows else _writer(model, before, window)
        if before is None or writer is None:
            left.append(last)
        else:
            found.append(Gap(before, last, writer))
    return found, left


def spans_of(model: nn.Module, plan: PruningPlan) -> list[tuple[str | None, str]]:
    """For each run of layers that go, the last layer in front of it and the last of it."""
    found: list[tuple[str | None, str]] = []
    before: str | None = None
    last: str | None = None
    gone = plan.removed_layers
    for path in [*outermost_elements(model), None]:
        if path in gone:
            last = path
            continue
        if last is not None:
            found.append((before, last))
        before, last = path, None
    return found


def counterparts(small: nn.Module, model: nn.Module, plan: PruningPlan) -> dict[str, str]:
    """Path of each layer that stays, in the dense model → in the cut one."""
    gone = plan.removed_layers
    stay = [path for path in outermost_elements(model) if path not in gone]
    return dict(zip(stay, outermost_elements(small), strict=True))


def _apply(module: Any, change: Tensor) -> None:
    """Change a linear layer's outputs y to y(1 + Δ), and where it has a bias by a constant, the change's last row."""
    (reader,) = linear_readers(module).values()
    delta = change[: change.shape[1]]
    rows = [oriented(module, reader) @ delta]
    if module.bias is not None:
        rows.append((wide(module.bias).double() @ delta + change[-1])[None])
    refit_layer(module, reader, torch.cat(rows))


def _sums(model: nn.Module, gaps: list[Gap], tokens: Tensor) -> list[Fit]:
    """The sums of each gap's least squares over all tokens."""
    fits: dict[int, Fit] = {}

    def add(seen: dict[str, Tensor]) -> None:
        for number, gap in enumerate(gaps):
            written, before, after = (seen[path].flatten(0, -2) for path in (gap.writer, gap.before, gap.last))
            fit = _fit(written, before, after, model.get_submodule(gap.writer).bias is not None)
            fits[number] = fit if number not in fits else fits[number] + fit

    watch(model, {path for gap in gaps for path in (gap.before, gap.last, gap.writer)}, tokens, add)
    return list(fits.values())


def watch(model: Any, paths: Collection[str], tokens: Tensor, note: Callable[[dict[str, Tensor]], None]) -> None:
    """Give the outputs of some modules for each batch of tokens."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for path in paths:
            stack.callback(model.get_submodule(path).register_forward_hook(_keeping(seen, path)).remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(computing_wide(model))
        for batch in tqdm(in_batches(tokens), desc="gaps", leave=False, delay=1):
            model(input_ids=batch, use_cache=False)
            note(seen)


def _fit(written: Tensor, before: Tensor, after: Tensor, biased: bool) -> Fit:
    weights = token_weights(before)
    x = torch.cat([written, torch.ones_like(written[:, :1])], 1) if biased else written
    x, y, whole = (wide(part).double() * weights for part in (x, after - before, after))
    return Fit(x.T @ x, x.T @ y, biased, float(y.square().sum()), float(whole.square().sum()))


def _keeping(seen: dict[str, Tensor], path: str) -> Any:
    def keep(_module: nn.Module, _args: Any, result: Any) -> None:
        stream = first_float(result)
        assert stream is not None  # layers and linear layers return one
        seen[path] = stream

    return keep


def _writer(model: Any, layer: str, window: Tensor) -> str | None:
    """The last linear layer of a layer whose outputs are added to the residual stream as they are; None without one."""
    seen: dict[str, Tensor] = {}
    order: list[str] = []
    with evaluating(model), computing_wide(model), ExitStack() as hooks:
        hooks.callback(model.get_submodule(layer).register_forward_hook(_keeping(seen, layer)).remove)
        for path in (name.removesuffix(".weight") for name in linear_readers(model) if name.startswith(f"{layer}.")):
            noting = model.get_submodule(path).register_forward_hook(lambda *_, path=path: order.append(path))
            hooks.callback(noting.remove)
        model(input_ids=window, use_cache=False)
        plain = seen[layer]
        for path in [path for path in dict.fromkeys(reversed(order)) if order.count(path) == 1]:
            nudge = model.get_submodule(path).register_forward_hook(lambda _module, _args, result: result + _NUDGE)
            try:
                model(input_ids=window, use_cache=False)
            finally:
                nudge.remove()
            if seen[layer].shape == plain.shape and torch.allclose(seen[layer], plain + _NUDGE, 1e-5, 1e-2 * _NUDGE):
                return path
    return None
