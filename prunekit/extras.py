"""Checks that optional packages are installed, with the command that installs them."""

from importlib.util import find_spec

from prunekit.errors import MissingExtraError

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
    except ValueError:  # where the module was taken out of sys.modules by force
        return False
