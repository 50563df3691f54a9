"""Accuracy predictor: gradient-boosted trees that predict a metric from a candidate, and their validation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pandas as pd
from scipy.stats import kendalltau, spearmanr

from prunekit.annotations import Rule, is_real
from prunekit.checks import Count, Length, Seed, check_fields, check_value
from prunekit.errors import PrunekitError
from prunekit.search.pairs import Pairs
from prunekit.search.space import Point, Space

BETTER = 0.05  # share of the distance from best to median: how much better a value could still be
FEWEST = 10  # samples that a fit needs
TOP = 10  # most promising candidates, for the regret
Rate = Annotated[float, Rule(lambda value: is_real(value) and 1e-6 <= value <= 1, "a number from 1e-6 to 1")]


@dataclass(frozen=True)
class Trees:
    """Hyperparameters of the boosted trees.

    Attributes:
        n_models: number of boosted models, each trained on samples drawn with replacement; predictions are their mean.
            1 trains on all samples, as the papers do.
        n_trees: trees in each model.
        n_leaves: leaves of each tree, at most.
        learning_rate: factor on each tree's correction.
        min_pairs: least number of samples in a leaf.
        seed: random seed.

    Source: GBDT-NAS (Luo et al. 2020): 100 trees of 31 leaves at .05, with LightGBM's default of 20 samples a leaf, of
        thousands; here there are hundreds. Several models, and thresholds drawn at random (extremely randomized trees,
        Geurts et al. 2006), are ours: with best-fit thresholds, all candidates in a leaf get
        the same prediction, so the best of them cannot be ranked.
    """

    n_models: Count = 10
    n_trees: Count = 200
    n_leaves: Length = 31
    learning_rate: Rate = 0.05
    min_pairs: Count = 2
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)


class AccuracyPredictor:
    """Predicts the metric of a candidate from measured candidates; lower is better.

    Boosted trees work well on hundreds of samples with numbers and choices, and LightGBM computes exact SHAP values.

    The target is the logarithm of the distance to a value slightly better than the best sample. Most random candidates
    are far from the best, and a squared error on plain values would be spent on them.

    Source: Ji et al. (arXiv 2309.09507), a gradient-boosted-tree regressor. Reconstructed: its features and settings,
        for which see `Trees`; the logarithm is ours.
    """

    def __init__(self, space: Space, trees: Trees | None = None) -> None:
        """A predictor that is not fitted yet.

        Args:
            space: the space of the candidates.
            trees: how the trees are grown; None is `Trees()`.
        """
        self.space, self.trees = space, trees or Trees()
        self._models: list[Any] = []
        self._floor = 0.0

    def fit(self, points: Sequence[Point], values: Sequence[float] | np.ndarray) -> "AccuracyPredictor":
        """Fit the trees to candidates and their measured values; lower is better.

        Raises:
            PrunekitError: fewer than 10 samples, or values that are not finite.
        """
        import lightgbm  # slow import, needed only here

        features, wanted = self.space.features(points), np.asarray(values, dtype=float)
        if len(features) != len(wanted) or len(wanted) < FEWEST or not np.isfinite(wanted).all():
            raise PrunekitError(
                f"{len(features)} candidates and {len(wanted)} values, {int((~np.isfinite(wanted)).sum())} of them not "
                f"finite; give at least {FEWEST} candidates with a finite value each"
            )
        least = float(wanted.min())
        self._floor = least - max(BETTER * (float(np.median(wanted)) - least), 1e-9 * max(1.0, abs(least)))
        trees, self._models = self.trees, []
        settings = {
            "objective": "regression", "num_leaves": trees.n_leaves, "learning_rate": trees.learning_rate,
            "min_data_in_leaf": trees.min_pairs, "extra_trees": True, "deterministic": True, "force_row_wise": True,
            "num_threads": 1, "verbosity": -1,
        }  # fmt: skip
        for number in range(trees.n_models):
            drawn = np.random.default_rng([trees.seed, number]).integers(len(wanted), size=len(wanted))
            rows = drawn if trees.n_models > 1 else slice(None)
            data = lightgbm.Dataset(features[rows], np.log(wanted[rows] - self._floor))
            self._models.append(lightgbm.train({**settings, "seed": trees.seed + number}, data, trees.n_trees))
        return self

    def predict(self, points: Sequence[Point]) -> np.ndarray:
        """Predicted values of candidates, float (n,).

        Raises:
            PrunekitError: nothing was learned yet.
        """
        return self._floor + np.exp(self._mean(points))

    def shap(self, points: Sequence[Point]) -> pd.DataFrame:
        """Exact SHAP values: one row per candidate, one column per feature.

        They sum over features to the trees' output, the logarithm of the distance to the best. 0.1 means about a tenth
        more distance; negative values are improvements.

        Raises:
            PrunekitError: nothing was learned yet.

        Source: Lundberg et al. (2018), TreeSHAP, as LightGBM computes it.
        """
        return pd.DataFrame(self._mean(points, pred_contrib=True)[:, :-1], columns=self.space.feature_names())

    def __repr__(self) -> str:
        state = "fitted" if self._models else "not fitted yet"
        return f"AccuracyPredictor({len(self.space.knobs)} hyperparameters, {self.trees.n_models} models; {state})"

    def _mean(self, points: Sequence[Point], **options: bool) -> np.ndarray:
        if not self._models:
            raise PrunekitError("this predictor is not fitted yet; call fit(points, values) first")
        features = self.space.features(points)
        return np.mean([model.predict(features, num_threads=1, **options) for model in self._models], axis=0)


def agreement(
    expected: Sequence[float] | np.ndarray, measured: Sequence[float] | np.ndarray, top: int = TOP
) -> pd.Series:
    """Error, rank correlations and regret of predicted against measured values, where low values are good candidates.

    Args:
        expected: predicted values, (n,).
        measured: measured values, (n,).
        top: k of the regret.

    Returns:
        `n`; `rmse`; `spearman` and `kendall`, rank correlations; `regret`: how much worse the best of
        the k most promising candidates is than the best of all.

    Raises:
        PrunekitError: fewer than two values, or different lengths.
    """
    check_value("top", top, Count)
    a, b = np.asarray(expected, float), np.asarray(measured, float)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise PrunekitError(
            f"values of shapes {a.shape} and {b.shape} cannot be compared; give two lists of one length"
        )
    chosen = np.argsort(a, kind="stable")[:top]
    found = {"n": len(a), "rmse": float(np.sqrt(np.mean((a - b) ** 2)))}
    found |= {"spearman": float(spearmanr(a, b).statistic), "kendall": float(kendalltau(a, b).statistic)}
    return pd.Series(found | {"regret": float(b[chosen].min() - b.min())})


def cross_validate(pairs: Pairs, *, n_folds: int = 5, trees: Trees | None = None, seed: int = 0) -> pd.DataFrame:
    """Cross-validated predictions: each candidate is predicted from the other folds.

    Args:
        pairs: what was measured.
        n_folds: number of folds.
        trees: hyperparameters of the predictor.
        seed: seed of the folds.

    Returns:
        One row per sample: number, fold, expected, measured, in the form of `Pairs.values`. Summarise it with
        `agreement`.

    Raises:
        PrunekitError: too few samples for so many folds.
    """
    check_value("n_folds", n_folds, Length)
    fold = np.random.default_rng(seed).permutation(len(pairs)) % n_folds
    n_left = len(pairs) - math.ceil(len(pairs) / n_folds)
    if n_left < FEWEST:
        raise PrunekitError(f"{len(pairs)} samples leave {n_left} to train on, and {FEWEST} are needed; measure more")
    points, values, expected = pairs.points, pairs.values, np.zeros(len(pairs))
    for number in range(n_folds):
        expected[fold == number] = _foretold(pairs, points, values, fold != number, fold == number, trees)
    numbers = pairs.table["number"].to_numpy()
    return pd.DataFrame({"number": numbers, "fold": fold, "expected": expected, "measured": values})


def learning_curve(
    pairs: Pairs, sizes: Sequence[int], *, n_repeats: int = 5, trees: Trees | None = None, seed: int = 0
) -> pd.DataFrame:
    """Learning curve: agreement on a held-out fifth of the samples, for several training sizes.

    Args:
        pairs: what was measured.
        sizes: training sizes, at least 10 each and at most four fifths of all.
        n_repeats: random splits per size.
        trees: hyperparameters of the predictor.
        seed: seed of the splits.

    Returns:
        One row per split: n_pairs, repeat, and the values of `agreement` except n.

    Raises:
        PrunekitError: too few samples for a size.
    """
    check_value("n_repeats", n_repeats, Count)
    n_out = max(2, len(pairs) // 5)
    if not len(sizes) or not all(isinstance(s, int | np.integer) and FEWEST <= s <= len(pairs) - n_out for s in sizes):
        raise PrunekitError(
            f"sizes={list(sizes)!r:.60}; give numbers from {FEWEST} to {len(pairs) - n_out}, which leaves {n_out} of "
            f"{len(pairs)} samples to try the predictor on"
        )
    points, values, rng, rows = pairs.points, pairs.values, np.random.default_rng(seed), []
    for repeat in range(n_repeats):
        order = rng.permutation(len(pairs))
        for size in sizes:
            out, known = order[:n_out], order[n_out : n_out + size]
            figures = agreement(_foretold(pairs, points, values, known, out, trees), values[out])
            rows.append({"n_pairs": int(size), "repeat": repeat, **figures.drop("n")})
    return pd.DataFrame(rows)


def _foretold(
    pairs: Pairs, points: list, values: np.ndarray, known: np.ndarray, out: np.ndarray, trees: Trees | None
) -> np.ndarray:
    """Predictions for some candidates by a predictor fitted to others; both as masks or positions."""
    places = np.arange(len(points))
    taught = AccuracyPredictor(pairs.space, trees).fit([points[i] for i in places[known]], values[known])
    return taught.predict([points[i] for i in places[out]])
