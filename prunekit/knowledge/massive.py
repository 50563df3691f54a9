"""Massive activations: the few very large values in the residual stream, and the units that write them."""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from prunekit.calibration import check_tokens, in_batches
from prunekit.checks import Model, checked
from prunekit.discovery.constants import leaves
from prunekit.discovery.groups import CoupledGroup, Groups
from prunekit.errors import PrunekitError
from prunekit.importance.input_statistics import linear_readers, sums_over_inputs, wide
from prunekit.knowledge.ablation_sets import consumed
from prunekit.models import evaluating, written_out

TIMES = 100  # a token is massive where one of its activations is so many times the layer's median |h|
FIRST = 8  # attention sinks lie on the first tokens, so the attention of later ones is measured


@dataclass(frozen=True, eq=False)
class MassiveActivations:
    """Massive activations by layer, the attention to the first token, and the units that write the largest one.

    Attributes:
        layers: one row per layer, indexed by its number: `largest` and `median` of |h| in the residual stream after the
            layer, over all tokens and channels (the median is the mean over batches); `position` and `channel` of the
            largest; `n_massive`, the tokens with an activation of more than 100 times the median;
            `attention_to_first`, the share of attention that tokens after the eighth give to the first one inside the
            layer, mean over heads (NaN where it has no attention).
        writers: one row per unit of one layer, with what it adds to the largest activation: columns group, unit,
            written, share (of the activation; earlier layers write the rest); the largest |written| first. Units that
            no linear layer consumes, such as those of experts fused into one tensor, have no row. Where a norm stands
            between the unit and the stream, written is what goes into that norm.
        layer: number of the layer in `writers`; by default the one whose `largest` is the largest multiple of the
            `largest` of the layer before.
        n_tokens: number of tokens measured.
    """

    layers: pd.DataFrame
    writers: pd.DataFrame
    layer: int
    n_tokens: int

    def __repr__(self) -> str:
        at, row = self.writers.iloc[0], self.layers.loc[self.layer]
        return (
            f"MassiveActivations(|h| reaches {row['largest']:,.0f} after layer {self.layer}, median "
            f"{row['median']:.2g}; unit {at['unit']} of {at['group']!r} writes {at['share']:.0%} of it)"
        )

    def _repr_html_(self) -> str:
        return str(self.layers.to_html(float_format="{:,.3g}".format, escape=True))


@checked
def massive_activations(
    model: Model, groups: Groups, tokens: Tensor, *, layer: int | None = None
) -> MassiveActivations:
    """Finds massive activations, the attention on the first token, and the units that write the largest one.

    Args:
        model: a causal language model of transformers; unchanged afterwards.
        groups: of `discover(model)`; its heads and FFN channels are the units.
        tokens: integers (n_samples, seq_len), more than 8 a sample.
        layer: the layer whose units are listed; None takes the layer after which the largest |h| grows most.

    Returns:
        A `MassiveActivations`.

    Raises:
        PrunekitError: samples of 8 tokens or less, no whole layers or units in `groups`, or no layer of that number.

    Source: Sun et al. (2024), "Massive Activations in Large Language Models"; Xiao et al. (2023) for the attention on
        the first token. The split by units is ours.
    """
    tokens = check_tokens(tokens, model)
    whole = groups.of_kind("layer")
    paths = {group.layer: group.name.removesuffix(":layer") for group in whole}
    if not whole or len(paths) < len(whole):
        raise PrunekitError(
            f"{len(whole)} whole layers were discovered, {len(paths)} with a number of their own; this "
            "analysis needs one stack of layers, as discover(model) finds it in a causal language model"
        )
    if layer is not None and layer not in paths:
        raise PrunekitError(f"layer={layer} is not in the model; give one of {', '.join(map(str, paths))}, or None")
    if tokens.shape[1] <= FIRST:
        raise PrunekitError(f"samples have {tokens.shape[1]} tokens; give more than {FIRST} a sample")
    peaks = {number: _Peak() for number in paths}
    with evaluating(model), written_out(model), torch.no_grad(), ExitStack() as hooks:
        for number, path in paths.items():
            module = model.get_submodule(path)
            hooks.enter_context(module.register_forward_hook(peaks[number].see))
            for part in module.modules():
                hooks.enter_context(part.register_forward_hook(peaks[number].attend))
        for batch in in_batches(tokens):
            model(input_ids=batch, use_cache=False)
    table = pd.DataFrame({number: peak.told() for number, peak in peaks.items()}).T.rename_axis("layer")
    table = table.astype(dict.fromkeys(("sample", "position", "channel", "n_massive"), int))
    if layer is None:
        layer = int((table["largest"] / table["largest"].shift()).fillna(1).idxmax())
    at = table.loc[layer]
    units = [g for g in groups.of_kind("kv_head", "ffn_channel") if g.layer == layer]
    row = tokens[int(at["sample"])][None]
    writers = written_by(model, units, row, position=int(at["position"]), channel=int(at["channel"]))
    writers["share"] = writers["written"] / peaks[layer].value
    return MassiveActivations(table.drop(columns="sample"), writers, layer, tokens.numel())


