"""The next points to measure: a population that evolves by what the predictor expects of it."""

from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest

import numpy as np

from prunekit.search.knobs import Range
from prunekit.search.predictor import AccuracyPredictor
from prunekit.search.space import Point, Space, distinct, key_of

PARENTS = 20  # of a generation
APART = 0.15  # of a knob's range, by which points that are measured together differ in one knob at least
LEVELS = 5  # into which a budget is divided that may be anywhere in a range


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
    """Points of which most is expected, and which are not all alike, of all that an evolution came by.

    Each generation's parents are the best of all so far; children are mutated, half of them crossed before, and made to
    fit. Trees expect the same of many points, so of the best only such are returned as lie apart; where a budget is a
    range, parents and points are taken in turns from its levels.

    Args:
        space: in which to search.
        predictor: what is expected of a point; lower is better.
        start: points to begin with, as well as drawn ones.
        rng: chance.
        n: how many to return, at most.
        population: children a generation.
        generations: how many.
        known: points that have been measured; they may be parents, but do not come again.

    Returns:
        Points that are not known, those of which most is expected first.
    """
    inside = ({name: knob.nearest(point[name]) for name, knob in space.knobs.items()} for point in start)
    first = [*filter(None, map(space.fitted, inside)), *distinct(space.draws(rng), population, all_of_them=False)]
    pool = {key_of(point): point for point in first}
    expected = dict(zip(pool, predictor.predict(list(pool.values())).tolist(), strict=True))
    for _ in range(generations):
        parents = _in_turns(space, [pool[key] for key in sorted(expected, key=expected.__getitem__)])[:PARENTS]
        children = distinct(_children(space, parents, rng), population, pool, all_of_them=False)
        if not children:  # all that there are have been made
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
    """Points in order, one of each level of every budget that is a range after the other."""
    levels: dict[tuple[int, ...], list[Point]] = {}
    for point in points:
        levels.setdefault(tuple(_level(space.knobs[name], point[name]) for name in space.goals), []).append(point)
    return [point for point in chain.from_iterable(zip_longest(*levels.values())) if point is not None]


def _level(knob: object, value: float) -> int:
    assert isinstance(knob, Range)  # goals are
    return min(int(LEVELS * (value - knob.low) / knob.span), LEVELS - 1)


def _spread(space: Space, points: Sequence[Point], n: int) -> list[Point]:
    """The first points of which each differs from all before it; the order stays."""
    chosen: list[int] = []
    features = space.features(points) / space.spans()
    for i in range(len(points)):
        if len(chosen) == n:
            break
        if all(np.abs(features[i] - features[j]).max() > APART for j in chosen):
            chosen.append(i)
    return [points[i] for i in chosen]
