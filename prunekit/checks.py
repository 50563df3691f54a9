"""Checks of arguments: integers, real numbers and choices."""

import math
from collections.abc import Iterable
from typing import Any

from prunekit.errors import PrunekitError


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raise an error for a value that is not among those allowed.

    Raises:
        PrunekitError: names the option, the value given and the values allowed.
    """
    allowed = tuple(allowed)
    if value not in allowed:
        raise PrunekitError(f"{name}={value!r} is unknown; allowed: {', '.join(map(repr, allowed))}")


def check_integers(**numbers: tuple[Any, int]) -> None:
    """Check integers, given as name → (value, lower bound).

    Raises:
        PrunekitError: a value that is no integer, or smaller.
    """
    for name, (value, least) in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise PrunekitError(f"{name}={value!r} is not allowed; give an integer of {least} or more")


def check_reals(**numbers: tuple[Any, float, float]) -> None:
    """Check real numbers, given as name → (value, lower bound, exclusive upper bound).

    Raises:
        PrunekitError: a value that is no finite number, or outside.
    """
    for name, (value, low, high) in numbers.items():
        if not is_real(value) or not low <= value < high:
            raise PrunekitError(f"{name}={value!r} is not allowed; give a number in [{low:g}, {high:g})")


def is_real(value: object) -> bool:
    """Whether a value is a finite number and not a Boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
