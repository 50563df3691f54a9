"""Follows integers that modules store about their widths through a forward pass.

A module keeps numbers such as its head count, and a forward pass puts them, or sums and products of them,
into views and splits. Matching such numbers by value is wrong (a layer index may equal a head count), so each
is replaced for one trace by an `int` that knows where it came from and keeps knowing it through arithmetic.
"""

import copy
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from prunekit.models import WRITTEN_OUT  # whose code reads every number that a module keeps

Key = tuple[str, str, str]  # module path, "" or "config", attribute (with "[i]" for an element of a sequence)


@dataclass(frozen=True)
class Attribute:
    """An integer as a module or its configuration holds it."""

    key: Key
    value: int

    def evaluate(self, values: Mapping[Key, int]) -> int:
        """The number once some attributes have new values."""
        return values.get(self.key, self.value)

    def attributes(self) -> frozenset["Attribute"]:
        """All attributes that this number is made of."""
        return frozenset([self])


@dataclass(frozen=True)
class Operation:
    """A number computed from stored integers."""

    function: Callable[[int, int], int]
    left: "Expression"
    right: "Expression"

    def evaluate(self, values: Mapping[Key, int]) -> int:
        """The number once some attributes have new values."""
        return self.function(_evaluate(self.left, values), _evaluate(self.right, values))

    def attributes(self) -> frozenset[Attribute]:
        """All attributes that this number is made of."""
        sides = [side for side in (self.left, self.right) if not isinstance(side, int)]
        return frozenset().union(*(side.attributes() for side in sides))


Expression = Attribute | Operation | int


def _evaluate(side: Expression, values: Mapping[Key, int]) -> int:
    return side if isinstance(side, int) else side.evaluate(values)


class Remembered(int):
    """An `int` that knows which attributes it was computed from."""

    origin: Attribute | Operation

    @classmethod
    def of(cls, value: int, origin: Attribute | Operation) -> "Remembered":
        """Wrap `value`."""
        number = cls(value)
        number.origin = origin
        return number


def _arithmetic(function: Callable[[int, int], int], reflected: bool) -> Callable[[Remembered, Any], Any]:
    def method(self: Remembered, other: Any) -> Any:
        if not isinstance(other, int):
            return NotImplemented
        plain = other.origin if isinstance(other, Remembered) else int(other)
        sides = (plain, self.origin) if reflected else (self.origin, plain)
        numbers = (int(other), int(self)) if reflected else (int(self), int(other))
        return Remembered.of(function(*numbers), Operation(function, *sides))

    return method


for _function in (operator.add, operator.sub, operator.mul, operator.floordiv):
    setattr(Remembered, f"__{_function.__name__}__", _arithmetic(_function, reflected=False))
    setattr(Remembered, f"__r{_function.__name__}__", _arithmetic(_function, reflected=True))


def _wrap(value: Any, key: Key) -> Any:
    if type(value) is int:
        return Remembered.of(value, Attribute(key, value))
    if type(value) in (list, tuple) and value and all(type(v) is int for v in value):
        path, holder, name = key
        return type(value)(_wrap(v, (path, holder, f"{name}[{i}]")) for i, v in enumerate(value))
    return value


@contextmanager
def remembering(model: nn.Module, written_out: bool = True) -> Iterator[None]:
    """A context in which every integer of a module or its configuration knows its origin.

    Args:
        model: whose integers.
        written_out: run attention and eager experts, whatever the model is set to.
    """
    before = [(vars(module), dict(vars(module))) for module in model.modules()]
    try:
        for path, module in model.named_modules():
            _wrap_attributes(module, path, WRITTEN_OUT if written_out else ())
        yield
    finally:
        for own, was in before:  # attributes written by the forward pass go too: they contain the trace's tensors
            own.clear()
            own.update(was)


def _wrap_attributes(module: nn.Module, path: str, written_out: tuple[str, ...]) -> None:
    own = vars(module)
    own.update({name: _wrap(value, (path, "", name)) for name, value in own.items()})
    config = own.get("config")
    if config is not None and hasattr(config, "__dict__"):
        mine = copy.copy(config)
        numbers = {name: value for name, value in vars(mine).items() if type(value) is int}
        vars(mine).update({name: _wrap(value, (path, "config", name)) for name, value in numbers.items()})
        vars(mine).update(dict.fromkeys(set(written_out) & set(vars(mine)), "eager"))
        own["config"] = mine


def set_attribute(module: nn.Module, key: Key, value: int) -> None:
    """Replace a stored integer; a configuration is copied first."""
    _, holder, name = key
    if holder == "config":
        module.config = copy.copy(module.config)
        vars(module.config)[name] = value
        return
    own = vars(module)
    base, _, index = name.partition("[")
    if not index:
        own[name] = value
        return
    sequence = list(own[base])
    sequence[int(index[:-1])] = value
    own[base] = type(own[base])(sequence)
