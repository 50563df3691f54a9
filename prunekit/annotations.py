"""Compares values with type annotations, and says in words what an annotation allows."""

import collections.abc
import math
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from numbers import Integral, Real
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import numpy as np
import pandas as pd
import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """An annotation's rule, `Annotated[int, Rule(...)]`.

    Attributes:
        allows: a value → whether it is allowed.
        wanted: what is, in words that follow "give".
        holds: whether the value is a model that no other thread may work on meanwhile.
    """

    allows: Callable[[Any], bool]
    wanted: str
    holds: bool = False


def is_integer(value: object) -> bool:
    """Whether a value is an integer, of Python or NumPy, and not a Boolean."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_texts(value: object) -> bool:
    """Whether a value is a list or tuple of texts, and not empty."""
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(text, str) for text in value)


def is_real(value: object) -> bool:
    """Whether a value is a finite number and not a Boolean."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def shown(value: object, most: int = 60) -> str:
    """A value for a message: on one line of at most so many letters, and with its type where it is longer."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a repr of any kind
        text = "…"
    return text if len(text) <= most else f"{text[: most - 20]}… ({type(value).__name__})"


class Fault(NamedTuple):
    """What does not fit: an argument, or an entry of it."""

    name: str
    value: Any
    annotation: Any


def readable(value: float) -> str:
    """A figure as text: whole and large ones with separated thousands, others with four significant digits."""
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 10_000 else f"{value:.4g}"


def fault_in(name: str, value: Any, annotation: Any) -> Fault | None:
    """The first thing in a value that its annotation does not allow."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        rules = [rule for rule in annotation.__metadata__ if isinstance(rule, Rule)]
        fits = all(rule.allows(value) for rule in rules)
        return (None if fits else Fault(name, value, annotation)) if rules else fault_in(name, value, inside[0])
    if origin in (Union, types.UnionType):
        faults = [fault_in(name, value, each) for each in inside]
        if None in faults:
            return None
        deeper = [fault for fault in faults if fault is not None and fault.name != name]
        numbers = [each for each in inside if get_origin(each) is Annotated or each in (int, float)]
        if is_real(value) and numbers:  # then what a dictionary may hold helps nobody
            inside = tuple(each for each in inside if get_origin(each) is not collections.abc.Mapping)
        return deeper[0] if deeper else Fault(name, value, reduce(or_, inside))
    if origin in (None, Literal) or origin is collections.abc.Callable:
        return None if _is_of(value, annotation) else Fault(name, value, annotation)
    if not _is_collection(value, origin, inside):
        return Fault(name, value, annotation)
    parts = ((f"{name}{place}", entry, kind) for place, entry, kind in _entries(value, inside))
    return next((fault for part in parts if (fault := fault_in(*part)) is not None), None)


def _is_of(value: Any, annotation: Any) -> bool:
    """Whether a value is of a type that holds no others."""
    if get_origin(annotation) is Literal:
        return any(type(value) is type(each) and value == each for each in get_args(annotation))
    if annotation in _PLAIN:
        return _PLAIN[annotation](value)
    kind = get_origin(annotation) or annotation
    return isinstance(value, kind) if isinstance(kind, type) else True  # a name, a TypeVar


def _is_collection(value: Any, origin: Any, inside: tuple[Any, ...]) -> bool:
    if isinstance(value, Tensor):
        return _is_dense(value) and value.dim() > 0 and origin is collections.abc.Iterable and inside == (Any,)
    if isinstance(value, np.ndarray):
        return value.ndim > 0 and origin in (collections.abc.Iterable, collections.abc.Sequence)
    kinds = (tuple, list) if origin is tuple else origin  # a list does as well, and JSON has no tuples
    if not isinstance(value, kinds) or isinstance(value, str | bytes):
        return False
    if isinstance(value, Mapping | pd.DataFrame) and not issubclass(origin, Mapping):
        return inside in ((), (Any,))  # its keys alone are seldom meant
    return origin is not tuple or ... in inside or len(value) == len(inside)


def _entries(value: Any, inside: tuple[Any, ...]) -> Iterator[tuple[str, Any, Any]]:
    """Place, entry and annotation of what a collection holds, where looking does not use it up."""
    if all(kind is Any for kind in inside):
        return
    if isinstance(value, Mapping) and len(inside) == 2:
        for key, entry in value.items():
            yield f": key {shown(key)}", key, inside[0]
            yield f"[{shown(key)}]", entry, inside[1]
        return
    if isinstance(value, np.ndarray | pd.Series):
        value = value.tolist()
    if isinstance(value, list | tuple | set | frozenset | range):
        kinds = inside if len(inside) == len(value) and ... not in inside else ()
        for number, entry in enumerate(value):
            yield f"[{number}]", entry, kinds[number] if kinds else inside[0]


def _is_dense(value: object) -> bool:
    if not isinstance(value, Tensor) or value.is_meta or value.is_nested:
        return False
    return value.layout is torch.strided and not value.is_quantized


_PLAIN: dict[Any, Callable[[Any], bool]] = {
    Any: lambda value: True,
    bool: lambda value: isinstance(value, bool | np.bool_),
    int: is_integer,
    float: is_real,
    Tensor: _is_dense,
}
_WORDS: dict[Any, str] = {
    type(None): "None",
    bool: "True or False",
    int: "an integer",
    float: "a finite number",
    str: "a text",
    Path: "a path",
    Tensor: "a dense tensor with data",
}
_MAKERS = {  # class → what makes it
    "PruningPlan": "a PruningPlan, as plan(...) or PruningPlan.load(...) returns",
    "Groups": "Groups, as discover(model) returns",
    "Gradients": "what gather_gradients returns",
    "Scores": "Scores, as score(...) returns",
    "Report": "a Report, as evaluate(...) or Report.load(...) returns",
    "LoRA": "LoRA(...), such as LoRA(r=8)",
    "FullTuning": "FullTuning(...)",
    "Distillation": "Distillation(dense, ...)",
    "TeacherLogits": "TeacherLogits, as keep_logits(...) or TeacherLogits.load(...) returns",
    "device": "a device, such as torch.device('cuda')",
    "Space": "a PlanSpace or a HyperparameterSpace",
}


def words_for(annotation: Any) -> list[str]:
    """What an annotation allows, in words."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        rules = [rule.wanted for rule in annotation.__metadata__ if isinstance(rule, Rule)]
        return rules or words_for(inside[0])
    if origin in (Union, types.UnionType):
        return [word for each in inside for word in words_for(each)]
    if origin is Literal:
        return [repr(each) for each in inside]
    if annotation in _WORDS:
        return [_WORDS[annotation]]
    kind = origin or annotation
    if kind is collections.abc.Callable:
        return ["a function"]
    if origin is None:
        return [_MAKERS.get(kind.__name__, f"an object of class {kind.__name__}")]
    if issubclass(kind, Mapping):
        return ["a dictionary" + (f", each value {' or '.join(words_for(inside[1]))}" if inside else "")]
    of = " or ".join(dict.fromkeys(word for each in inside if each not in (Any, ...) for word in words_for(each)))
    several = f"{len(inside)} values" if kind is tuple and ... not in inside else "a list"
    return [several + (f", each {'one' if several != 'a list' else 'entry'} {of}" if of else "")]
