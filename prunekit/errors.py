"""The exceptions that prunekit raises on purpose, and its one warning of its own."""


class PrunekitError(ValueError):
    """Bad input, or a model that is not understood.

    The message names the value given, what is allowed, and the next step. Nothing was changed or
    half-written when it is raised.
    """


class BudgetError(PrunekitError):
    """A budget that no plan meets: units are too large for it, or too few may go."""


class DamageWarning(UserWarning):
    """A step raised the model's loss by much: the message has the figures and what to try."""
