"""Options of a verb, read from the signatures, types and docstrings of the functions that take them, and its output."""

import argparse
import json
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Parameter, getdoc, signature
from logging.handlers import BufferingHandler
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

from prunekit.errors import PrunekitError
from prunekit.escaping import printable

SECTIONS = r"^(?:Args|Attributes|Example|Raises|Returns|Source):$"


class Of:
    """Options of a function, or of a class of settings, that a verb takes as one dictionary of those that were given.

    It stands in an annotation: `planning: Annotated[dict, Of(plan, "ranking")]`.

    Args:
        source: what is called with the options in the end.
        names: of its parameters; all defaults are its own,
        defaults: but for these, which the verb sets.
    """

    def __init__(self, source: Callable[..., Any], *names: str, **defaults: Any) -> None:
        self.source, self.names, self.defaults = source, (*names, *defaults), defaults


def flag(name: str) -> str:
    """The option of a shell for a parameter."""
    return f"--{name.replace('_', '-')}"


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `PrunekitError` and keeps the line breaks of its texts."""

    def __init__(self, prog: str | None = None, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Bad input, with where to look.

        Raises:
            PrunekitError: always.
        """
        raise PrunekitError(f"{message}; see {self.prog} --help")


def parser_of(verb: Callable[..., Any], prog: str) -> Parser:
    """The parser of a verb: positional parameters, options, and those that `Of` names, in a group each."""
    parser = Parser(prog, **explained(verb))
    told, seen = described(verb), set()
    for name, parameter in signature(verb).parameters.items():
        kind, notes = _taken_apart(parameter.annotation)
        borrowed = [note for note in notes if isinstance(note, Of)]
        extras = {key: value for note in notes if isinstance(note, dict) for key, value in note.items()}
        if not borrowed:
            _add(parser, parameter.replace(annotation=kind), told[name], extras)
            continue
        place = parser.add_argument_group(told[name].rstrip("."))
        for each in borrowed:
            for option in each.names:
                found = signature(each.source).parameters[option]
                default = None if found.default is Parameter.empty else found.default
                found = found.replace(kind=Parameter.KEYWORD_ONLY, default=each.defaults.get(option, default))
                if option not in seen:  # the first that has it describes it
                    _add(place, found, described(each.source)[option], {})
                seen.add(option)
    if signature(verb).return_annotation is Answer:
        parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    return parser


def explained(verb: Callable[..., Any]) -> dict[str, str]:
    """Description of a parser from a docstring's text before its sections, and the example as its end."""
    text, _, rest = (getdoc(verb) or "").partition("\n\nExample:\n")
    example = re.split(SECTIONS, rest, flags=re.MULTILINE)[0].strip()
    return {"description": text, "epilog": f"example:\n  {example}".replace("\n    ", "\n  ")}


def given_to(verb: Callable[..., Any], args: argparse.Namespace) -> dict[str, Any]:
    """The arguments to call a verb with: what was given, its options of other functions in their dictionaries."""
    given: dict[str, Any] = {}
    for name, parameter in signature(verb).parameters.items():
        borrowed = [note for note in _taken_apart(parameter.annotation)[1] if isinstance(note, Of)]
        if borrowed:
            names = [option for each in borrowed for option in each.names]
            given[name] = {option: getattr(args, option) for option in names if hasattr(args, option)}
        elif hasattr(args, name):
            given[name] = getattr(args, name)
    return given


def described(source: Callable[..., Any]) -> dict[str, str]:
    """Parameter → what the docstring says of it, under Args or Attributes, as one line."""
    parts = re.split(r"^(?:Args|Attributes):$", getdoc(source) or "", flags=re.MULTILINE)
    section = re.split(SECTIONS, parts[1], flags=re.MULTILINE)[0] if len(parts) > 1 else ""
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section, flags=re.MULTILINE)
    return {name: _for_a_shell(" ".join(text.split()).replace("`", "")) for name, text in found}


_OPTIONS = ("pruning_ratio", "protect_layers", "learning_rate")  # that warnings name


