"""The dispatch mode of a trace: runs every operation and its rule on the labels."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunekit.compat import TorchDispatchMode, storage_key
from prunekit.discovery import arithmetic, movement
from prunekit.discovery.constants import Argument, Buffers, constants_among, n_stored
from prunekit.discovery.integer_positions import Equation, Span
from prunekit.discovery.labels import ARGUMENT, SCORE, LabelGraph, along, varying_dims
from prunekit.discovery.operations import RULES, Choice, Rule, chosen_by, tensors_in, unknown
from prunekit.discovery.parts import Part
from prunekit.discovery.rules import Operand
from prunekit.discovery.stored_integers import Key

PLANES = "_prunekit_planes"
UNIFORM = "_prunekit_uniform"


@dataclass(eq=False)
class Trace:
    """The result of tracing one token.

    Attributes:
        graph: nodes and relations.
        offsets: (parameter, dim) → (first node, size); parameters as in `named_parameters()`.
        shapes: parameter → shape.
        equations: where remembered integers arrived.
        sizes: what stands behind the sizes that code read off tensors.
        rectangles: planes with two or more labelled dimensions, which every cut must leave rectangular; by where
            they lie, since one that is transposed or reshaped back need not be looked at twice.
        scalars: name and plain numbers of every pointwise operation on labelled tensors, in order.
        arguments: constants passed to modules, such as the slopes of ALiBi, → (first node, values).
        buffers: name of each buffer that channels meet → (first node, shape).
        parts: modules that do nothing when their parameters are zero.
    """

    graph: LabelGraph = field(default_factory=LabelGraph)
    offsets: dict[tuple[str, int], tuple[int, int]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    equations: list[Equation] = field(default_factory=list)
    sizes: dict[Key, Span] = field(default_factory=dict)
    rectangles: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    scalars: list[tuple[Any, ...]] = field(default_factory=list)
    arguments: dict[Argument, tuple[int, Tensor]] = field(default_factory=dict)
    buffers: dict[str, tuple[int, torch.Size]] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)

    def parameters_in(self, paths: set[str]) -> frozenset[str]:
        """Parameters of these modules."""
        return frozenset(name for name in self.shapes if any(name.startswith(f"{path}.") for path in paths))


class LabelMode(TorchDispatchMode):
    """Runs every operation on the tensors and its rule on their labels."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace
        self.graph = trace.graph
        self.path = ""  # of the module that runs
        self.entered = ""  # of the module that began to run last
        self.choices: list[Choice] = []
        self.buffers = Buffers()
        self.token_rows: list[Tensor] = []  # labels of the rows that were looked up by token
        self.token_use = ""  # an operation that did something else with the tokens
        self._input: torch.UntypedStorage | None = None
        self._storages: dict[int, tuple[Tensor, torch.UntypedStorage]] = {}
        self._chosen: dict[int, tuple[int, torch.UntypedStorage]] = {}

    def is_input(self, tensor: Tensor) -> bool:
        """Whether a tensor is the input's tokens themselves, in whatever view."""
        return self._input is not None and storage_key(tensor.untyped_storage()) == storage_key(self._input)

    def input(self, shape: tuple[int, int]) -> Tensor:
        """Token ids to run."""
        tokens = torch.zeros(shape, dtype=torch.long)
        self._input = tokens.untyped_storage()
        return tokens

    def labelled(self, tensor: Tensor) -> bool:
        """Whether a tensor has labels."""
        return storage_key(tensor.untyped_storage()) in self._storages or bool(getattr(tensor, PLANES, ()))

    def operand(self, tensor: Tensor) -> Operand:
        """The labels of a tensor. Views share the labels of what they view, as they share its storage."""
        planes = getattr(tensor, PLANES, None)
        if planes is not None:
            return Operand(planes, tensor.shape, parameter=True)
        key = storage_key(tensor.untyped_storage())
        found = self._storages.get(key)
        if found is None:
            uniform = n_stored(tensor) == 1 or _still_uniform(tensor)
            return Operand((), tensor.shape, uniform=uniform, choice=self._chosen.get(key, (None,))[0])
        plane = found[0].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        return Operand((plane,), tensor.shape)

    def mark(self, tensor: Tensor, plane: Tensor | None) -> Tensor:
        """Give an activation its labels; later views and in-place writes share them."""
        if plane is None:
            return tensor
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        if key not in self._storages:
            n = storage.nbytes() // tensor.element_size()
            self._storages[key] = (torch.from_numpy(np.zeros(n, np.int64)), storage)
        flat = self._storages[key][0]
        if storage_key(plane.untyped_storage()) == storage_key(flat.untyped_storage()):
            plane = plane.clone()  # what is written in place may be its own labels, expanded
        copies = {d for d, step in enumerate(tensor.stride()) if not step}  # of one element, which has one label
        labels, plane = (along(t, set(range(t.dim())) - copies) for t in (tensor, plane.expand(tensor.shape)))
        flat.as_strided(labels.shape, labels.stride(), labels.storage_offset()).copy_(plane)
        return tensor

    def label_arguments(self, args: tuple, kwargs: dict) -> list[tuple[Any, Any]]:
        """Give the constants among a module's arguments nodes of their own; returns the earlier nodes."""
        before = []
        for where, tensor in constants_among(args, kwargs):
            storage = tensor.untyped_storage()
            if storage_key(storage) in self._chosen or (self.labelled(tensor) and not self.is_handed(tensor)):
                continue
            buffer = self.buffers.found(tensor)
            if buffer is not None and buffer.own:  # which is cut itself where channels meet it
                continue
            before.append((storage_key(storage), self._storages.pop(storage_key(storage), None)))
            self.trace.arguments[Argument(self.path, where, tuple(tensor.shape))] = (self.graph.n_nodes, tensor.clone())
            self.mark(tensor, self.graph.new(tuple(tensor.shape), ARGUMENT))
        return before

    def _nodes_of(self, buffer: str) -> Tensor:
        """The nodes of a buffer's entries, new ones where it has none yet."""
        if buffer not in self.trace.buffers:
            shape = self.buffers.shapes[buffer]
            self.trace.buffers[buffer] = (self.graph.n_nodes, shape)
            self.graph.new(shape, ARGUMENT)
        start, shape = self.trace.buffers[buffer]
        return torch.arange(start, start + shape.numel())

    def is_handed(self, tensor: Tensor) -> bool:
        """Whether a tensor's labels are those of an argument, and last until the module returns."""
        found = self._storages.get(storage_key(tensor.untyped_storage()))
        return found is not None and self.graph.kind_of(found[0]) == ARGUMENT

    def is_score(self, tensor: Tensor) -> bool:
        """Whether a tensor's labels are of scores, such as attention weights."""
        return all(self.graph.kind_of(plane) == SCORE for plane in self.operand(tensor).planes)

    def restore(self, before: list[tuple[Any, Any]]) -> None:
        """Restore the labels that constants had outside a module, in reverse order: two may share a storage."""
        for key, found in reversed(before):
            self._storages.pop(key, None)
            if found is not None:
                self._storages[key] = found

    def mark_parameter(self, tensor: Tensor, planes: tuple[Tensor, ...]) -> Tensor:
        """Attach label planes to a parameter, or to a tensor that is computed from parameters alone."""
        setattr(tensor, PLANES, planes)
        return tensor

    def mark_uniform(self, tensor: Tensor) -> Tensor:
        """A constant of equal values: it takes any width."""
        setattr(tensor, UNIFORM, True)
        return tensor

    def mark_chosen(self, result: Any, choice: int) -> Any:
        """Tensors computed from a choice by value."""
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            self._chosen[storage_key(storage)] = (choice, storage)
        return result

    def lock(self, labels: Tensor, reason: str) -> None:
        """As `LabelGraph.lock`, naming the module that runs."""
        self.graph.lock(labels, f"{self.path or 'the model'}: {reason}")

    def note_numbers(self, func: Any, values: Any) -> None:
        """Record plain numbers that tensors are computed with or made of."""
        numbers = _scalars(self, values)
        if numbers:
            self.trace.scalars.append((func.overloadpacket.__name__, *numbers))

    def record_rectangle(self, plane: Tensor) -> None:
        """Record a plane whose cut must stay rectangular."""
        steps = sorted((n, step) for n, step in zip(plane.shape, plane.stride(), strict=True) if n > 1)
        place = (plane.data_ptr(), *steps)
        if len(steps) > 1 and place not in self.trace.rectangles and len(varying_dims(plane)) > 1:
            self.trace.rectangles[place] = plane.squeeze()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        rule = RULES.get(func.overloadpacket) or (RULES["pointwise"] if torch.Tag.pointwise in func.tags else None)
        if rule is not None and rule.always:
            return rule.apply(self, func, args, kwargs)
        tensors = tensors_in((args, kwargs))
        self._see_tokens(func, args, tensors)
        if not any(map(self.labelled, tensors)):
            return self._run_on_constants(func, args, kwargs, tensors)
        self._label_buffers(rule, tensors)
        if torch.Tag.pointwise in func.tags:
            self.note_numbers(func, [*args, *kwargs.values()])
        first_lock = len(self.graph.locks)
        result = (rule.apply if rule else unknown)(self, func, args, kwargs)
        for i in range(first_lock, len(self.graph.locks)):
            labels, reason = self.graph.locks[i]
            if not reason.startswith(f"{self.path}:"):
                self.graph.locks[i] = (labels, f"{self.path}: {reason} ({func.overloadpacket.__name__})")
        return result

    def _run_on_constants(self, func: Any, args: tuple, kwargs: dict, tensors: list[Tensor]) -> Any:
        """Of numbers without labels it is only known which buffer or which choice they come from."""
        alike = torch.Tag.pointwise in func.tags or func.overloadpacket in movement.COPIES
        choice = chosen_by(self, tensors) if self.choices else None
        result = func(*args, **kwargs)
        if alike:
            self.buffers.follow_result(tensors, result)
        if choice is None:
            return result
        if alike and isinstance(result, Tensor) and all(self.operand(tensor).uniform for tensor in tensors):
            self.mark_uniform(result)  # such as a mask over the one group that all experts are in
        return self.mark_chosen(result, choice)

    def _label_buffers(self, rule: Rule | None, tensors: list[Tensor]) -> None:
        """Give labels to buffers that are about to meet labelled channels one to one."""
        entrywise = rule is not None and rule.apply in (arithmetic.pointwise, arithmetic.norm)
        for tensor in tensors:
            found = None if self.labelled(tensor) else self.buffers.found(tensor)
            if found is not None and (entrywise or (tensor.dim() == 1 and tensor.is_floating_point())):
                labels = self._nodes_of(found.name)[found.entries]
                self._storages[storage_key(found.storage)] = (labels, found.storage)

    def _see_tokens(self, func: Any, args: tuple, tensors: list[Tensor]) -> None:
        """Tokens may be numbered anew where rows are looked up by them, and nothing else is done with their numbers."""
        if any(t.dtype == torch.long and self.is_input(t) for t in tensors):
            looks_up = func.overloadpacket in movement.LOOK_UPS and not any(map(self.is_input, tensors_in(args[:1])))
            if not looks_up and func.overloadpacket not in movement.VIEWS:
                self.token_use = func.overloadpacket.__name__


def _still_uniform(tensor: Tensor) -> bool:
    """Whether a constant made of equal values still is; it may have been written to since."""
    return hasattr(tensor, UNIFORM) and tensor.numel() > 0 and bool((tensor == tensor.reshape(-1)[:1]).all())


def _scalars(mode: LabelMode, tree: Any) -> tuple[float, ...]:
    """Numbers among the arguments, also those in tensors of one element."""
    if isinstance(tree, (list, tuple)):
        return tuple(number for item in tree for number in _scalars(mode, item))
    if isinstance(tree, Tensor):
        return (float(tree),) if tree.numel() == 1 and not mode.operand(tree).planes else ()
    return (float(tree),) if type(tree) in (int, float) else ()
