"""Output of verbs: JSON or tables on standard output, remarks and warnings on standard error."""

import json
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from prunekit.escaping import printable


@dataclass(frozen=True)
class Answer:
    """Output of a verb: plain values for `--json`, or text."""

    values: dict[str, Any]
    text: str


def as_json(value: Any) -> str:
    """Strict JSON; a number that is not finite becomes null."""
    return json.dumps(_finite(value), indent=1)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def text_table(rows: Sequence[Sequence[object]]) -> str:
    """Rows of cells as lines, the first column to the left, the others to the right; the first row is the head."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in cells]
    return "\n".join(lines)


def say(message: object) -> None:
    """One line on standard error."""
    print(f"prunekit: {printable(str(message))}", file=sys.stderr)


@contextmanager
def own_warnings() -> Iterator[None]:
    """A context that prints prunekit's warnings and log on standard error and hides those of libraries."""
    from transformers.utils import logging as library

    from prunekit.checkpoint.gguf import NoVocabulary
    from prunekit.errors import DamageWarning

    library.set_verbosity_error()
    library.disable_progress_bar()
    with warnings.catch_warnings(), _own_log():
        warnings.simplefilter("ignore")
        for kind in (DamageWarning, NoVocabulary):
            warnings.simplefilter("always", kind)
        warnings.showwarning = lambda message, *_, **__: say(message)
        yield


@contextmanager
def _own_log() -> Iterator[None]:
    """A context that prints each line of prunekit's log once, when all went well: an error is a single line."""
    logger, handler = logging.getLogger("prunekit"), _Kept()
    level, handled_above = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
        for message in handler.said:
            say(message)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = handled_above


class _Kept(logging.Handler):
    """Keeps each line of a log once, such as what was read for several models."""

    def __init__(self) -> None:
        super().__init__()
        self.said: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.said[record.getMessage()] = None
