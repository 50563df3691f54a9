"""What the checks of all exercises share: they take a right answer in any form, and answer a wrong one by a hint.

A reader may return a tensor, an array, a range or a list; may forget `return`; and the function may raise. A check that
is `forgiving` returns a text in each of these cases, and never shows a traceback of its own.
"""

import traceback
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

Answer = Callable[..., Any]


class _StoppedError(Exception):
    """The reader's function raised; the error is the cause."""


def numbers(value: Any) -> Any:
    """Python numbers and lists in place of tensors, arrays, ranges, tuples and pandas' values."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [numbers(part) for part in value] if isinstance(value, list | tuple | range) else value


def tensors(value: Any) -> Any:
    """A tensor in place of an array or a list of numbers."""
    try:
        return value if value is None or isinstance(value, str) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return value


def forgiving(form: Callable[[Any], Any] = numbers) -> Callable[[Callable[[Answer], str]], Callable[[Answer], str]]:
    """A decorator of checks.

    Args:
        form: what the check works with; it is applied to everything that the reader's function returns.
    """

    def decorate(check: Callable[[Answer], str]) -> Callable[[Answer], str]:
        @wraps(check)
        def careful(answer: Answer) -> str:
            returned: list[Any] = []

            @wraps(answer)
            def formed(*arguments: Any) -> Any:
                try:
                    returned.append(form(answer(*arguments)))
                except Exception as error:
                    raise _StoppedError from error
                return returned[-1]

            try:
                told = check(formed)
            except _StoppedError as stopped:
                return _stopped(stopped.__cause__)
            except Exception:  # the check could not work with what it got
                told = f"The check cannot use {returned[-1]!r}, which your function returns. Which form is asked for?"
            nothing = any(value is None for value in returned) and "returns nothing" not in told
            return "Your function returns nothing: does it end with `return` and the result?" if nothing else told

        return careful

    return decorate


def _stopped(error: BaseException | None) -> str:
    line = traceback.extract_tb(error.__traceback__)[-1].line if error is not None else ""
    return f"Your function stops with {type(error).__name__}: {error}" + (f"; in the line: {line}" if line else "")


def shown(value: Any) -> str:
    """A number as a reader would write it, anything else as it is."""
    return f"{value:.6g}" if isinstance(value, float) else repr(value)


def hint_for(got: Any, hints: dict[float, str], otherwise: str) -> str:
    """The text for the first number that `got` is close to, or else the general one."""
    if isinstance(got, bool) or not isinstance(got, int | float):
        return otherwise
    return next((text for value, text in hints.items() if abs(got - value) < 1e-6 * max(1.0, abs(value))), otherwise)