class _Peak:
    """Collects the statistics of one layer over all batches; see `MassiveActivations.layers`."""

    def __init__(self) -> None:
        self.value, self.where, self.seen, self.massive = 0.0, (0, 0, 0), 0, 0
        self.medians: list[float] = []
        self.shares: list[float] = []

    def see(self, _module: nn.Module, _args: Any, result: Any) -> None:
        h = wide(next(tensor for _, tensor in leaves((result,), {})))  # (B, T, d_model)
        size = h.abs()
        median = float(size.median())
        row, position, channel = (int(i) for i in torch.unravel_index(size.argmax(), h.shape))
        if float(size[row, position, channel]) > abs(self.value):
            self.value, self.where = float(h[row, position, channel]), (self.seen + row, position, channel)
        self.medians.append(median)
        self.massive += int((size.amax(-1) > TIMES * median).sum())
        self.seen += len(h)

    def attend(self, _module: nn.Module, _args: Any, result: Any) -> None:
        """Attention weights (B, H, T, T) that a module returns beside its output, as the eager implementation does."""
        for weights in result if isinstance(result, tuple) else ():
            if isinstance(weights, Tensor) and weights.ndim == 4 and weights.shape[-1] == weights.shape[-2] > FIRST:
                self.shares.append(float(weights[:, :, FIRST:, 0].mean()))

    def told(self) -> dict[str, float]:
        median = sum(self.medians) / len(self.medians)
        where = dict(zip(("sample", "position", "channel"), self.where, strict=True))
        share = sum(self.shares) / len(self.shares) if self.shares else float("nan")
        told = {"largest": abs(self.value), "median": median, **where, "n_massive": self.massive}
        return {**told, "attention_to_first": share}


def written_by(
    model: nn.Module, groups: Iterable[CoupledGroup], tokens: Tensor, *, position: int, channel: int
) -> pd.DataFrame:
    """What each unit adds, through its consumer layer, to one channel of the residual stream at one token.

    Args:
        model: a causal language model.
        groups: the groups of the units.
        tokens: integers (1, seq_len).
        position: position of the token.
        channel: channel of the residual stream.

    Returns:
        One row per unit: group, unit, written; the largest |written| first.

    Raises:
        PrunekitError: no linear layer consumes a unit of these groups, or what it reads is not finite.
    """
    readers = linear_readers(model)
    read = [(group.name, member) for group in groups for member in consumed(group, readers)]
    if not read:
        raise PrunekitError("no linear layer consumes heads or FFN channels there; give groups of discover(model)")
    wanted = {member.parameter: readers[member.parameter] for _, member in read}
    inputs = sums_over_inputs(model, tokens, wanted, lambda x: x[position])  # of one sample: parameter → (n_in,)
    rows: list[tuple[str, int, float]] = []
    for name, member in read:
        weight = wide(model.get_parameter(member.parameter).detach()).select(1 - member.dim, channel)  # (n_in,)
        written = (inputs[member.parameter] * weight)[member.index.to(weight.device)].sum(dim=1)
        rows += [(name, unit, value) for unit, value in enumerate(written.tolist())]
    table = pd.DataFrame(rows, columns=["group", "unit", "written"])
    return table.sort_values("written", key=abs, ascending=False, ignore_index=True)
