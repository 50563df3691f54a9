"""A smaller space: what the predictor's SHAP values say is to the bad is left out."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from prunekit.checks import check_integers
from prunekit.errors import PrunekitError
from prunekit.search.knobs import Choice, Knob, Range
from prunekit.search.pairs import Pairs
from prunekit.search.predictor import AccuracyPredictor
from prunekit.search.space import Space

PART = 1 / 3  # of a range that goes at once
FEWEST = 5  # points on either side, below which nothing is said of a part


class Cut(NamedTuple):
    """A part of a knob's values, left out.

    Attributes:
        knob: its name.
        left: what it may still be set to.
        harm: mean SHAP value of the knob over the measured points in the part that goes, less that over all of the
            space.
    """

    knob: str
    left: Knob
    harm: float


def refined(space: Space, predictor: AccuracyPredictor, pairs: Pairs, n: int = 2) -> tuple[Space, list[Cut]]:
    """The space without the parts that do most harm, one of a knob at most.

    A part is the lowest or highest third of a range, or one option of several; its harm is the mean SHAP value of the
    knob over the measured points that lie in it, less that over all measured points of the space; lower is better.

    Args:
        space: to be made smaller.
        predictor: that learned from the pairs.
        pairs: what was measured.
        n: parts that go, at most.

    Returns:
        The smaller space, and what was left out, the worst first.

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
        except PrunekitError:  # a budget that could not be met any more
            continue
        done.append(cut)
    return space, done


def _parts(space: Space, name: str, points: list, shap: pd.DataFrame) -> Iterator[Cut]:
    """What may go of a knob's values, and what it harms; nothing of a budget, which is asked for."""
    if name in space.goals:
        return
    knob, values = space.knobs[name], np.array([point[name] for point in points], dtype=object)
    of_knob = [column for column in shap if column == name or str(column).startswith(f"{name}=")]
    harm = shap[of_knob].sum(axis=1).to_numpy()
    harm = harm - harm.mean()
    for left, goes in _splits(knob, values):
        if goes.sum() >= FEWEST and (~goes).sum() >= FEWEST:
            yield Cut(name, left, float(harm[goes].mean()))


def _splits(knob: Knob, values: Any) -> Iterator[tuple[Knob, np.ndarray]]:
    """What is left, and which of the values would go."""
    if isinstance(knob, Choice):
        for option in knob.options if len(knob.options) > 1 else ():
            yield Choice(tuple(other for other in knob.options if other != option)), values == option
        return
    low, high = knob.low + PART * knob.span, knob.high - PART * knob.span
    yield Range(low, knob.high), values.astype(float) < low
    yield Range(knob.low, high), values.astype(float) > high
