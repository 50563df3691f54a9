"""What the commands share: a parser that complains in one line, kinds of numbers, tables and JSON."""

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from prunekit.errors import PrunekitError


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `PrunekitError`, shows defaults and keeps the line breaks of its texts."""

    def __init__(self, prog: str | None = None, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog, allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses what it does not know itself, so that the help named is that of the command and not of them all.

        Raises:
            PrunekitError: there are such arguments.
        """
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        """Bad input, with where to look.

        Raises:
            PrunekitError: always.
        """
        raise PrunekitError(f"{message}; see {self.prog} --help")


def add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], line: str, text: str) -> Parser:
    """A command's parser.

    Args:
        commands: what `add_subparsers` gave.
        name: of the command.
        run: arguments → exit code.
        line: what it does, for the list of commands.
        text: more about it, and an example.
    """
    what, _, example = text.partition("example:")
    parser: Parser = commands.add_parser(
        name, help=line, description=f"{line}\n\n{what.strip()}", epilog="example:" + example
    )
    parser.set_defaults(run=run)
    return parser


def add_model(parser: Parser, **options: Any) -> None:
    """The positional MODEL."""
    text = 'a checkpoint folder, a .gguf file, a hub id, "world" or "smollm2"'
    parser.add_argument("model", metavar="MODEL", help=text, **options)


def add_json(parser: Parser) -> None:
    """The switch for machine-readable output."""
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")


def number(kind: type, low: float, high: float = math.inf, *, below: bool = False, above: bool = False) -> Callable:
    """A reader of numbers in a range, for argparse's `type`.

    Args:
        kind: int or float.
        low: least value allowed.
        high: largest value allowed.
        below: whether `high` itself is not allowed.
        above: whether `low` itself is not allowed.
    """
    shown = f"{'a whole number' if kind is int else 'a number'} {'above' if above else 'from'} {low:g}"
    shown += "" if high == math.inf else f" {'to below' if below else 'to'} {high:g}"

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        inside = low <= value <= high and not (above and value == low) and not (below and value == high)
        if not inside or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not {shown}")
        return value

    return read


def listed(kind: Callable[[str], Any] = str) -> Callable[[str], tuple[Any, ...]]:
    """A reader of values with commas between them, for argparse's `type`."""

    def read(text: str) -> tuple[Any, ...]:
        return tuple(kind(part.strip()) for part in text.split(",") if part.strip())

    return read


def load_with_tokenizer(source: str, why: str) -> tuple[Any, Any]:
    """A model and its tokenizer.

    Raises:
        PrunekitError: there is no such model, or it has no tokenizer and `why` needs one.
    """
    from prunekit.checkpoint import load

    model, tokenizer = load(source)
    return model, need_tokenizer(source, tokenizer, why)


def need_tokenizer(source: str, tokenizer: Any, why: str) -> Any:
    """The tokenizer, where there is one.

    Raises:
        PrunekitError: there is none, and `why` needs one.
    """
    if tokenizer is None and _lost_tokens(Path(source)):
        raise PrunekitError(
            f"{source!r} has no tokenizer, and {why} needs one: its tokens were renumbered (plan.json lists under keep "
            "the old number of each new one), so that of the uncut model does not fit; put one of the new numbers there"
        )
    if tokenizer is None:
        raise PrunekitError(
            f"{source!r} has no tokenizer, and {why} needs one; copy tokenizer.json and tokenizer_config.json into its "
            "folder"
        )
    return tokenizer


def _lost_tokens(folder: Path) -> bool:
    from prunekit.pruning import PruningPlan

    path = folder / "plan.json"
    return path.is_file() and PruningPlan.load(path).takes_tokens


def print_json(value: Any) -> None:
    """Strict JSON; a number that is not finite becomes null."""
    print(json.dumps(_finite(value), indent=1))


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
