"""The two types of hyperparameters: a number in a range (`Range`) and one of several values (`Choice`)."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from prunekit.annotations import is_real
from prunekit.errors import PrunekitError


@dataclass(frozen=True)
class Range:
    """A number between two bounds.

    Attributes:
        low: the lower bound.
        high: the upper bound, above `low`.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (is_real(self.low) and is_real(self.high) and self.low < self.high):
            raise PrunekitError(f"{self!r} is empty; give two numbers, the lower one first")

    @property
    def span(self) -> float:
        """Difference of the bounds."""
        return self.high - self.low

    def plain(self, value: Any) -> float:
        """The value as a float."""
        return float(value)

    def draw(self, rng: np.random.Generator) -> float:
        """A uniformly random value."""
        return float(rng.uniform(self.low, self.high))

    def move(self, value: float, rng: np.random.Generator) -> float:
        """A random value nearby, or one of the bounds."""
        if rng.random() < 0.15:
            return float(rng.choice([self.low, self.high]))
        step = self.span * 10 ** rng.uniform(-2, -0.5)
        return self.nearest(value + rng.normal(0, step))

    def nearest(self, value: float) -> float:
        """The value clipped to the bounds."""
        return float(min(max(value, self.low), self.high))

    def holds(self, value: Any) -> bool:
        """Whether a value lies within the bounds."""
        return is_real(value) and self.low <= value <= self.high


@dataclass(frozen=True)
class Choice:
    """One of several values: strings, numbers or Booleans.

    Attributes:
        options: the values, all different.
    """

    options: tuple[Any, ...]

    def __post_init__(self) -> None:
        plain = isinstance(self.options, tuple) and all(isinstance(o, str | bool | int | float) for o in self.options)
        if not plain or not self.options or len({*self.options}) < len(self.options):
            raise PrunekitError(f"{self!r} is not allowed; give a tuple of different strings, numbers or Booleans")

    @property
    def ordered(self) -> bool:
        """Whether the options are numbers, so that a predictor can order them."""
        return all(not isinstance(option, str) for option in self.options)

    @property
    def span(self) -> float:
        """Difference of the largest and smallest number; 1 if it is 0 or the options are strings."""
        return float(max(self.options) - min(self.options)) or 1.0 if self.ordered else 1.0

    def plain(self, value: Any) -> Any:
        """The option equal to a value."""
        return self.options[self.options.index(value)]

    def draw(self, rng: np.random.Generator) -> Any:
        """A uniformly random option."""
        return self.options[int(rng.integers(len(self.options)))]

    def move(self, value: Any, rng: np.random.Generator) -> Any:
        """A random option."""
        return self.draw(rng)

    def nearest(self, value: Any) -> Any:
        """The value if it is an option, else the nearest number or the first option."""
        if value in self.options or not self.ordered:
            return value if value in self.options else self.options[0]
        return min(self.options, key=lambda option: abs(option - value))

    def holds(self, value: Any) -> bool:
        """Whether a value is one of the options."""
        return any(value == option and isinstance(value, bool) == isinstance(option, bool) for option in self.options)


Hyperparameter = Range | Choice
