"""Candidates to measure next: by fixed rules, or by evolution with the predictor; makes a space smaller by SHAP."""

from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from prunekit.checks import Whole, check_value
from prunekit.errors import PrunekitError
from prunekit.pruning import PruningPlan, plan
from prunekit.search.architectures import PlanSpace
from prunekit.search.hyperparameters import Choice, Hyperparameter, Range
from prunekit.search.pairs import Pairs
from prunekit.search.predictor import AccuracyPredictor
from prunekit.search.space import Point, Space, distinct, key_of

POPULATION, GENERATIONS = 200, 20  # children of a generation, and how many of these there are
PARENTS = 20  # of a generation
APART = 0.15  # share of a range: candidates of one round differ by more in at least one value
LEVELS = 5  # of a budget that is a range


def evolve(
    space: Space,
    predictor: AccuracyPredictor,
    start: Sequence[Point],
    rng: np.random.Generator,
    *,
    n: int,
    known: Sequence[Point] = (),
) -> list[Point]:
    """The most promising candidates of an evolution, chosen to differ from each other.

    Each generation's parents are the best so far. Children are mutated, half of them after a crossover, and fitted to
    the budgets. Trees predict the same value for many candidates, so only candidates that differ enough are returned.
    Where a budget is a range, parents and candidates come from each of its levels in turn.

    Args:
        space: the space to search.
        predictor: predicts the value of a candidate; lower is better.
        start: candidates to begin with, besides random ones.
        rng: random generator.
        n: number of candidates returned, at most.
        known: candidates already measured; they may be parents but are not returned.

    Returns:
        New candidates, the most promising first.
    """
    inside = ({name: knob.nearest(point[name]) for name, knob in space.knobs.items()} for point in start)
    first = [*filter(None, map(space.fitted, inside)), *distinct(space.draws(rng), POPULATION, all_of_them=False)]
    pool = {key_of(point): point for point in first}
    expected = dict(zip(pool, predictor.predict(list(pool.values())).tolist(), strict=True))
    for _ in range(GENERATIONS):
        parents = _in_turns(space, [pool[key] for key in sorted(expected, key=expected.__getitem__)])[:PARENTS]
        children = distinct(_children(space, parents, rng), POPULATION, pool, all_of_them=False)
        if not children:  # every candidate exists already
            break
        new = {key_of(child): child for child in children}
        pool |= new
        expected |= dict(zip(new, predictor.predict(children).tolist(), strict=True))
    seen = {key_of(point) for point in known}
    best = [pool[key] for key in sorted(expected, key=expected.__getitem__) if key not in seen]
    return _spread(space, _in_turns(space, best), n)


def _children(space: Space, parents: Sequence[Point], rng: np.random.Generator) -> Iterator[Point | None]:
    while True:
        one, other = (parents[int(rng.integers(len(parents)))] for _ in range(2))
        child = space.crossed(one, other, rng) if rng.random() < 0.5 else one
        yield space.fitted(space.mutated(child, rng))


def _in_turns(space: Space, points: Sequence[Point]) -> list[Point]:
    """Candidates in order, taken in turn from each level of the budgets that are ranges."""
    levels: dict[tuple[int, ...], list[Point]] = {}
    for point in points:
        levels.setdefault(tuple(_level(space.knobs[name], point[name]) for name in space.goals), []).append(point)
    return [point for point in chain.from_iterable(zip_longest(*levels.values())) if point is not None]


def _level(knob: object, value: float) -> int:
    assert isinstance(knob, Range)  # goals are
    return min(int(LEVELS * (value - knob.low) / knob.span), LEVELS - 1)


def _spread(space: Space, points: Sequence[Point], n: int) -> list[Point]:
    """The first n candidates that differ enough from all before them, in the same order."""
    chosen: list[int] = []
    features = space.features(points) / space.spans()
    for i in range(len(points)):
        if len(chosen) == n:
            break
        if all(np.abs(features[i] - features[j]).max() > APART for j in chosen):
            chosen.append(i)
    return [points[i] for i in chosen]


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
    check_value("n", n, Whole)
    points = [point for point in pairs.points if all(space.holds(name, point[name]) for name in space.knobs)]
    if not points:
        return space, []
    shap = predictor.shap(points)
    parts = (cut for name in space.knobs for cut in _parts(space, name, points, shap))
    worst = sorted(parts, key=lambda cut: -cut.harm)
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


HALVINGS = 10  # of the interval in which the pruning ratio lies


def known_points(space: PlanSpace) -> list[Point]:
    """The candidates of local and global selection by each importance, fitted to the budgets.

    Global selection compares scores across groups as they are, which is poor for magnitudes.
    """
    every = [(label, ranking) for label in space.importances for ranking in ("local", "global")]
    plans = [(label, _within(space, label, ranking)) for label, ranking in every]
    found = (space.point_of(chosen, label) for label, chosen in plans if chosen is not None)
    return [point for point in found if point is not None]


def _within(space: PlanSpace, label: str, ranking: str) -> PruningPlan | None:
    """The plan with the lowest pruning ratio that meets the budgets; None if none is found."""
    options: Any = {"kinds": space.kinds, "ranking": ranking, "min_units": space.min_units}
    low, high, best = 0.0, 1.0, None
    for _ in range(HALVINGS):
        ratio = (low + high) / 2
        try:
            chosen = plan(space.groups, space.importances[label], ratio, **options)
        except PrunekitError:  # more than can go
            high = ratio
            continue
        if all(budget.table.of(chosen.n_removed) <= budget.high for budget in space.limited):
            best, high = chosen, ratio
        else:
            low = ratio
    return best
