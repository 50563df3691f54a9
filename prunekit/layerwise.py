"""Runs a model layer by layer; batches wait between two layers, so that no layer is run twice."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prunekit.discovery.constants import leaves
from prunekit.discovery.parts import outermost_elements
from prunekit.models import logits_alone

Inputs = Tensor | Mapping[str, Tensor]  # token ids, or the model's keyword arguments


class _Call(NamedTuple):
    """Arguments of a layer's call, without the residual stream at `where`."""

    args: tuple
    kwargs: dict[str, Any]
    where: int | str

    def filled(self, hidden: Tensor | None) -> tuple[tuple, dict[str, Any]]:
        """The arguments with a residual stream."""
        if isinstance(self.where, str):
            return self.args, {**self.kwargs, self.where: hidden}
        return (*self.args[: self.where], hidden, *self.args[self.where + 1 :]), self.kwargs

    def emptied(self) -> "_Call":
        """A copy without the residual stream, to save memory."""
        return _Call(*self.filled(None), self.where)

    def others(self) -> list[Tensor]:
        """All tensors but the residual stream."""
        return [tensor for _, tensor in leaves(self.args, self.kwargs)]


class _Answer(NamedTuple):
    """Form of a layer's output: its tuple or list without tensors, or () for one tensor; `where` is the stream's place.

    Other tensors beside it, such as attention weights, are not kept, since nothing here needs them.
    """

    rest: tuple
    where: int

    def filled(self, hidden: Tensor) -> Any:
        """The output with a residual stream."""
        return (*self.rest[: self.where], hidden, *self.rest[self.where + 1 :]) if self.rest else hidden


class _Passage(NamedTuple):
    """One batch: the residual stream before the first layer, and the forms of calls and outputs."""

    hidden: Tensor
    calls: list[_Call]
    answers: list[_Answer]


class Layerwise:
    """Batches of tokens in front of a layer, for a model whose layers form a chain.

    Attributes:
        layers: paths of the layers, in order.
    """

    def __init__(
        self, model: nn.Module, layers: list[str], batches: Sequence[Inputs], passages: list[_Passage]
    ) -> None:
        self.layers = layers
        self._model, self._batches = model, batches
        self._modules = [model.get_submodule(path) for path in layers]
        self._hidden, self._calls = [p.hidden for p in passages], [p.calls for p in passages]
        self._answers = passages[0].answers
        self._next = 0

    @classmethod
    def of(cls, model: nn.Module, batches: Sequence[Inputs]) -> "Layerwise | None":
        """Batches before the first layer; None for a model whose layers are not a simple chain.

        Layers form a chain if each layer's input is the output of the one before, and no other argument
        depends on a layer, which is tried with one sequence whose residual stream is turned round.

        Args:
            model: a causal LM in evaluation mode. The weights of its layers may change afterwards.
            batches: integers (batch, seq), one or more; or each as the model's keyword arguments, where it takes
                more than `input_ids`.
        """
        layers = outermost_elements(model)
        passages = [p for batch in batches if (p := _follow(model, layers, batch)) is not None] if layers else []
        if not passages or len(passages) < len(batches):
            return None
        probe = batches[0][:1] if isinstance(batches[0], Tensor) else batches[0]
        plain = passages[0] if probe is batches[0] else _follow(model, layers, probe)
        turned = _follow(model, layers, probe, lambda hidden: hidden.flip(-1))
        if plain is None or turned is None:
            return None
        alike = all(map(_same_others, plain.calls, turned.calls))
        return cls(model, layers, batches, passages) if alike else None

    def run(self, number: int, batch: int, hidden: Tensor | None = None) -> Tensor:
        """Output of a layer for one batch, (batch, seq, d_model); moves all batches in front of it.

        `hidden` is another residual stream to run it on.
        """
        self._go_to(number)
        return self.call(number, batch, self._hidden[batch] if hidden is None else hidden)

    def call(self, number: int, batch: int, hidden: Tensor) -> Tensor:
        """Output of a layer for one batch with a given residual stream; the batches stay where they are."""
        args, kwargs = self._calls[batch][number].filled(hidden)
        result = first_float(self._modules[number](*args, **kwargs))
        assert result is not None  # it was followed there
        return result

    def streams(self, number: int) -> list[Tensor]:
        """The residual stream of each batch in front of a layer; of all layers' number, behind the last one."""
        self._go_to(number)
        return list(self._hidden)

    def logits(self, number: int, batch: int, hidden: Tensor) -> Tensor:
        """The model's logits (batch, seq, vocabulary) for one batch; the layers below `number` are not run.

        `hidden` is the residual stream in front of layer `number`: what `run` returned for the layer before it.
        """
        with self.behind(number, hidden):
            return self._model(**{**logits_alone(self._model), **_arguments(self._batches[batch])}).logits

    @contextmanager
    def behind(self, number: int, hidden: Tensor) -> Iterator[None]:
        """A context in which the layers below `number` are not run: all of them answer with `hidden`.

        Apart from that the model runs as it always does.
        """
        with ExitStack() as stack:
            for module, answer in zip(self._modules[:number], self._answers, strict=False):
                stack.enter_context(_answering(module, answer.filled(hidden)))
            yield

    def _go_to(self, number: int) -> None:
        if number < self._next:
            raise ValueError(f"the batches are past layer {number}")
        for passed in range(self._next, number):
            self._hidden = [self.run(passed, batch) for batch in range(len(self._hidden))]
            self._next = passed + 1


