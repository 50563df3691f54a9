"""HyWIA (Liu et al., arXiv 2403.10799; AAAI 2025): coarse and fine importance, fused adaptively group by group."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from prunekit.checks import Model, Share, Tokenizer, checked
from prunekit.discovery import discover
from prunekit.documents import TextSource
from prunekit.gradients import gather_gradients
from prunekit.importance import FusedScores, HyWIA, Taylor, fuse, score
from prunekit.importance.fusion import Rule
from prunekit.pruning import PruningPlan, plan, prune
from prunekit.pruning.plan_options import DEFAULT_KINDS, check_options
from prunekit.recipes.llm_pruner import spared_layers
from prunekit.recovery import LoRA, recover


class Fused(NamedTuple):
    """The result of the recipe.

    Attributes:
        model: the smaller one, recovered where there were data to recover with.
        plan: by which it was cut.
        scores: fused; `scores.weight_table()` has the weights of both estimates, one row per group.
    """

    model: Any
    plan: PruningPlan
    scores: FusedScores


@checked
def hywia(
    model: Model,
    calib: Tensor,
    pruning_ratio: Share = 0.25,
    *,
    rule: Rule = "attention",
    order: str = "first",
    layers: Iterable[int] | None = None,
    data: Tensor | TextSource | None = None,
    tokenizer: Tokenizer | None = None,
    recovery: LoRA | None = None,
) -> Fused:
    """Prunes as HyWIA does: two estimates per group, adaptive fusion, plan, prune, recover.

    Args:
        model: the dense model; unchanged.
        calib: integers (n_samples, seq_len).
        pruning_ratio: share of the heads and FFN channels of `layers` that is removed.
        rule: how the weights of a group's two estimates are found, as in `fuse`.
        order: of both estimates, as in `Taylor`.
        layers: those that are cut; None as in `llm_pruner`.
        data: to recover with, as for `recover`; None leaves the model untuned.
        tokenizer: needed where `data` is text.
        recovery: how; None is LLM-Pruner's, `LoRA.paper()`.

    Returns:
        The smaller model, the plan, and the scores with their weights.

    Raises:
        PrunekitError: what `fuse`, `score`, `plan`, `prune` and `recover` raise.

    Source: the paper's four steps. Reconstructed: the fusion rule, which the paper does not write out.
    """
    HyWIA(rule, order)  # checks it before anything is computed
    check_options(pruning_ratio, of="units")
    groups = discover(model)
    spared = spared_layers(groups, layers)
    units = groups.of_kind(*DEFAULT_KINDS)
    names = {member.parameter for group in units for member in group.members}
    gradients = gather_gradients(model, calib, names, second=order != "first")  # one pass for both estimates
    coarse, fine = (score(model, units, Taylor(granularity, order), gradients) for granularity in ("vector", "element"))
    scores = fuse(coarse, fine, rule)
    chosen = plan(groups, scores, pruning_ratio, of="units", protect_layers=spared)
    small = prune(model, chosen)
    if data is not None:
        small = recover(small, recovery or LoRA.paper(), data, tokenizer=tokenizer, inplace=True)
    return Fused(small, chosen, scores)
