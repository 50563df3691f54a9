"""The one exception that prunekit raises on purpose."""


class PrunekitError(ValueError):
    """Bad input, or a model that is not understood.

    The message names the value given, what is allowed, and the next step. Nothing was changed or
    half-written when it is raised.
    """


class BudgetError(PrunekitError):
    """A budget that no plan meets: units are too large for it, or too few may go."""
