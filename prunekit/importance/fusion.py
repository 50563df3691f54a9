"""Fuses a coarse and a fine importance, with separate weights for each group (HyWIA)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from prunekit.checks import check_choice, checked
from prunekit.discovery.groups import layer_in
from prunekit.errors import PrunekitError
from prunekit.importance.scores import GradientSource, Scores, SomeGroups
from prunekit.importance.taylor import Taylor

Weights = tuple[float, float]  # of the coarse and of the fine scores
Fusion = Callable[[Tensor, Tensor], Weights]
Rule = str | Weights | Fusion


def attention_weights(coarse: Tensor, fine: Tensor) -> Weights:
    """Attention weights of the coarse and the fine scores of one group.

    With T = [c; f], each divided by its mean over the group's n units, the weights are the column means of
    softmax(T·Tᵀ / n).

    Args:
        coarse: (n_units,).
        fine: (n_units,).

    Source: HyWIA (Liu et al., arXiv 2403.10799). The paper says that attention sets the weights, but not how; this is
        our reconstruction.
    """
    both = torch.stack([coarse, fine]).double()
    both = both / both.mean(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    attention = torch.softmax(both @ both.T / both.shape[1], -1)
    a, b = attention.mean(0).tolist()
    return a, b


def uncertainty_weights(coarse: Tensor, fine: Tensor) -> Weights:
    """Weights in proportion to the inverse means, with sum 1: both estimates then have equal total weight.

    Args:
        coarse: (n_units,).
        fine: (n_units,).

    Source: SAAP (arXiv 2412.15127), homoscedastic uncertainty, which comes to inverse-mean weights.
    """
    c, f = float(coarse.double().mean()), float(fine.double().mean())
    return (f / (c + f), c / (c + f)) if c + f > 0 else (0.5, 0.5)


RULES: dict[str, Fusion] = {"attention": attention_weights, "uncertainty": uncertainty_weights}


class FusedScores(Scores):
    """Fused scores, with the two weights of each group.

    Attributes:
        weights: group name → (coarse, fine).
    """

    weights: Mapping[str, Weights]

    def weight_table(self) -> pd.DataFrame:
        """One row per group: group, kind, layer, coarse, fine."""
        rows = [(name, self.kinds[name], layer_in(name), *self.weights[name]) for name in self]
        return pd.DataFrame(rows, columns=["group", "kind", "layer", "coarse", "fine"])


@checked
def fuse(coarse: Scores, fine: Scores, rule: Rule = "attention") -> FusedScores:
    """A weighted sum of two estimates, with weights for each group.

    Args:
        coarse: such as `Taylor("vector")` gives.
        fine: of the same groups, such as `Taylor("element")` gives.
        rule: `"attention"`, `"uncertainty"`, two fixed weights, or a function of a group's coarse and fine
            scores, (n_units,) each. (1, 0) gives the coarse scores back, (0, 1) the fine ones, to the last bit.

    Returns:
        Scores of the same groups; `weights` are the two weights of each group.

    Raises:
        PrunekitError: an unknown rule, weights that are not two numbers with one above 0, or scores of different
            groups.
    """
    if list(coarse) != list(fine):
        other = next(iter({*coarse} ^ {*fine}), "another order")
        raise PrunekitError(
            f"coarse and fine scores are of other groups ({other}); score the same groups, in one order"
        )
    weights = {name: _weights(rule, coarse[name], fine[name]) for name in coarse}
    values = {name: a * coarse[name] + b * fine[name] for name, (a, b) in weights.items()}
    fused = FusedScores(values, label=f"{coarse.label} + {fine.label}, {_rule_name(rule)}", kinds=coarse.kinds)
    fused.weights = weights
    fused.tokens = getattr(coarse, "tokens", None)
    return fused


def _weights(rule: Rule, coarse: Tensor, fine: Tensor) -> Weights:
    if isinstance(rule, str):
        check_choice("rule", rule, RULES)
        rule = RULES[rule]
    pair: Any = None if callable(rule) else rule
    try:
        pair = rule(coarse, fine) if callable(rule) else rule
        a, b = map(float, pair)
    except Exception as error:  # of any kind, of a rule of one's own
        a = b = float("nan")
        pair = error if pair is None else pair
    if not (0 <= a < float("inf") and 0 <= b < float("inf") and a + b > 0):
        raise PrunekitError(f"rule={rule!r} gives {pair!r}; give two weights, not negative and not both 0: (0.5, 0.5)")
    return a, b


def _rule_name(rule: Rule) -> str:
    return rule if isinstance(rule, str) else getattr(rule, "__name__", str(rule))


@dataclass(frozen=True)
class HyWIA:
    """Taylor importance by row (coarse) and by weight (fine), fused group by group.

    Attributes:
        rule: as in `fuse`.
        order: as in `Taylor`, of both.
        reduction: as in `Taylor`, of both.

    Source: HyWIA (Liu et al., arXiv 2403.10799; AAAI 2025). Differs: the fusion rule is our reconstruction.
    """

    rule: Rule = "attention"
    order: str = "first"
    reduction: str = "sum"

    def __post_init__(self) -> None:
        _weights(self.rule, torch.ones(2), torch.ones(2))
        Taylor(order=self.order, reduction=self.reduction)

    needs_calibration = True  # gradients come from a calibration set

    @property
    def label(self) -> str:
        """Short name for tables and legends."""
        return f"HyWIA {_rule_name(self.rule)}" + ("" if self.order == "first" else f", {self.order}")

    def unit_scores(self, model: nn.Module, groups: SomeGroups, calib: GradientSource) -> FusedScores:
        """Group name → (n_units,), with the fusion weights.

        Raises:
            PrunekitError: an error of `Taylor`.
        """
        fine = Taylor("element", self.order, self.reduction)
        gradients = fine.gathered(model, groups, calib)
        kinds = {group.name: group.kind for group in groups}
        coarse, fine_scores = (
            Scores(taylor.unit_scores(model, groups, gradients), label=taylor.label, kinds=kinds)
            for taylor in (replace(fine, granularity="vector"), fine)
        )
        fused = fuse(coarse, fine_scores, self.rule)
        fused.label = self.label
        return fused
