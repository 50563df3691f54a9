"""LLM-Pruner (Ma, Fang and Wang, NeurIPS 2023): discover coupled structures, score them, cut, recover with LoRA."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from prunekit.checks import Count, Model, Share, Tokenizer, check_choice, checked
from prunekit.discovery import Groups, discover
from prunekit.documents import TextSource
from prunekit.errors import PrunekitError
from prunekit.importance import Curvature, Taylor
from prunekit.importance.scoring import AnyImportance
from prunekit.pruning import PruningPlan, plan_in_steps, prune
from prunekit.pruning.plan_options import check_options, default_units
from prunekit.pruning.planning import plan_without
from prunekit.recovery import LoRA, recover

MODES = ("block", "channel", "layer")
ELEMENT1 = Taylor("element", "first")
PAPER = ("block", ELEMENT1, None, "local", None, 1)  # mode, importance, layers, ranking, normalize, n_steps


class Pruned(NamedTuple):
    """The result of a recipe.

    Attributes:
        model: the smaller one, recovered where there were data to recover with.
        plan: by which it was cut.
    """

    model: Any
    plan: PruningPlan


@checked
def llm_pruner(
    model: Model,
    calib: Tensor | None,
    pruning_ratio: Share = 0.25,
    *,
    mode: str = "block",
    importance: AnyImportance = ELEMENT1,
    layers: Iterable[int] | None = None,
    ranking: str = "local",
    normalize: str | None = None,
    n_steps: Count = 1,
    modern: bool = False,
    data: Tensor | TextSource | None = None,
    tokenizer: Tokenizer | None = None,
    recovery: LoRA | None = None,
) -> Pruned:
    """Prune as LLM-Pruner does, and recover. `evaluate(small, tokenizer)` measures as the paper does.

    Args:
        model: the dense model; unchanged.
        calib: integers (n_samples, seq_len), in the paper 10 samples of 64 tokens; None where `importance` reads none.
        pruning_ratio: removed share of the heads and FFN channels of `layers` (block), of the hidden channels
            (channel), of the layers (layer).
        mode: `"block"` cuts heads and FFN channels, `"channel"` the residual stream through the whole model, and
            `"layer"` keeps the first layers and drops the others, whatever the importance.
        importance: `Taylor("vector")` is the paper's `vectorize`, `Taylor()` Element¹, `Taylor(order="second")`
            Element², `Taylor(order="mixed")` both; `Magnitude(p=1)`, `Magnitude(p=2)` and `Random()` its baselines.
        layers: those that block mode cuts; by default all but the first eighth and the last sixteenth, so that of
            32 layers 4 to 29 are cut as in the paper.
        ranking: of block mode. `"local"`: every group loses this share of its units. `"global"`: the units of all
            groups compete for this share of all parameters in those groups, by score per parameter.
        normalize: `"loss"` makes the scores of any importance comparable for `"global"`, as in `score`.
        n_steps: steps of equal size, with scores refreshed between them.
        modern: in block mode, this package's way in place of the paper's: scores by `Curvature`, layers that compete,
            none protected, and consumer layers re-fitted on `calib`. `pruning_ratio` is then of all heads' and FFN
            channels' parameters (of `plan`, it is of the whole model's).
        data: to recover with, as for `recover`; None leaves the model untuned.
        tokenizer: needed where `data` is text.
        recovery: how; None is the paper's, `LoRA.paper()`.

    Returns:
        The smaller model and the plan. The width that channel mode leaves is one that the number of heads divides, so
        that the model saves as a plain checkpoint where the family's configuration has a head size of its own (LLaMA,
        Mistral, Qwen3 and others).

    Raises:
        PrunekitError: an unknown mode, `modern` with another way to choose, or what `score`, `plan`, `prune` and
            `recover` raise.

    Source: sections 3.1 to 3.3 and the released code's `--block_wise`, `--channel_wise` and `--layer_wise`. Differs:
        shares are rounded to the nearest unit (in channel mode down to what the heads divide), the reference's down to
        whole heads; scores are aligned with grouped-query attention; the reference's global ranking compares head sums
        with single channels, and so never removes a head.
    """
    check_choice("mode", mode, MODES)
    check_options(pruning_ratio)
    if modern and (mode, importance, layers, ranking, normalize, n_steps) != PAPER:
        raise PrunekitError(
            "modern=True has an importance, layers and a ranking of its own: leave mode, importance, layers, "
            "ranking, normalize and n_steps out, or set modern=False"
        )
    groups = discover(model)
    if modern:
        importance, layers, ranking = Curvature(), groups.layers, "global"
    if mode == "layer":
        chosen = _first_layers(groups, pruning_ratio)
    else:
        options = _of_channels(model) if mode == "channel" else _of_blocks(groups, layers, ranking)
        share = pruning_ratio * options.pop("share", 1.0)
        options |= {"n_steps": n_steps, "normalize": normalize}
        chosen = plan_in_steps(model, importance, share, calib, **options)
    small = prune(model, chosen, compensate=calib if modern else None)
    if data is not None:
        small = recover(small, recovery or LoRA.paper(), data, tokenizer=tokenizer, inplace=True)
    return Pruned(small, chosen)


def _of_blocks(groups: Groups, layers: Iterable[int] | None, ranking: str) -> dict[str, Any]:
    """Options for a plan that cuts heads and channels of some layers; globally, the share of parameters they hold."""
    spared = spared_layers(groups, layers)
    options = {"protect_layers": spared, "ranking": ranking}
    if ranking == "local":
        return options | {"of": "units"}
    cut = [group for group in default_units(groups) if group.layer not in spared]
    names = {member.parameter for group in cut for member in group.members}
    return options | {"share": sum(math.prod(groups.shapes[name]) for name in names) / groups.n_parameters}


def middle_layers(n_layers: int) -> range:
    """The layers that the paper cuts: not the first eighth and the last sixteenth, of 32 those from 4 to 29."""
    first, last = (max(1, n_layers // part) if n_layers > 2 else 0 for part in (8, 16))
    return range(first, n_layers - last)


def spared_layers(groups: Groups, layers: Iterable[int] | None) -> list[int]:
    """The layers that stay whole; None cuts the middle ones.

    Raises:
        PrunekitError: layers that the model does not have.
    """
    every = groups.layers
    chosen = {every[i] for i in middle_layers(len(every))} if layers is None else set(layers)
    if unknown := chosen - set(every):
        raise PrunekitError(
            f"layers={sorted(unknown)} are not among this model's {len(every)} layers; give numbers from those"
        )
    return [layer for layer in every if layer not in chosen]


def _of_channels(model: Any) -> dict[str, Any]:
    heads = getattr(model.config, "num_attention_heads", 1)
    return {"kinds": ["hidden"], "of": "units", "round_to": {"hidden": heads}}


def _first_layers(groups: Groups, pruning_ratio: float) -> PruningPlan:
    """A plan that keeps the first layers, at least one."""
    layers = groups.of_kind("layer")
    if len(layers) < 2:
        raise PrunekitError(f"{len(layers)} whole layers can go of this model; choose mode='block' or 'channel'")
    gone = layers[len(layers) - min(round(pruning_ratio * len(layers)), len(layers) - 1) :]
    notes = {"pruning_ratio": pruning_ratio, "of": "units", "importance": "the first layers stay"}
    return plan_without(groups, {layer.name: [0] if layer in gone else [] for layer in layers}, notes)
