"""How far a predictor can be trusted: on points that it did not learn from."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import kendalltau, spearmanr

from prunekit.checks import check_integers
from prunekit.errors import PrunekitError
from prunekit.search.pairs import Pairs
from prunekit.search.predictor import FEWEST, AccuracyPredictor, Trees

TOP = 10  # points of which most is expected, for the regret


def agreement(
    expected: Sequence[float] | np.ndarray, measured: Sequence[float] | np.ndarray, top: int = TOP
) -> pd.Series:
    """How well some figures foretell others, both lower for better.

    Args:
        expected: (n,).
        measured: (n,).
        top: k of the regret.

    Returns:
        `n`; `rmse`; `spearman` and `kendall`, rank correlations; `regret`: how much worse than the best of all is the
        best of the k of which most was expected.

    Raises:
        PrunekitError: fewer than two figures, or not as many of one as of the other.
    """
    check_integers(top=(top, 1))
    a, b = np.asarray(expected, float), np.asarray(measured, float)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise PrunekitError(
            f"figures of shapes {a.shape} and {b.shape} cannot be compared; give two lists of one length"
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
    """What each point is expected to measure by a predictor that learned from the others.

    Args:
        pairs: what was measured.
        n_folds: parts; each is foretold by what the others teach.
        trees: how the predictor learns.
        seed: of the parts.

    Returns:
        One row a pair: number, fold, expected, measured, both as `Pairs.values` has them. `agreement` sums it up.

    Raises:
        PrunekitError: too few pairs for so many folds.
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
    """What a predictor is worth that learned from fewer pairs, on a fifth of all that it never sees.

    Args:
        pairs: what was measured.
        sizes: numbers of pairs to learn from, at least 10 each and at most four fifths of all.
        n_repeats: draws of both for each size.
        trees: how the predictor learns.
        seed: of the draws.

    Returns:
        One row a draw: n_pairs, repeat, and the figures of `agreement` but n.

    Raises:
        PrunekitError: a size that there are not enough pairs for.
    """
    check_integers(n_repeats=(n_repeats, 1))
    n_out = max(2, len(pairs) // 5)
    if not len(sizes) or not all(isinstance(s, int | np.integer) and FEWEST <= s <= len(pairs) - n_out for s in sizes):
        raise PrunekitError(
            f"sizes={list(sizes)!r:.60}; give numbers from {FEWEST} to {len(pairs) - n_out}, which leaves {n_out} of "
            f"{len(pairs)} pairs to try the predictor on"
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
    """What is expected of some points by what others teach; both as masks or as positions."""
    places = np.arange(len(points))
    taught = AccuracyPredictor(pairs.space, trees).fit([points[i] for i in places[known]], values[known])
    return taught.predict([points[i] for i in places[out]])


def _check_enough(n: int, every: int) -> None:
    if n < FEWEST:
        raise PrunekitError(f"{every} pairs leave {n} to learn from; measure more, so that {FEWEST} are left")
