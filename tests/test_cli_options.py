"""Options of the command line: read from signatures, types and docstrings, and handed on as they were given."""

import re
from collections.abc import Iterable
from importlib import import_module
from inspect import getdoc, signature
from typing import Annotated, Any, Literal

import pytest

from prunekit.cli import COMMANDS
from prunekit.cli.console import Answer, Of, described, given_to, parser_of
from prunekit.errors import PrunekitError


def tune(
    data,
    *,
    rate: float = 0.5,
    layers: Iterable[int] | None = None,
    kind: str | float = "a",
    keep: bool = False,
    text: str | Iterable[Any] = "",
):
    """Tune.

    Args:
        data: text.
        rate: how fast, in `(0, 1)`:
            100% of it.
        layers: which.
        kind: of it.
        keep: zeros.
        text: or documents.
    """


def verb(
    model: str,
    place: str | None = None,
    *,
    out: str,
    tuning: Annotated[dict[str, Any], Of(tune, "rate", "layers", "kind", "text", keep=True)],
    pattern: tuple[int, int] | None = None,
    n_steps: int = 3,
    fit: Annotated[Literal["both", "bias"] | None, {"nargs": "?", "const": "both"}] = None,
    stream: bool | None = None,
) -> Answer:
    """Do it.

    More of it.

    Example:
        prunekit verb MODEL

    Args:
        model: to read.
        place: to stand.
        out: to write.
        tuning: options of `tune`.
        pattern: of zeros.
        n_steps: in all.
        fit: what.
        stream: or not.
    """


def parsed(*arguments):
    return given_to(verb, parser_of(verb, "prunekit verb").parse_args(["m", *arguments, "--out", "o"]))


def test_only_what_was_given_is_handed_on():
    assert parsed() == {"model": "m", "out": "o", "tuning": {}}
    assert parsed("--text", "a,b")["tuning"] == {"text": "a,b"}
    given = parsed("here", "--rate", "2", "--layers", "0, 3", "--pattern", "2:4", "--n-steps", "5", "--no-stream")
    assert given["tuning"] == {"rate": 2.0, "layers": (0, 3)} and given["place"] == "here"
    assert (given["pattern"], given["n_steps"], given["stream"]) == ((2, 4), 5, False)


@pytest.mark.parametrize(("text", "value"), [("0.5", 0.5), ("2:4", "2:4")])
def test_a_number_where_it_is_one(text, value):
    assert parsed("--kind", text)["tuning"] == {"kind": value}


def test_an_option_may_stand_for_a_value():
    assert parsed("--fit")["fit"] == "both" and parsed("--fit", "bias")["fit"] == "bias"
    assert parsed("--keep")["tuning"] == {"keep": True}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n-steps", "many"], "'many' is not a whole number"),
        (["--rate", "fast"], "'fast' is not a number"),
        (["--layers", "1,x"], "'x' is not a whole number"),
        (["--pattern", "2-4"], "'2-4' is not KEPT:OF"),
        (["--fit", "all"], "invalid choice: 'all'"),
        (["--n-step=3"], "unrecognized arguments: --n-step=3; see prunekit verb --help"),
    ],
)
def test_what_cannot_be_read_is_refused_with_where_to_look(arguments, message):
    with pytest.raises(PrunekitError, match="see prunekit verb --help") as error:
        parsed(*arguments)
    assert message in str(error.value)


def test_help_says_what_the_docstrings_say():
    said = " ".join(parser_of(verb, "prunekit verb").format_help().split())
    assert "More of it." in said and said.endswith("example: prunekit verb MODEL")
    assert "options of tune: --rate RATE how fast, in (0, 1): 100% of it. (default: 0.5)" in said
    assert "--json" in said


def verb_of(name):
    return getattr(import_module(f"prunekit.cli.{COMMANDS[name][0]}"), name)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_verb_and_option_is_described(name):
    found = verb_of(name)
    assert getdoc(found).splitlines()[0] == COMMANDS[name][1]
    assert set(described(found)) == set(signature(found).parameters)
    parser = parser_of(found, name)
    said = " ".join(parser.format_help().partition("example:")[0].split())
    assert "None" not in said.split() and not re.search(r'\w="\w', said)  # words of Python that nobody can type
    helps = " ".join(action.help or "" for action in parser._actions)
    there = {option for other in COMMANDS for option in parser_of(verb_of(other), other)._option_string_actions}
    assert set(re.findall(r"--[a-z]+(?:-[a-z]+)*", helps)) <= there
