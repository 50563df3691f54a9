"""What can be chosen: a number in a range, or one of several values."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from prunekit.checks import is_real
from prunekit.errors import PrunekitError


@dataclass(frozen=True)
class Range:
    """A number between two others.

    Attributes:
        low: the least.
        high: the most, above `low`.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (is_real(self.low) and is_real(self.high) and self.low < self.high):
            raise PrunekitError(f"{self!r} is empty; give two numbers, the lower one first")

    @property
    def span(self) -> float:
        """From the least to the most."""
        return self.high - self.low

    def plain(self, value: Any) -> float:
        """A value of it in the one form in which it is kept."""
        return float(value)

    def draw(self, rng: np.random.Generator) -> float:
        """Any of them, evenly."""
        return float(rng.uniform(self.low, self.high))

    def move(self, value: float, rng: np.random.Generator) -> float:
        """One nearby, at any scale, or one of the ends."""
        if rng.random() < 0.15:
            return float(rng.choice([self.low, self.high]))
        step = self.span * 10 ** rng.uniform(-2, -0.5)
        return self.nearest(value + rng.normal(0, step))

    def nearest(self, value: float) -> float:
        """The value itself where it lies inside."""
        return float(min(max(value, self.low), self.high))

    def holds(self, value: Any) -> bool:
        """Whether this is one of its values."""
        return is_real(value) and self.low <= value <= self.high


@dataclass(frozen=True)
class Choice:
    """One of several values: texts, numbers or truth values.

    Attributes:
        options: at least one, all different.
    """

    options: tuple[Any, ...]

    def __post_init__(self) -> None:
        plain = isinstance(self.options, tuple) and all(isinstance(o, str | bool | int | float) for o in self.options)
        if not plain or not self.options or len({*self.options}) < len(self.options):
            raise PrunekitError(
                f"{self!r} cannot be chosen from; give a tuple of different texts, numbers or truth values"
            )

    @property
    def ordered(self) -> bool:
        """Whether a predictor may split them into lower and higher ones."""
        return all(not isinstance(option, str) for option in self.options)

    @property
    def span(self) -> float:
        """From the least to the most where they are numbers; 1 where that is nothing."""
        return float(max(self.options) - min(self.options)) or 1.0 if self.ordered else 1.0

    def plain(self, value: Any) -> Any:
        """An option in the one form in which it is kept."""
        return self.options[self.options.index(value)]

    def draw(self, rng: np.random.Generator) -> Any:
        """Any of them, evenly."""
        return self.options[int(rng.integers(len(self.options)))]

    def move(self, value: Any, rng: np.random.Generator) -> Any:
        """Any of them."""
        return self.draw(rng)

    def nearest(self, value: Any) -> Any:
        """The value itself where it is an option, else the nearest number or the first option."""
        if value in self.options or not self.ordered:
            return value if value in self.options else self.options[0]
        return min(self.options, key=lambda option: abs(option - value))

    def holds(self, value: Any) -> bool:
        """Whether this is one of its values."""
        return any(value == option and isinstance(value, bool) == isinstance(option, bool) for option in self.options)


Knob = Range | Choice
