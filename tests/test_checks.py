"""One way of checking arguments: by annotation, for every public function and all settings."""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Annotated, Literal

import numpy as np
import pytest
import torch
from torch import nn

import prunekit as pk
from prunekit import recipes
from prunekit.checks import Count, Network, Positive, Seed, SharedModel, _held, check_value, checked
from prunekit.errors import PrunekitError, similar

FUNCTIONS = [getattr(pk, name) for name in pk.__all__ if inspect.isfunction(getattr(pk, name))]


@pytest.mark.parametrize("function", [*FUNCTIONS, *(getattr(recipes, name) for name in recipes.__all__)])
def test_every_public_function_checks_its_arguments(function):
    assert hasattr(function, "__wrapped__"), f"{function.__name__} has no @checked"


@pytest.mark.parametrize(
    ("value", "annotation", "allowed"),
    [
        (1, int, True),
        (np.int64(1), int, True),
        (True, int, False),
        (1.0, int, False),
        (math.inf, float, False),
        (math.nan, float, False),
        (10**400, float, False),
        (1, float, True),
        ("1", float, False),
        (0, Count, False),
        (None, Count | None, True),
        (2**32, Seed, False),
        (-1, Seed, False),
        (2**32 - 1, Seed, True),
        ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False),
        ("ab", Iterable[str], False),
        (["a", 1], Iterable[str], False),
        ({"a": 1}, Iterable[str], False),
        ({"a": 1}, Mapping[str, int], True),
        ({"a": "b"}, Mapping[str, int], False),
        ((1, 2), tuple[int, int], True),
        ((1, 2, 3), tuple[int, int], False),
        ([0.5], Sequence[Positive], True),
        ([0.5, -1.0], Sequence[Positive], False),
        (torch.ones(2, device="meta"), torch.Tensor, False),
        (torch.ones(2).to_sparse(), torch.Tensor, False),
        (torch.ones(2, device="meta"), torch.Tensor | Iterable[int], False),
        (torch.ones(2), torch.Tensor, True),
    ],
)
def test_values_are_compared_with_annotations(value, annotation, allowed):
    refusal = pytest.raises(PrunekitError, match=r"^x.*=.* is not allowed; give ")
    with nullcontext() if allowed else refusal:
        check_value("x", value, annotation)


def test_the_entry_that_does_not_fit_is_named():
    with pytest.raises(PrunekitError, match=r"^x\['b'\]\[1\]='c' is not allowed; give an integer$"):
        check_value("x", {"a": [1], "b": [1, "c"]}, Mapping[str, Sequence[int]])


@pytest.mark.parametrize(("value", "names_a_dictionary"), [(1.5, False), ("a", True)])
def test_who_gave_a_number_is_not_told_of_dictionaries(value, names_a_dictionary):
    with pytest.raises(PrunekitError, match=r"^x=.* is not allowed; give an integer") as refusal:
        check_value("x", value, int | None | Mapping[str, int])
    assert ("a dictionary" in str(refusal.value)) is names_a_dictionary and ", or None" in str(refusal.value)
    with pytest.raises(PrunekitError, match="give None, or a dictionary"):  # where no number is allowed
        check_value("x", value, None | Mapping[str, str])


def test_arguments_that_are_missing_or_unknown_are_named():
    for call in (lambda: pk.plan(1), lambda: pk.discover(nn.Linear(1, 1), depth=2)):
        with pytest.raises(PrunekitError, match="(plan: missing|discover: got an unexpected).*its arguments are"):
            call()


def test_what_is_written_without_a_check_would_be_seen():
    """The function of the test above is not a check by itself."""

    def double(n: Annotated[int, "no rule"]) -> int:
        return 2 * n

    assert double("a") == "aa"
    with pytest.raises(PrunekitError, match="n='a' is not allowed; give an integer"):
        checked(double)("a")


def test_the_models_of_a_call_are_held_also_in_a_dictionary():
    one, other = nn.Linear(1, 1), nn.Linear(1, 1)
    assert _held(one, Network) == [one] and _held(one, SharedModel) == []
    assert _held({"a": one, "b": other}, Mapping[str, Network]) == [one, other] and _held({"a": 1}, dict) == []


def test_models_in_wrappers_are_refused_by_name():
    with pytest.raises(PrunekitError, match=r"model=.*of a DataParallel: its \.module"):
        pk.discover(nn.DataParallel(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("given", "meant"), [("taylr", "taylor"), ("TAYLOR", "taylor"), ("sparsellm", "SparseLLM"), ("x", None)]
)
def test_a_name_is_asked_back_whatever_its_capitals(given, meant):
    assert similar(given, ["taylor", "SparseLLM"]) == (f" (did you mean {meant!r}?)" if meant else "")