def _for_a_shell(text: str) -> str:
    """What a docstring or a warning says in Python's words, in those of a command line."""
    text = re.sub(r"""\b(\w+)=["'](\w[\w-]*)["']""", lambda found: f"{flag(found[1])} {found[2]}", text)
    text = re.sub(rf"\b(?:{'|'.join(_OPTIONS)})\b", lambda found: flag(found[0]), text)
    text = text.replace("recover()", "prunekit recover")
    text = re.sub(r"\bNone (?:takes|is) ", "by default ", text)
    return text.replace(". by default", ". By default")


def _taken_apart(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type, and what `Annotated` notes beside it."""
    return (annotation.__origin__, annotation.__metadata__) if get_origin(annotation) is Annotated else (annotation, ())


def _add(place: Any, parameter: Parameter, told: str, extras: Mapping[str, Any]) -> None:
    """One argument: positional where it may be given without its name, required where it has no default."""
    name, default = parameter.name, parameter.default
    shown = default not in (None, Parameter.empty, ()) and not isinstance(default, bool)
    typed = ",".join(map(str, default)) if isinstance(default, tuple) else default
    options = {"help": (told + (f" (default: {typed})" if shown else "")).replace("%", "%%")}
    options |= {**_reading(parameter.annotation), "default": argparse.SUPPRESS, **extras}
    required = default is Parameter.empty
    if parameter.kind is Parameter.KEYWORD_ONLY:
        flags = (flag(name), *options.pop("flags", ()))
        place.add_argument(*flags, dest=name, required=required, **options)
    else:
        place.add_argument(name, **{"metavar": name.upper()} | ({} if required else {"nargs": "?"}) | options)


def _reading(annotation: Any) -> dict[str, Any]:
    """The argparse type for an annotation; of several, the first that a shell can express."""
    annotation = _taken_apart(annotation)[0]
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    kinds = tuple(_taken_apart(kind)[0] for kind in kinds)
    for kind in kinds:
        origin, inside = get_origin(kind), get_args(kind)
        if origin is Literal:
            return {"choices": inside}
        if origin is tuple and set(inside) == {int}:
            return {"type": _counts, "metavar": "KEPT:OF"}
        several = origin in (Iterable, Sequence) or (origin is tuple and ... in inside)
        if several and Any not in inside:  # of anything, a shell gives one
            return {
                "type": _listed(inside[0] if inside[0] in (int, float) else str),
                "metavar": "N,N" if inside[0] in (int, float) else "A,B",
            }
    if bool in kinds:
        return {"action": argparse.BooleanOptionalAction if NoneType in kinds else "store_true"}
    number = next((kind for kind in (float, int) if kind in kinds), str)
    return {"type": _reader(number, or_text=str in kinds)}


def _reader(kind: type, or_text: bool = False) -> Callable[[str], Any]:
    """A parser of numbers for argparse's `type`; the library checks ranges."""

    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            if or_text:
                return text
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from None

    return read


def _listed(kind: type) -> Callable[[str], tuple[Any, ...]]:
    """A parser of comma-separated values."""
    read = _reader(kind)
    return lambda text: tuple(read(part.strip()) for part in text.split(",") if part.strip())


def _counts(text: str) -> tuple[int, ...]:
    kept, _, of = text.partition(":")
    if not (kept.isdecimal() and of.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEPT:OF, such as 2:4")
    return int(kept), int(of)


# --- output -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """Output of a verb: plain values for `--json`, or text."""

    values: dict[str, Any]
    text: str


def as_json(value: Any) -> str:
    """Strict JSON; a number that is not finite becomes null."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None), indent=1)


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
    with warnings.catch_warnings(), _own_log(), _quiet("huggingface_hub"), _quiet("datasets"):
        warnings.simplefilter("ignore")
        for kind in (DamageWarning, NoVocabulary):
            warnings.simplefilter("always", kind)
        warnings.showwarning = lambda message, *_, **__: say(_for_a_shell(str(message)))
        yield


@contextmanager
def _quiet(library: str) -> Iterator[None]:
    """A context in which a library logs errors alone, and not each time that it tries again."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _own_log() -> Iterator[None]:
    """A context that prints each line of prunekit's log once, when all went well: an error is a single line."""
    logger, handler = logging.getLogger("prunekit"), BufferingHandler(sys.maxsize)
    level, handled_above = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
        for message in dict.fromkeys(line.getMessage() for line in handler.buffer):  # several models read one text
            say(message)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = handled_above
