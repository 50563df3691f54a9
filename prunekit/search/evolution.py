"""Proposes the next candidates to measure, by evolution with the predictor as fitness."""

from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest

import numpy as np

from prunekit.search.hyperparameters import Range
from prunekit.search.predictor import AccuracyPredictor
from prunekit.search.space import Point, Space, distinct, key_of

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
    population: int = 200,
    generations: int = 20,
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
        population: number of children per generation.
        generations: number of generations.
        known: candidates already measured; they may be parents but are not returned.

    Returns:
        New candidates, the most promising first.
    """
    inside = ({name: knob.nearest(point[name]) for name, knob in space.knobs.items()} for point in start)
    first = [*filter(None, map(space.fitted, inside)), *distinct(space.draws(rng), population, all_of_them=False)]
    pool = {key_of(point): point for point in first}
    expected = dict(zip(pool, predictor.predict(list(pool.values())).tolist(), strict=True))
    for _ in range(generations):
        parents = _in_turns(space, [pool[key] for key in sorted(expected, key=expected.__getitem__)])[:PARENTS]
        children = distinct(_children(space, parents, rng), population, pool, all_of_them=False)
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