class Passes:
    """Passes batches through the layers of any model: layer by layer for a chain, else by whole forward passes."""

    def __init__(self, model: nn.Module, batches: Sequence[Tensor]) -> None:
        self.layers = outermost_elements(model)
        self.n_batches = len(batches)
        self._model, self._batches = model, batches

    @cached_property
    def _chain(self) -> Layerwise | None:
        return Layerwise.of(self._model, self._batches)

    def run(self, layer: str | None, batch: int) -> None:
        """Run a batch through one layer, behind the present earlier layers; the whole model if `layer` is None.

        In a chain, layers must be requested in order, each any number of times.
        """
        if layer is not None and self._chain is not None:
            self._chain.run(self.layers.index(layer), batch)
        else:
            self._model(**_arguments(self._batches[batch]))

    def begin(self) -> None:
        """Move the batches in front of the first layer, once; earlier modules may change until then.

        That runs the whole model some times, which is nothing for those to see who watch one layer.
        """
        _ = self._chain


def _follow(
    model: nn.Module, layers: list[str], batch: Inputs, change: Callable[[Tensor], Tensor] | None = None
) -> _Passage | None:
    """Run a batch with a changed residual stream; None if a layer does not use the output of the one before."""
    calls: list[_Call] = []
    answers: list[_Answer] = []
    stream: list[Tensor] = []  # in front of the first layer, then where the batch is now

    def enter(_module: nn.Module, args: tuple, kwargs: dict) -> Any:
        places = [key for key, value in (*enumerate(args), *kwargs.items()) if _is_stream(value, stream)]
        if not places:
            return None
        call = _Call(args, kwargs, places[0])
        if not stream:
            hidden = kwargs[places[0]] if isinstance(places[0], str) else args[places[0]]
            stream.append(hidden if change is None else change(hidden))
        calls.append(call.emptied())
        return call.filled(stream[-1])

    def leave(_module: nn.Module, _args: Any, result: Any) -> None:
        after = first_float(result)
        stream[1:] = [] if after is None else [after]  # with none, the next layer is found to read something else
        answers.append(_answer(result))

    with ExitStack() as hooks:
        for path in layers:
            layer = model.get_submodule(path)  # run before the layer's own hooks, which may change its inputs
            hooks.callback(layer.register_forward_pre_hook(enter, with_kwargs=True, prepend=True).remove)
            hooks.callback(layer.register_forward_hook(leave).remove)
        model(**_arguments(batch), **fewest_logits(model, batch))
    return _Passage(stream[0], calls, answers) if len(calls) == len(layers) else None


def _arguments(batch: Inputs) -> dict[str, Any]:
    """Arguments of the model's call, without a cache."""
    return {**(batch if isinstance(batch, Mapping) else {"input_ids": batch}), "use_cache": False}


def fewest_logits(model: nn.Module, batch: Inputs) -> dict[str, int]:
    """The argument that limits logits to the last token, if the model has it and no loss is needed.

    Those of all tokens are a fifth of SmolLM2's work, and more where the vocabulary is larger.
    """
    needed = isinstance(batch, Mapping) and "labels" in batch
    known = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if known and not needed else {}


@contextmanager
def _answering(module: nn.Module, result: Any) -> Iterator[None]:
    """A context in which a module returns a given value and computes nothing."""
    own = vars(module).get("forward")  # accelerate's hooks, for one, put theirs there
    module.forward = lambda *_args, **_kwargs: result
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _answer(result: Any) -> _Answer:
    if not isinstance(result, tuple | list):
        return _Answer((), 0)
    where = next((i for i, value in enumerate(result) if isinstance(value, Tensor) and value.is_floating_point()), 0)
    return _Answer(tuple(None if isinstance(value, Tensor) else value for value in result), where)


def _is_stream(value: Any, stream: list[Tensor]) -> bool:
    """Whether an argument is the output of the layer before; for the first layer, activations (batch, seq, d_model)."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    if not stream:
        return value.dim() == 3
    alike = (value.shape, value.device) == (stream[-1].shape, stream[-1].device)
    return alike and torch.equal(value, stream[-1])


def first_float(result: Any) -> Tensor | None:
    """The first floating-point tensor of a module's output; None without one."""
    return next((tensor for _, tensor in leaves((result,), {}) if tensor.is_floating_point()), None)


def _same_others(a: _Call, b: _Call) -> bool:
    pairs = zip(a.others(), b.others(), strict=True)
    return a.where == b.where and all(x.shape == y.shape and torch.equal(x, y) for x, y in pairs)
