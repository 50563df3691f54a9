"""Compares the knowledge distributions of several models, with bootstrap intervals: did knowledge move?"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd

from prunekit.checks import Count, Seed, checked
from prunekit.errors import PrunekitError
from prunekit.knowledge.result import KnowledgeDistribution, rows_by, weights_of

KEYS = ["group", "kind", "layer", "ratio", "unit"]
LEVEL = 0.95  # of the intervals


@checked
def compare_knowledge(
    distributions: Mapping[str, KnowledgeDistribution],
    *,
    by: Literal["domain", "task", "tier", "hops"] = "domain",
    measure: Literal["accuracy", "loss"] = "loss",
    n_resamples: Count = 1000,
    seed: Seed = 0,
) -> pd.DataFrame:
    """Compares what each domain loses with each group, between models such as dense, cut and recovered.

    Intervals are 95% percentile intervals of a bootstrap over questions (text windows weigh as many tokens as they
    have). All models answer the same questions, so the interval of `moved` is that of paired differences.

    Args:
        distributions: name → `KnowledgeDistribution`, one or more, of the same questions and with the same ablations;
            the first is the one that the others are compared with. Units of a cut model have new numbers, so compare
            whole groups (`ratios=(1.0,)`), or single units of models with the same plan.
        by: what makes a domain.
        measure: `"loss"` in nats, or `"accuracy"` in [0, 1].
        n_resamples: number of bootstrap samples.
        seed: of the bootstrap.

    Returns:
        One row per model, ablation and domain: model, group, kind, layer, ratio, unit (where single units were
        ablated), `by`, measure, n (questions), intact (the measure without ablation), change (with the ablation −
        intact), low and high (of change), moved (change − that of the first model), moved_low and moved_high. The
        interval of `moved` excludes 0 where sampling of questions alone hardly explains the difference.

    Raises:
        PrunekitError: no distributions, other questions, no ablation in common, or infinite losses.

    Source: percentile bootstrap, Efron and Tibshirani (1993), ch. 13.
    """
    _check_comparable(distributions)
    shared = _shared_rows(distributions)
    first = next(iter(distributions.values()))
    parts = []
    for number, (key, rows) in enumerate(rows_by(first.questions, by, measure).items()):
        counts = _resampled(first.questions.iloc[rows], n_resamples, seed + number)
        parts += _of_domain(distributions, shared, rows, counts, measure, {by: key, "measure": measure})
    return pd.concat(parts, ignore_index=True)


def _check_comparable(distributions: Mapping[str, KnowledgeDistribution]) -> None:
    if not distributions:
        raise PrunekitError("no distributions; give one or more by name, such as {'dense': known, 'cut': other}")
    (name, first), *others = distributions.items()
    for other, each in others:
        if not first.questions[["context", "right", "domain"]].equals(each.questions[["context", "right", "domain"]]):
            raise PrunekitError(
                f"{name!r} and {other!r} were asked different questions; measure both with the same tasks and text"
            )


def _shared_rows(distributions: Mapping[str, KnowledgeDistribution]) -> dict[str, pd.DataFrame]:
    """Name → ablations that all distributions have, in the order of the first, indexed by their row numbers there."""
    keyed = {name: _keyed(each) for name, each in distributions.items()}
    common = set.intersection(*(set(rows) for rows in keyed.values()))
    order = [key for key in next(iter(keyed.values())) if key in common]
    if not order:
        raise PrunekitError(
            "these distributions have no ablation in common; measure whole groups of each: "
            "knowledge_distribution(model, tokenizer, groups, scores, ratios=(1.0,))"
        )
    return {
        name: each.ablations.loc[[keyed[name][key] for key in order]].drop(columns="units")
        for name, each in distributions.items()
    }


def _keyed(known: KnowledgeDistribution) -> dict[tuple[Any, ...], int]:
    columns = [known.ablations[name].tolist() for name in ("group", "ratio", "unit") if name in known.ablations]
    return {tuple(key): row for row, key in enumerate(zip(*columns, strict=True))}


def _resampled(questions: pd.DataFrame, n_resamples: int, seed: int) -> np.ndarray:
    """Weight of each question in the sample itself (first row) and in each resample, rows summing to 1."""
    n = len(questions)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples)
    counts = np.vstack([np.ones(n), drawn]) * weights_of(questions)
    return counts / counts.sum(1, keepdims=True)


def _of_domain(
    distributions: Mapping[str, KnowledgeDistribution],
    shared: Mapping[str, pd.DataFrame],
    rows: np.ndarray,
    counts: np.ndarray,
    measure: str,
    labels: Mapping[str, Any],
) -> list[pd.DataFrame]:
    """The rows of one domain, one table per model."""
    parts: list[pd.DataFrame] = []
    reference: np.ndarray | None = None
    for name, known in distributions.items():
        table = shared[name]
        values, intact = (known.hit, known.dense_hit) if measure == "accuracy" else (known.loss, known.dense_loss)
        change = values[np.ix_(table.index, rows)].astype(float) - intact[rows].astype(float)  # (ablations, questions)
        if not np.isfinite(change).all():
            raise PrunekitError(f"{name!r} has losses that are not finite; give measure='accuracy'")
        means = counts @ change.T  # (1 + n_resamples, ablations)
        reference = means if reference is None else reference
        moved = means - reference
        parts.append(
            table.reset_index(drop=True)[[key for key in KEYS if key in table]].assign(
                **labels, n=len(rows), intact=float(counts[0] @ intact[rows]),
                change=means[0], **_interval("", means), moved=moved[0], **_interval("moved_", moved),
            )
        )  # fmt: skip
        parts[-1].insert(0, "model", name)
    return parts


def _interval(prefix: str, means: np.ndarray) -> dict[str, np.ndarray]:
    low, high = np.quantile(means[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return {f"{prefix}low": low, f"{prefix}high": high}


@checked
def domain_needs(
    known: KnowledgeDistribution, by: Literal["domain", "task", "tier", "hops"] = "domain"
) -> dict[Any, pd.DataFrame]:
    """What each domain needs, by a distribution that was measured before: the mean rise of its loss, with intervals.

    Args:
        known: a distribution of single units (`knowledge_of_units`) or of whole groups; groups that were ablated in
            part are left out.
        by: what makes a domain.

    Returns:
        Domain → a table for `plot_needs`: group, kind, layer, unit, dense and value (the negative loss), fall (the rise
        of the loss), low and high (95% interval of fall), measure.

    Raises:
        PrunekitError: what `compare_knowledge` raises, or groups that were ablated in part alone.
    """
    table = compare_knowledge({"dense": known}, by=by)
    if "unit" not in table:
        table = table[table["ratio"] == 1]
        if table.empty:
            raise PrunekitError("no group was ablated as a whole; measure knowledge_distribution with ratios=(1.0,)")
    found = table.assign(
        unit=pd.array(table["unit"] if "unit" in table else [None] * len(table), dtype="Int64"),
        dense=-table["intact"], value=-table["intact"] - table["change"], fall=table["change"], measure="domain",
    )[["group", "kind", "layer", "unit", "dense", "value", "fall", "low", "high", "measure", by]]  # fmt: skip
    return {
        key: rows.drop(columns=by).sort_values("fall", ascending=False, kind="stable", ignore_index=True)
        for key, rows in found.groupby(by, sort=False)
    }
