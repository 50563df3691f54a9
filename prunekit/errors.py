"""The exceptions that prunekit raises on purpose, its one warning of its own, and what others say in one line."""


class PrunekitError(ValueError):
    """Bad input, or a model that is not understood.

    The message names the value given, what is allowed, and the next step. Nothing was changed or
    half-written when it is raised.
    """


class BudgetError(PrunekitError):
    """A budget that no plan meets: units are too large for it, or too few may go."""


class DamageWarning(UserWarning):
    """A step raised the model's loss by much: the message has the figures and what to try."""


def first_line(error: Exception) -> str:
    """What an error says, without what follows its first line."""
    return (str(error).splitlines() or [""])[0]
