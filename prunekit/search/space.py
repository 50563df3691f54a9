"""Search spaces: hyperparameters, the candidates that are allowed, and how a candidate changes a model."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from prunekit.checks import check_fields
from prunekit.errors import PrunekitError
from prunekit.search.hyperparameters import Choice, Hyperparameter, Range

Point = dict[str, Any]  # hyperparameter → value; plain data
CarryOut = Callable[[Any, Any], Any]
MUTATED = 0.15  # share of the values that a mutation changes, about
TRIES = 1000  # draws without a new candidate before `distinct` stops


class Space(ABC):
    """A space of candidates; a candidate gives every hyperparameter a value."""

    @property
    @abstractmethod
    def knobs(self) -> Mapping[str, Hyperparameter]:
        """Name → the values that it may take."""

    @abstractmethod
    def job(self, point: Point) -> tuple[CarryOut, Any]:
        """`(function, data)`: the function returns a new model from a model and the data, and leaves the model alone.

        Both are sent to workers, so they must be small and must not depend on a machine.
        """

    @abstractmethod
    def narrowed(self, knobs: Mapping[str, Hyperparameter]) -> "Space":
        """The same space with smaller ranges or choices for some hyperparameters."""

    @property
    def cost_names(self) -> Sequence[str]:
        """Names of the costs that `costs` returns."""
        return ()

    @property
    def goals(self) -> Sequence[str]:
        """Names of the budgets that are ranges: set by the user's target, not searched."""
        return ()

    def costs(self, point: Point) -> dict[str, float]:
        """Name → cost of a candidate, known before it is measured."""
        return {}

    def propose(self, rng: np.random.Generator) -> Point:
        """A random candidate, which may not be allowed."""
        return {name: knob.draw(rng) for name, knob in self.knobs.items()}

    def fitted(self, point: Point) -> Point | None:
        """The nearest allowed candidate, or None."""
        return point

    def described(self) -> dict[str, Any]:
        """Identity of the space as plain data, stored in the journal."""
        return {name: repr(knob) for name, knob in self.knobs.items()}

    def sample(self, n: int, rng: np.random.Generator, known: Sequence[Point] = ()) -> list[Point]:
        """Random candidates, all allowed and all different.

        Args:
            n: number of candidates.
            rng: random generator.
            known: candidates that are not drawn again.

        Raises:
            PrunekitError: fewer than n allowed candidates were found.
        """
        return distinct(self.draws(rng), n, map(key_of, known))

    def draws(self, rng: np.random.Generator) -> Iterator[Point | None]:
        """Endless random candidates, each fitted; None if fitting failed."""
        while True:
            yield self.fitted(self.propose(rng))

    def mutated(self, point: Point, rng: np.random.Generator) -> Point:
        """A copy with at least one value changed at random; it may need fitting."""
        hit = rng.random(len(self.knobs)) < MUTATED
        hit[int(rng.integers(len(hit)))] = True
        moved = [k.move(point[n], rng) if h else point[n] for (n, k), h in zip(self.knobs.items(), hit, strict=True)]
        return dict(zip(self.knobs, moved, strict=True))

    def crossed(self, one: Point, other: Point, rng: np.random.Generator) -> Point:
        """A crossover of two candidates; it may need fitting."""
        return {name: (one if rng.random() < 0.5 else other)[name] for name in self.knobs}

    def check(self, point: Any) -> Point:
        """The candidate in plain form, once it is valid.

        Raises:
            PrunekitError: a hyperparameter is missing or unknown, or has a value that is not allowed.
        """
        if not isinstance(point, Mapping) or set(point) != set(self.knobs):
            raise PrunekitError(f"{point!r:.80} is no candidate of this space; set exactly {', '.join(self.knobs)}")
        for name, knob in self.knobs.items():
            if not self.holds(name, point[name]):
                raise PrunekitError(f"{name}={point[name]!r} is not allowed; give one of {knob!r}")
        return {name: knob.plain(point[name]) for name, knob in self.knobs.items()}

    def holds(self, name: str, value: Any) -> bool:
        """Whether a hyperparameter may be set to a value."""
        return self.knobs[name].holds(value)

    def feature_names(self) -> list[str]:
        """Names of the columns of `features`: a hyperparameter, or a hyperparameter and one option."""
        return [name if option is None else f"{name}={option}" for name, option in self._columns()]

    def features(self, points: Sequence[Point]) -> np.ndarray:
        """Feature matrix (n, n_features): numbers as they are, string options one-hot."""
        rows = [[float(p[n] if option is None else p[n] == option) for n, option in self._columns()] for p in points]
        return np.array(rows, dtype=float).reshape(len(points), len(self.feature_names()))

    def _columns(self) -> Iterator[tuple[str, Any]]:
        """Hyperparameter and option of each feature; None stands for the value itself."""
        for name, knob in self.knobs.items():
            for option in (None,) if isinstance(knob, Range) or knob.ordered else knob.options:
                yield name, option

    def spans(self) -> np.ndarray:
        """Range of each feature, (n_features,)."""
        return np.array([1.0 if option is not None else self.knobs[name].span for name, option in self._columns()])


