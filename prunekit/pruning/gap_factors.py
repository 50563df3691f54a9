"""Makes up for the size that removed layers gave the residual stream, by a factor that is merged into weights."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from prunekit.calibration import check_tokens, mean_loss
from prunekit.discovery import discover
from prunekit.discovery.parts import outermost_elements
from prunekit.errors import PrunekitError
from prunekit.importance.input_statistics import computing_wide, linear_readers, wide
from prunekit.layerwise import Layerwise
from prunekit.models import evaluating
from prunekit.pruning.compensation import SavedWeights, judged, split_windows, token_weights
from prunekit.pruning.gaps import counterparts, noted, spans_of, watch
from prunekit.pruning.plans import PruningPlan

_ALIKE = 0.02  # of what a layer adds, by which the epsilon of a norm may change it where the stream is doubled


@torch.no_grad()
def rescale(small: nn.Module, model: nn.Module, plan: PruningPlan, calib: Tensor) -> pd.DataFrame:
    """Makes up for the size that removed layers gave the residual stream, in place.

    The stream h behind a gap is larger by α than in front of it: the mean over channels of E|h_behind| / E|h_front|, in
    the dense model, over tokens. Where all that reads the stream norms it first, h times α is to a layer as h while
    what the layers add is divided by α. So the linear layers behind the gap that write the stream are divided by α,
    their biases too: the model does not grow, and a tied embedding stays as it is.

    Each layer behind a gap is tried first: with its linear layers divided by 2 it must do to h what it did to 2h. Where
    one fails, as with norms behind its blocks or with experts, all gaps are left as they are. So is a gap with no layer
    in front of it, and every gap where the residual stream is narrower too. The loss on held-out windows judges, as in
    `bridge`.

    Args:
        small: the cut model.
        model: the dense model.
        plan: by which it was cut.
        calib: integers (n_samples, seq_len).

    Returns:
        One row per gap as `bridge` has them, with α as `factor`; module is the path of the layer in front of the gap,
        and errors are ‖h_behind − h_front‖² / ‖h_behind‖², then with α·h_front. It is at the end of
        `small.compensation` too.

    Raises:
        PrunekitError: bad tokens, or a residual stream that is not finite.

    Source: Prune&Comp (Chen et al., AAAI 2026; arXiv 2507.18212), magnitude compensation. Differs: it multiplies the
        embedding and all linear layers in front of the gap by α, which is the same but for the epsilon of norms, and
        would scale a tied head; it removes layers one at a time and measures each α in the model compensated so far,
        here all are measured in the dense model; and there nothing is taken back.
    """
    tokens = check_tokens(calib, model)
    learnt, held = split_windows(tokens)
    places, order, writers = counterparts(small, model, plan), outermost_elements(small), _writers(small)
    spans, narrows = spans_of(model, plan), "hidden" in plan.cut_kinds
    front = {last: before for before, last in spans if before is not None and not narrows}
    behind = {last: order[order.index(places[path]) + 1 :] for last, path in front.items()}
    if not _takes_factors(small, writers, {path for paths in behind.values() for path in paths}, tokens[:1]):
        front = {}
    sizes = _sizes(model, front, learnt)
    judges = sizes if held is None else _sizes(model, front, held)
    before, old, factors = None if held is None else mean_loss(small, held), SavedWeights(small), dict[str, float]()
    for last in front:
        for path in behind[last]:
            factors[path] = factors.get(path, 1.0) * sizes[last].factor
    for path in (path for path in factors if factors[path] != 1):
        for writer in writers[path]:
            old.change(writer, partial(_divide, by=factors[path]))
    rows = [(places[path], sizes[last].n, math.nan, *judges[last].errors(sizes[last])) for last, path in front.items()]
    rows += [(last, 0, math.nan, math.nan, math.nan) for _, last in spans if last not in front]
    table = judged(rows, small, old, before, held)
    table["factor"] = [size.factor for size in sizes.values()] + [math.nan] * (len(rows) - len(front))
    return noted(small, table)


@dataclass(frozen=True, eq=False)
class _Sizes:
    """Sums over tokens of the residual stream around a gap, float64.

    Attributes:
        channels: of |h|, (2, d_model): in front of the gap, and behind it.
        products: ‖h_front‖², h_front · h_behind and ‖h_behind‖², large tokens held down.
    """

    channels: Tensor
    products: Tensor

    def __add__(self, other: "_Sizes") -> "_Sizes":
        return _Sizes(self.channels + other.channels, self.products + other.products)

    @property
    def n(self) -> int:
        """Width of the stream."""
        return self.channels.shape[1]

    @property
    def factor(self) -> float:
        """α, by which the stream is larger behind the gap."""
        front, behind = self.channels
        return float((behind / front.clamp_min(torch.finfo(front.dtype).tiny)).mean())

    def errors(self, learnt: "_Sizes") -> tuple[float, float]:
        """The error on these tokens without a factor, and with the one from others."""
        front, both, behind = self.products.tolist()
        first, second = (behind - 2 * factor * both + factor**2 * front for factor in (1.0, learnt.factor))
        return first / behind, second / behind


def _sizes(model: nn.Module, front: dict[str, str], tokens: Tensor) -> dict[str, _Sizes]:
    """Last layer of each gap → its sums; `front` has the layers in front of it."""
    found: dict[str, _Sizes] = {}

    def add(seen: dict[str, Tensor]) -> None:
        for last, before in front.items():
            x, y = (wide(seen[path].flatten(0, -2)).double() for path in (before, last))
            channels = torch.stack([part.abs().sum(0) for part in (x, y)])
            weights = token_weights(x)
            x, y = x * weights, y * weights
            products = torch.stack([(a * b).sum() for a, b in ((x, x), (x, y), (y, y))])
            then = found.get(last)
            found[last] = _Sizes(channels, products) if then is None else then + _Sizes(channels, products)

    if front:
        watch(model, {*front, *front.values()}, tokens, add)
    for last, sizes in found.items():
        if not (math.isfinite(sizes.factor) and sizes.factor > 0):
            raise PrunekitError(
                f"the residual stream around {last} is not finite: load the model in float32 or bfloat16"
            )
    return found


def _writers(small: nn.Module) -> dict[str, list[str]]:
    """Layer → its linear layers whose outputs are hidden channels."""
    hidden = {(m.parameter, m.dim) for group in discover(small).of_kind("hidden") for m in group.members}
    linear = linear_readers(small).items()
    paths = [name.removesuffix(".weight") for name, reader in linear if (name, 1 - reader.input_dim) in hidden]
    return {layer: [path for path in paths if path.startswith(f"{layer}.")] for layer in outermost_elements(small)}


def _takes_factors(small: nn.Module, writers: dict[str, list[str]], layers: Collection[str], window: Tensor) -> bool:
    """Whether each of these layers, its writers halved, gives for h half of what it gave for 2h, and the head norms."""
    with evaluating(small), computing_wide(small):
        chain = Layerwise.of(small, [window])
        if chain is None:
            return False
        for number, path in enumerate(chain.layers):
            if path not in layers:
                continue
            (stream,), old = chain.streams(number), SavedWeights(small)
            wanted = chain.run(number, 0, 2 * stream) / 2
            for writer in writers[path]:
                old.change(writer, partial(_divide, by=2.0))
            found = chain.run(number, 0)
            old.give_back()
            if not (found - wanted).norm() <= _ALIKE * (found - stream).norm():
                return False
        (stream,) = chain.streams(len(chain.layers))
        one, two = (chain.logits(len(chain.layers), 0, times * stream) for times in (1, 2))
        return bool((one - two).norm() <= _ALIKE * one.norm())


def _divide(module: Any, by: float) -> None:
    module.weight.div_(by)
    if module.bias is not None:
        module.bias.div_(by)
