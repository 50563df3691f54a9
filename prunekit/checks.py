"""Checks of arguments by their annotations, one way for all functions, settings and commands; locks between threads.

`@checked` compares each argument of a function with its annotation before the function runs, and `check_fields` does
the same for the fields of a dataclass. `Count`, `Seed`, `Model` and the other names below are annotations whose type
alone does not say what is allowed.

One model is worked on by one thread at a time: a trace replaces a model's parameters while it runs, and an ablation its
weights, so two threads on one model would see each other's changes. Threads with models of their own run side by side,
but for the steps that change the process: random numbers, how torch builds modules, which attention kernels it takes.
A training holds the random numbers until it ends, so that loading a model, or another training, waits for it.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from threading import Lock, RLock
from typing import Annotated, Any, ParamSpec, TypeVar, get_args, get_origin
from weakref import WeakKeyDictionary

from torch import nn

from prunekit.annotations import Rule, fault_in, is_integer, is_real, shown, words_for
from prunekit.errors import PrunekitError, similar

LONGEST_NAME = 255  # bytes of a file's name, on nearly all systems
LARGEST = 2**31  # what is counted is fewer
P = ParamSpec("P")
R = TypeVar("R")


def _from(least: int) -> Rule:
    return Rule(lambda value: is_integer(value) and least <= value < LARGEST, f"an integer of {least} or more")


def _is_network(value: object) -> bool:
    wrapped = isinstance(value, nn.DataParallel | nn.parallel.DistributedDataParallel)
    return isinstance(value, nn.Module) and not wrapped and any(True for _ in value.parameters())


def _reads_tokens(value: object) -> bool:
    return _is_network(value) and hasattr(value, "get_input_embeddings") and hasattr(value, "config")


def _is_tokenizer(value: object) -> bool:
    return callable(value) and any(hasattr(value, name) for name in ("bos_token_id", "decode"))


def _names_a_file(value: object) -> bool:
    if not isinstance(value, str | os.PathLike) or "\0" in os.fspath(value):
        return False
    return all(len(os.fsencode(part)) <= LONGEST_NAME for part in Path(value).parts)


_NETWORK = "a causal language model with parameters, such as load(path) returns (of a DataParallel: its .module)"
_READER = "a causal language model of transformers, such as load(path) returns (of a DataParallel: its .module)"

FilePath = Annotated[str | Path, Rule(_names_a_file, "a path that a file can have")]
Count = Annotated[int, _from(1)]
Whole = Annotated[int, _from(0)]
Length = Annotated[int, _from(2)]
Amount = Annotated[int, Rule(lambda value: is_integer(value) and value >= 0, "an integer of 0 or more")]  # of any size
Seed = Annotated[int, Rule(lambda value: is_integer(value) and 0 <= value < 2**32, "an integer from 0 to 2**32 - 1")]
Share = Annotated[float, Rule(lambda value: is_real(value) and 0 <= value < 1, "a fraction in [0, 1), such as 0.25")]
Part = Annotated[float, Rule(lambda value: is_real(value) and 0 <= value <= 1, "a number from 0 to 1")]
Positive = Annotated[float, Rule(lambda value: is_real(value) and value > 0, "a finite number above 0")]
NotNegative = Annotated[float, Rule(lambda value: is_real(value) and value >= 0, "a finite number of 0 or more")]
Epochs = Annotated[float, Rule(lambda value: is_real(value) and 0 < value <= 10_000, "a number above 0, up to 10,000")]
Tokenizer = Annotated[Any, Rule(_is_tokenizer, "a tokenizer of transformers, such as load(path) returns")]
Network = Annotated[nn.Module, Rule(_is_network, _NETWORK, holds=True)]
Model = Annotated[Any, Rule(_reads_tokens, _READER, holds=True)]
SharedModel = Annotated[nn.Module, Rule(_is_network, _NETWORK)]  # that worker threads take up


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose arguments are compared with their annotations first; what a caller sees of it stays.

    While it runs, other threads that call one on the same model wait.

    Raises:
        PrunekitError: an argument that is missing, unknown or not allowed, by name.
    """
    found = signature(function)
    kinds = {name: each.annotation for name, each in found.parameters.items() if each.annotation is not Parameter.empty}

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = _bound(function.__name__, found, args, kwargs)
        given = {name: value for name, value in bound.items() if name in kinds}  # self has no annotation
        for name, value in given.items():
            check_value(name, value, kinds[name])
        with alone(model for name, value in given.items() for model in _held(value, kinds[name])):
            return function(*args, **kwargs)

    return call


def _bound(name: str, found: Signature, args: Any, kwargs: Any) -> dict[str, Any]:
    """Name → value of the arguments given; those collected by ** are the function's own business."""
    try:
        given = found.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise PrunekitError(f"{name}: {error}; its arguments are {', '.join(found.parameters)}") from None
    kinds = Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL
    return {name: value for name, value in given.items() if found.parameters[name].kind not in kinds}


def check_fields(value: Any) -> None:
    """Compare the fields of a dataclass with their annotations.

    Raises:
        PrunekitError: a field that is not allowed, by class and name.
    """
    for field in fields(value):
        check_value(f"{type(value).__name__}: {field.name}", getattr(value, field.name), field.type)


def check_value(name: str, value: Any, annotation: Any) -> None:
    """Compare a value with an annotation.

    Raises:
        PrunekitError: names the argument, or the entry of it, the value given and what is allowed.
    """
    fault = fault_in(name, value, annotation)
    if fault is not None:
        wanted = ", or ".join(dict.fromkeys(words_for(fault.annotation)))
        raise PrunekitError(f"{fault.name}={shown(fault.value)} is not allowed; give {wanted}")


def _held(value: Any, annotation: Any) -> list[nn.Module]:
    """The models that no other thread may work on meanwhile: an argument, or the values of a dictionary."""
    inside = get_args(annotation)
    if isinstance(value, Mapping) and len(inside) == 2:
        return [model for entry in value.values() for model in _held(entry, inside[1])]
    rules = inside[1:] if get_origin(annotation) is Annotated else ()
    return [value] if any(isinstance(rule, Rule) and rule.holds for rule in rules) else []


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Raise an error for a value that is not among those allowed.

    Raises:
        PrunekitError: names the option, the value given and the values allowed.
    """
    allowed = tuple(allowed)
    if not any(type(value) is type(each) and value == each for each in allowed):
        listed = ", ".join(map(repr, allowed))
        raise PrunekitError(f"{name}={shown(value)} is unknown; allowed: {listed}{similar(value, allowed)}")


# --- locks --------------------------------------------------------------------------------------

_GUARD = Lock()
_OF_MODEL: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
# Held by whoever changes what the whole process shares. It is taken after the locks of models, never before.
PROCESS = RLock()


@contextmanager
def alone(models: Iterable[nn.Module]) -> Iterator[None]:
    """A context in which no other thread is in such a context with one of these models; it waits for that.

    A thread may enter it again. All models are given at once, so that two threads cannot wait for each other.
    """
    with _GUARD:
        locks = {id(lock): lock for lock in (_OF_MODEL.setdefault(model, RLock()) for model in models)}
    with ExitStack() as stack:
        for key in sorted(locks):
            stack.enter_context(locks[key])
        yield
