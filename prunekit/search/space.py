"""A space of points: what may be set, which settings are allowed, and what a model becomes by one."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from prunekit.errors import PrunekitError
from prunekit.search.knobs import Choice, Knob, Range

Point = dict[str, Any]  # knob → value; plain data
CarryOut = Callable[[Any, Any], Any]
TRIES = 1000  # draws in vain before a space is said to hold no more points


class Space(ABC):
    """Points that set some knobs, and how a model becomes what a point says."""

    @property
    @abstractmethod
    def knobs(self) -> Mapping[str, Knob]:
        """Name → what it may be set to."""

    @abstractmethod
    def job(self, point: Point) -> tuple[CarryOut, Any]:
        """`(function, data)`: the function makes another model of a model and the data, and leaves the first alone.

        Or it returns a context, within which the model itself is another. Both are sent to workers, so both are small,
        and none of it depends on a machine.
        """

    @abstractmethod
    def narrowed(self, knobs: Mapping[str, Knob]) -> "Space":
        """The same space with some knobs held to less."""

    @property
    def cost_names(self) -> Sequence[str]:
        """What `costs` tells of a point."""
        return ()

    @property
    def goals(self) -> Sequence[str]:
        """The knobs that are asked for rather than searched: budgets that may be anywhere in a range."""
        return ()

    def costs(self, point: Point) -> dict[str, float]:
        """Name → what a point is known to cost before anything is measured."""
        return {}

    def propose(self, rng: np.random.Generator) -> Point:
        """Any setting of the knobs, allowed or not."""
        return {name: knob.draw(rng) for name, knob in self.knobs.items()}

    def fitted(self, point: Point) -> Point | None:
        """The nearest point that is allowed; None where there is none near."""
        return point

    def described(self) -> dict[str, Any]:
        """What makes a space this one, as plain data; a study knows its own by it."""
        return {name: repr(knob) for name, knob in self.knobs.items()}

    def sample(self, n: int, rng: np.random.Generator, known: Sequence[Point] = ()) -> list[Point]:
        """Different points that are all allowed.

        Args:
            n: how many.
            rng: by which they are drawn.
            known: points that do not come again.

        Raises:
            PrunekitError: there are not so many, or hardly any setting is allowed.
        """
        return distinct(self.draws(rng), n, map(key_of, known))

    def draws(self, rng: np.random.Generator) -> Iterator[Point | None]:
        """Point after point without end, each fitted; None where that could not be."""
        while True:
            yield self.fitted(self.propose(rng))

    def mutated(self, point: Point, rng: np.random.Generator, rate: float = 0.15) -> Point:
        """A point with some knobs set anew, at least one; it may need fitting."""
        hit = rng.random(len(self.knobs)) < rate
        hit[int(rng.integers(len(hit)))] = True
        moved = [k.move(point[n], rng) if h else point[n] for (n, k), h in zip(self.knobs.items(), hit, strict=True)]
        return dict(zip(self.knobs, moved, strict=True))

    def crossed(self, one: Point, other: Point, rng: np.random.Generator) -> Point:
        """Each knob as in one of two points; it may need fitting."""
        return {name: (one if rng.random() < 0.5 else other)[name] for name in self.knobs}

    def check(self, point: Any) -> Point:
        """The point itself.

        Raises:
            PrunekitError: it does not set the knobs of this space, or sets one to what it cannot be.
        """
        if not isinstance(point, Mapping) or set(point) != set(self.knobs):
            raise PrunekitError(f"{point!r:.80} is no point of this space; set {', '.join(self.knobs)}, and no other")
        for name, knob in self.knobs.items():
            if not self.holds(name, point[name]):
                raise PrunekitError(f"{name}={point[name]!r} is not allowed; give one of {knob!r}")
        return {name: knob.plain(point[name]) for name, knob in self.knobs.items()}

    def holds(self, name: str, value: Any) -> bool:
        """Whether a knob may be set to a value."""
        return self.knobs[name].holds(value)

    def feature_names(self) -> list[str]:
        """Of each column of `features`: a knob, or a knob and the option that it is set to."""
        return [name if option is None else f"{name}={option}" for name, option in self._columns()]

    def features(self, points: Sequence[Point]) -> np.ndarray:
        """Points as numbers, (n, n_features): knobs of numbers as they are, of texts one column an option."""
        rows = [[float(p[n] if option is None else p[n] == option) for n, option in self._columns()] for p in points]
        return np.array(rows, dtype=float).reshape(len(points), len(self.feature_names()))

    def _columns(self) -> Iterator[tuple[str, Any]]:
        """Knob and option of each feature; None stands for the value itself."""
        for name, knob in self.knobs.items():
            for option in (None,) if isinstance(knob, Range) or knob.ordered else knob.options:
                yield name, option

    def spans(self) -> np.ndarray:
        """From the least to the most of each feature, (n_features,); 1 where that is nothing."""
        return np.array([1.0 if option is not None else self.knobs[name].span for name, option in self._columns()])


def distinct(
    made: Iterator[Point | None], n: int, known: Iterable[str] = (), *, all_of_them: bool = True
) -> list[Point]:
    """The first different ones of the points that are made, but for those whose keys are known.

    Raises:
        PrunekitError: too many draws in vain, unless fewer will do.
    """
    seen, found, misses = set(known), list[Point](), 0
    for point in made:
        if len(found) == n or misses > TRIES + 10 * len(found):
            break
        key = "" if point is None else key_of(point)
        if point is None or key in seen:
            misses += 1
            continue
        seen.add(key)
        found.append(point)
    if len(found) < n and all_of_them:
        raise PrunekitError(
            f"{len(found)} different points were found of the {n} asked for; ask for fewer, or allow more: wider "
            "knobs, more kinds, more layers, a larger budget"
        )
    return found


def key_of(point: Point) -> str:
    """The same for equal points; numbers that differ by less than a millionth are equal."""
    return json.dumps({name: round(v, 6) if isinstance(v, float) else v for name, v in sorted(point.items())})


@dataclass(frozen=True)
class KnobSpace(Space):
    """A space of any knobs, and a function that makes a model of a point: for whatever is to be searched over.

    Attributes:
        settings: name → `Range(low, high)` or `Choice((one, other))`.
        build: `(model, point) → model`; it leaves the model that it is given alone. With several workers it travels
            there, from a module or a notebook.
        of: what else tells this space from others with the same knobs, such as another `build`; a study knows its own
            by it.

    Raises:
        PrunekitError: no knobs, what is none, or no function.
    """

    settings: Mapping[str, Knob]
    build: CarryOut
    of: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.settings, Mapping) or not self.settings:
            raise PrunekitError(f"settings={self.settings!r:.60}; give at least one knob, name → Range or Choice")
        for name, knob in self.settings.items():
            if not isinstance(knob, Range | Choice):
                raise PrunekitError(f"knob {name!r} is {knob!r}; give Range(low, high) or Choice((one, other))")
        if not callable(self.build):
            raise PrunekitError(f"build={self.build!r} cannot be called; give a function of a model and a point")

    @property
    def knobs(self) -> Mapping[str, Knob]:
        """The settings."""
        return self.settings

    def job(self, point: Point) -> tuple[CarryOut, Any]:
        """The function, and the point itself."""
        return self.build, point

    def fitted(self, point: Point) -> Point | None:
        """Each knob set to what is nearest of what it may be."""
        return {name: knob.nearest(point[name]) for name, knob in self.knobs.items()}

    def described(self) -> dict[str, Any]:
        """The knobs, and what else there is to know."""
        return {**super().described(), "of": self.of}

    def narrowed(self, knobs: Mapping[str, Knob]) -> "KnobSpace":
        """The same space with some knobs held to less."""
        for name, knob in knobs.items():
            check_limit(name, knob, self.settings)
        return replace(self, settings={**self.settings, **knobs})


def check_limit(name: str, limit: object, knobs: Mapping[str, Knob]) -> None:
    """Refuse what a knob cannot be held to.

    Raises:
        PrunekitError: no such knob, or no part of what it may be.
    """
    if name not in knobs:
        raise PrunekitError(f"limits name {name!r}; the knobs are {', '.join(knobs)}")
    knob = knobs[name]
    if isinstance(knob, Range) and isinstance(limit, Range) and knob.low <= limit.low and limit.high <= knob.high:
        return
    if isinstance(knob, Choice) and isinstance(limit, Choice) and all(map(knob.holds, limit.options)):
        return
    raise PrunekitError(f"{name} cannot be held to {limit!r:.60}; give a part of {knob!r}")
