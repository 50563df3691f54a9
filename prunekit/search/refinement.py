"""Makes a space smaller: removes the parts with the worst SHAP values."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from prunekit.checks import check_integers
from prunekit.errors import PrunekitError
from prunekit.search.hyperparameters import Choice, Hyperparameter, Range
from prunekit.search.pairs import Pairs
from prunekit.search.predictor import AccuracyPredictor
from prunekit.search.space import Space

PART = 1 / 3  # share of a range that one step removes
FEWEST = 5  # candidates needed inside and outside a part


class Cut(NamedTuple):
    """Values of a hyperparameter that were removed from the space.

    Attributes:
        knob: its name.
        left: the values that remain.
        harm: mean SHAP value over the measured candidates in the removed part, minus the mean over the space.
    """

    knob: str
    left: Hyperparameter
    harm: float


def refined(space: Space, predictor: AccuracyPredictor, pairs: Pairs, n: int = 2) -> tuple[Space, list[Cut]]:
    """The space without its most harmful parts, at most one per hyperparameter.

    A part is the lowest or highest third of a range, or one of several options. Its harm is the mean SHAP value over
    the measured candidates inside it, minus the mean over all measured candidates of the space.

    Args:
        space: the space to make smaller.
        predictor: fitted to the samples.
        pairs: what was measured.
        n: number of parts to remove, at most.

    Returns:
        The smaller space, and the removed parts, the most harmful first.

    Source: GBDT-NAS (Luo et al. 2020) removes the features with the worst mean SHAP values between its rounds.
        Reconstructed: its features are operations, of which there is one or not; ours are mostly shares, so a third of
        a range stands for a feature.
    """
    check_integers(n=(n, 0))
    points = [point for point in pairs.points if all(space.holds(name, point[name]) for name in space.knobs)]
    if not points:
        return space, []
    shap = predictor.shap(points)
    worst = sorted(
        (cut for name in space.knobs for cut in _parts(space, name, points, shap)), key=lambda cut: -cut.harm
    )
    done: list[Cut] = []
    for cut in worst:
        if len(done) == n or cut.harm <= 0:
            break
        if any(cut.knob == other.knob for other in done):
            continue
        try:
            space = space.narrowed({cut.knob: cut.left})
        except PrunekitError:  # no candidate would meet a budget
            continue
        done.append(cut)
    return space, done


def _parts(space: Space, name: str, points: list, shap: pd.DataFrame) -> Iterator[Cut]:
    """Removable parts of a hyperparameter and their harm; none for a budget."""
    if name in space.goals:
        return
    knob, values = space.knobs[name], np.array([point[name] for point in points], dtype=object)
    of_knob = [column for column in shap if column == name or str(column).startswith(f"{name}=")]
    harm = shap[of_knob].sum(axis=1).to_numpy()
    harm = harm - harm.mean()
    for left, goes in _splits(knob, values):
        if goes.sum() >= FEWEST and (~goes).sum() >= FEWEST:
            yield Cut(name, left, float(harm[goes].mean()))


def _splits(knob: Hyperparameter, values: Any) -> Iterator[tuple[Hyperparameter, np.ndarray]]:
    """The remaining values, and a mask of the candidates in the removed part."""
    if isinstance(knob, Choice):
        for option in knob.options if len(knob.options) > 1 else ():
            yield Choice(tuple(other for other in knob.options if other != option)), values == option
        return
    low, high = knob.low + PART * knob.span, knob.high - PART * knob.span
    yield Range(low, knob.high), values.astype(float) < low
    yield Range(knob.low, high), values.astype(float) > high
