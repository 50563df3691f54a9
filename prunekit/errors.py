"""The exceptions and the warning class of prunekit."""


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
    """The first line of an error's message that says something."""
    return next((line for line in str(error).splitlines() if line.strip()), "")
