"""What the checks of all exercises share: they take a right answer in any form, and answer a wrong one by a hint.

A reader may return a tensor, an array, a range or a list; may forget `return`; and the function may raise. A check that
is `forgiving` returns a text in each of these cases, and never shows a traceback of its own.
"""

import traceback
from collections.abc import Callable, Iterator, Set
from functools import wraps
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

Answer = Callable[..., Any]


class _StoppedError(Exception):
    """The reader's function raised; the error is the cause."""


class _FormError(Exception):
    """The reader's function returned something else than what was asked for."""


def numbers(value: Any) -> Any:
    """Python numbers and lists in place of tensors, arrays, ranges, tuples, sets, generators and pandas' values."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Iterator | Set):
        value = list(value)
    return [numbers(part) for part in value] if isinstance(value, list | tuple | range) else value


def tensors(value: Any) -> Any:
    """A tensor in place of an array, a list of numbers or a generator."""
    value = list(value) if isinstance(value, Iterator) else value
    try:
        return value if value is None or isinstance(value, str) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return value


FORMS = {  # what a solution returns → how it is called
    float: "a number", int: "a whole number", bool: "True or False", str: "a text", Tensor: "a tensor",
    list[int]: "a list of whole numbers", list[float]: "a list of numbers", list[str]: "a list of texts",
    list[tuple[int, int]]: "a list of pairs (i, j)", tuple[float, float]: "two numbers",
}  # fmt: skip


def _fits(value: Any, asked: Any) -> bool:
    """Whether a value, as `numbers` or `tensors` leave it, has the form that is asked for."""
    if value is None or asked is str:
        return value is None or isinstance(value, str)
    if asked is Tensor:  # of one number too
        return isinstance(value, Tensor | int | float)
    if asked in (int, float, bool):
        return isinstance(value, int | float) and not (asked is float and isinstance(value, bool))
    parts = get_args(asked)
    if not isinstance(value, list) or (get_origin(asked) is tuple and len(value) != len(parts)):
        return False
    return all(_fits(part, parts[0]) for part in value)


def forgiving(form: Callable[[Any], Any] = numbers) -> Callable[[Callable[[Answer], str]], Callable[[Answer], str]]:
    """A decorator of checks.

    Args:
        form: what the check works with; it is applied to everything that the reader's function returns.
    """

    def decorate(check: Callable[[Answer], str]) -> Callable[[Answer], str]:
        solution = check.__globals__["solution_" + check.__name__.removeprefix("check_")]
        asked = get_type_hints(solution)["return"]
        asked = next((part for part in get_args(asked) if part in FORMS and get_origin(asked) is UnionType), asked)

        @wraps(check)
        def careful(answer: Answer) -> str:
            if not callable(answer):
                return f"Give the check your function itself, without brackets behind its name, not {answer!r:.60}."
            told = _told(check, answer, form, asked)
            if asked in (float, list[float], tuple[float, float]) and not told.startswith("✓"):
                percent = _told(check, lambda *given: _hundredth(form(answer(*given))), form, asked)
                told = "That is a percentage: return the share itself, not × 100." if percent.startswith("✓") else told
            return told

        return careful

    return decorate


def _hundredth(value: Any) -> Any:
    return [part / 100 for part in value] if isinstance(value, list) else value / 100


def _told(check: Callable[[Answer], str], answer: Answer, form: Callable[[Any], Any], asked: Any) -> str:
    """What the check says, whatever the reader's function returns or raises."""
    given: tuple[Any, ...] = ()
    returned: list[Any] = []

    @wraps(answer)
    def formed(*arguments: Any) -> Any:
        nonlocal given
        given = arguments
        try:
            returned.append(answer(*arguments))
            value = form(returned[-1])
        except Exception as error:
            raise _StoppedError from error
        if not _fits(value, asked):
            raise _FormError
        return value

    try:
        told = check(formed)
    except _StoppedError as stopped:
        return _stopped(stopped.__cause__, given)
    except _FormError:
        what = type(returned[-1]).__name__
        wanted = "one number" if asked is Tensor and form is numbers else FORMS[asked]
        return f"Your function returns {returned[-1]!r:.60}, of type {what}: return {wanted}."
    except Exception:  # the check could not work with what it got
        told = f"The check cannot use {returned[-1]!r:.60}, which your function returns; return {FORMS[asked]}."
    nothing = any(value is None for value in returned) and "returns nothing" not in told
    return "Your function returns nothing: does it end with `return` and the result?" if nothing else told


def _stopped(error: BaseException | None, given: tuple[Any, ...]) -> str:
    line = traceback.extract_tb(error.__traceback__)[-1].line if error is not None else ""
    shapes = [
        f"a tensor of shape {tuple(v.shape)}" if isinstance(v, Tensor) and v.dim() else f"{v!r:.40}" for v in given
    ]
    arguments = ", ".join(shapes)
    told = f"Your function, called with ({arguments}), stops with {type(error).__name__}: {error}"
    return told + (f"; in the line: {line}" if line else "")


def shown(value: Any) -> str:
    """A number as a reader would write it, anything else as it is."""
    return f"{value:.6g}" if isinstance(value, float) else repr(value)


def hint_for(got: Any, hints: dict[float, str], otherwise: str) -> str:
    """The text for the first number that `got` is close to, or else the general one."""
    if isinstance(got, bool) or not isinstance(got, int | float):
        return otherwise
    return next((text for value, text in hints.items() if abs(got - value) < 1e-6 * max(1.0, abs(value))), otherwise)
