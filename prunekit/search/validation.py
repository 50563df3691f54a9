"""Validation of a predictor on held-out candidates."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import kendalltau, spearmanr

from prunekit.checks import check_integers
from prunekit.errors import PrunekitError
from prunekit.search.pairs import Pairs
from prunekit.search.predictor import FEWEST, AccuracyPredictor, Trees

TOP = 10  # most promising candidates, for the regret


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
    check_integers(top=(top, 1))
    a, b = np.asarray(expected, float), np.asarray(measured, float)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise PrunekitError(
            f"values of shapes {a.shape} and {b.shape} cannot be compared; give two lists of one length"
        )
    chosen = np.argsort(a, kind="stable")[:top]
    return pd.Series(
        {
            "n": len(a),
            "rmse": float(np.sqrt(np.mean((a - b) ** 2))),
            "spearman": float(spearmanr(a, b).statistic),
            "kendall": float(kendalltau(a, b).statistic),
            "regret": float(b[chosen].min() - b.min()),
        }
    )


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
    check_integers(n_folds=(n_folds, 2))
    fold = np.random.default_rng(seed).permutation(len(pairs)) % n_folds
    _check_enough(len(pairs) - int(np.ceil(len(pairs) / n_folds)), len(pairs))
    points, values, expected = pairs.points, pairs.values, np.zeros(len(pairs))
    for number in range(n_folds):
        expected[fold == number] = _foretold(pairs, points, values, fold != number, fold == number, trees)
    return pd.DataFrame(
        {"number": pairs.table["number"].to_numpy(), "fold": fold, "expected": expected, "measured": values}
    )


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
    check_integers(n_repeats=(n_repeats, 1))
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


def _check_enough(n: int, every: int) -> None:
    if n < FEWEST:
        raise PrunekitError(f"{every} samples leave {n} to train on, and {FEWEST} are needed; measure more")
