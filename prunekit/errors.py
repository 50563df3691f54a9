"""The exceptions and the warnings of prunekit."""

import sys
import warnings


class PrunekitError(ValueError):
    """Invalid input, or a model that prunekit does not support.

    The message names the value given, what is allowed, and the next step. Nothing was changed or
    half-written when it is raised.
    """


class BudgetError(PrunekitError):
    """A budget that no plan meets: units are too large for it, or too few may be removed."""


class MissingExtraError(PrunekitError, AttributeError):
    """A package that an ability needs is not installed; to `hasattr`, a name that is not there."""


class DamageWarning(UserWarning):
    """A step raised the model's loss by much; the message gives the losses and what to try."""


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [""])[0]


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning that names the line outside this package from which it was entered."""
    frame, level, found = sys._getframe(1), 2, 2
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] == "prunekit":
            found = level + 1
        frame, level = frame.f_back, level + 1  # type: ignore[assignment]
    warnings.warn(message, category, stacklevel=found)
