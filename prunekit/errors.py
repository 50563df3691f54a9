"""The exceptions and the warnings of prunekit, and the check for optional packages."""

import gzip
import json
import sys
import warnings
import zlib
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

from safetensors import SafetensorError


class PrunekitError(ValueError):
    """Invalid input, or a model that prunekit does not support.

    The message names the value given, what is allowed, and the next step. Nothing was changed or
    half-written when it is raised.
    """


class BudgetError(PrunekitError):
    """A budget that no plan meets: units are too large for it, or too few may be removed."""


class DiskError(PrunekitError):
    """Something cannot be written: no room, no permission, or no such folder."""


class MissingExtraError(PrunekitError, AttributeError):
    """A package that an ability needs is not installed; to `hasattr`, a name that is not there."""


class DamageWarning(UserWarning):
    """A step raised the model's loss by much; the message gives the losses and what to try."""


def reason(error: BaseException) -> str:
    """Why something failed, in words of prunekit's own; other libraries' words stay in the traceback behind it.

    What is not known here is given by its kind.
    """
    if isinstance(error, PrunekitError):
        return str(error)
    for kinds, said in _REASONS:
        if isinstance(error, kinds) and (told := said(error)):
            return told
    return f"{type(error).__name__}, see the traceback"


def similar(value: object, allowed: Iterable[object], cutoff: float = 0.6) -> str:
    """A question to add to an error where one of the allowed names is written much like the one given.

    `cutoff` is how much alike, from 0 to 1; capitals do not count.
    """
    names = {each.lower(): each for each in allowed if isinstance(each, str)}
    near = get_close_matches(value.lower(), names, n=1, cutoff=cutoff) if isinstance(value, str) else []
    return f" (did you mean {names[near[0]]!r}?)" if near else ""


def first_line(error: Exception) -> str:
    """The first line of an error's message that says something."""
    return next((line for line in str(error).splitlines() if line.strip()), "")


_REASONS: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], Callable[[Any], str]], ...] = (
    (json.JSONDecodeError, lambda error: f"no JSON from line {error.lineno}, column {error.colno} on"),
    (ValueError, lambda error: "a number has too many digits" if "integer string conversion" in str(error) else ""),
    (UnicodeError, lambda _: "it is not written in UTF-8"),
    ((gzip.BadGzipFile, EOFError, zlib.error), lambda _: "it is cut short or damaged"),
    (OSError, lambda error: str(error.strerror or "")),  # the system's own words; libraries leave it empty
    (ConnectionError, lambda _: "the network or the hub does not answer"),
    (RecursionError, lambda _: "it is nested too deep"),
    (MemoryError, lambda _: "there is not enough memory"),
    (KeyError, lambda error: f"{error.args[0]!r} was not found" if error.args else ""),
    (SafetensorError, lambda _: "it is no safetensors file, or cut short"),
    (ImportError, lambda error: f"{error.name} cannot be imported" if error.name else ""),
)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning that names the line outside this package from which it was entered."""
    frame, level, found = sys._getframe(1), 2, 2
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] == "prunekit":
            found = level + 1
        frame, level = frame.f_back, level + 1  # type: ignore[assignment]
    warnings.warn(message, category, stacklevel=found)


SEARCH = ("joblib", "lightgbm", "optuna")  # what the extra `search` brings


def need(extra: str, *modules: str, why: str) -> None:
    """Raise an error if an optional package is not installed.

    Args:
        extra: the name in pyproject.toml, such as `"search"`.
        modules: the modules needed.
        why: what needs it, for the message.

    Raises:
        MissingExtraError: names the modules that are missing, and the line that installs them.
    """
    missing = [module for module in modules if not is_installed(module)]
    if missing:
        raise MissingExtraError(f"{why} needs {' and '.join(missing)}; pip install 'prunekit[{extra}]'")


def is_installed(module: str) -> bool:
    """Whether a module could be imported; it is not."""
    try:
        return find_spec(module) is not None
    except (ValueError, ModuleNotFoundError):  # taken out of sys.modules by force, or the package above it is missing
        return False