def distinct(
    made: Iterator[Point | None], n: int, known: Iterable[str] = (), *, all_of_them: bool = True
) -> list[Point]:
    """The first n different candidates whose keys are not known.

    Raises:
        PrunekitError: too many draws gave nothing new; not raised if `all_of_them` is False.
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
            f"{len(found)} different candidates were found of the {n} asked for; ask for fewer, or allow more: wider "
            "hyperparameters, more kinds, more layers, a larger budget"
        )
    return found


def key_of(point: Point) -> str:
    """A text key of a candidate; numbers are rounded to six digits."""
    return json.dumps({name: round(v, 6) if isinstance(v, float) else v for name, v in sorted(point.items())})


@dataclass(frozen=True)
class HyperparameterSpace(Space):
    """A space of your own hyperparameters, with a function that builds the model of a candidate.

    Its old name, `KnobSpace`, still works.

    Attributes:
        settings: name → `Range(low, high)` or `Choice((one, other))`.
        build: `(model, candidate) → model`; it leaves the given model alone. It is sent to workers, so it must be
            picklable.
        of: a label that separates this space from others with the same hyperparameters, such as another `build`.

    Raises:
        PrunekitError: no hyperparameters, a value that is not a Range or Choice, or no function.
    """

    settings: Mapping[str, Hyperparameter]
    build: CarryOut
    of: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.settings, Mapping) or not self.settings:
            raise PrunekitError(
                f"settings={self.settings!r:.60}; give at least one hyperparameter, name → Range or Choice"
            )
        for name, knob in self.settings.items():
            if not isinstance(knob, Range | Choice):
                raise PrunekitError(
                    f"hyperparameter {name!r} is {knob!r}; give Range(low, high) or Choice((one, other))"
                )
        if not callable(self.build):
            raise PrunekitError(f"build={self.build!r} cannot be called; give a function of a model and a candidate")
        check_fields(self)

    @property
    def knobs(self) -> Mapping[str, Hyperparameter]:
        """The settings."""
        return self.settings

    def job(self, point: Point) -> tuple[CarryOut, Any]:
        """The build function, and the candidate."""
        return self.build, point

    def fitted(self, point: Point) -> Point | None:
        """The candidate with each value moved to the nearest one allowed."""
        return {name: knob.nearest(point[name]) for name, knob in self.knobs.items()}

    def described(self) -> dict[str, Any]:
        """Identity of the space: hyperparameters and the label `of`."""
        return {**super().described(), "of": self.of}

    def narrowed(self, knobs: Mapping[str, Hyperparameter]) -> "HyperparameterSpace":
        """The same space with smaller ranges or choices for some hyperparameters."""
        for name, knob in knobs.items():
            check_limit(name, knob, self.settings)
        return replace(self, settings={**self.settings, **knobs})


KnobSpace = HyperparameterSpace  # the old name, which still works


def check_limit(name: str, limit: object, knobs: Mapping[str, Hyperparameter]) -> None:
    """Raise an error for a limit that does not lie within a hyperparameter's values.

    Raises:
        PrunekitError: no such hyperparameter, or values outside its own.
    """
    if name not in knobs:
        raise PrunekitError(f"limits name {name!r}; the hyperparameters are {', '.join(knobs)}")
    knob = knobs[name]
    if isinstance(knob, Range) and isinstance(limit, Range) and knob.low <= limit.low and limit.high <= knob.high:
        return
    if isinstance(knob, Choice) and isinstance(limit, Choice) and all(map(knob.holds, limit.options)):
        return
    raise PrunekitError(f"{name} cannot be limited to {limit!r:.60}; give a {type(knob).__name__} within {knob!r}")
