"""A model asked the same questions again and again, while only some of its layers change."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prunekit.discovery.groups import CoupledGroup
from prunekit.discovery.parts import layer_of
from prunekit.evaluation.likelihood import Span
from prunekit.evaluation.scoring import TOLERANCE, Batch, choose_reading, scored_logits, span_sums
from prunekit.fingerprint import bytes_of
from prunekit.layerwise import Layerwise

Layers = tuple[int, ...]
MANY = 100  # runs of the same spans, about: what they are worth finding out once for


class Runner:
    """Likelihoods of the same spans, with what has not changed since not run again, where that works.

    The layers below a changed one are not run, and those above it only for a batch in which the changed layer answers
    as it never did before: silencing all heads and silencing the whole block come to the same.

    Attributes:
        packed: whether many spans share a row; tried on this model, as is the next.
        resumed: whether layers are left out.
    """

    def __init__(self, model: nn.Module, spans: Sequence[Span], tokens_a_batch: int) -> None:
        """Takes a causal LM in evaluation mode, what is scored, and how many positions about a forward pass has."""
        self._model, self._n = model, len(spans)
        reading = choose_reading(model, spans, tokens_a_batch, runs=MANY)
        self.packed, self._gathers = bool(reading.packed), reading.gathers
        self._batches = list(reading.batches(model))
        self._chain = _chain(model, self._batches)
        self.resumed = self._chain is not None
        self._known: dict[tuple[int, bytes], Tensor] = {}  # batch and what the changed layer answered → sums
        self._layer = -1  # that these are of

    def layers_of(self, group: CoupledGroup) -> Layers:
        """Ascending numbers of the layers that a group's weights stand in; () where more than layers reads them."""
        if self._chain is None:
            return ()
        parameters = dict(self._model.named_parameters())
        mine = {id(parameters[member.parameter]) for member in group.members}
        names = [name for name, p in self._model.named_parameters(remove_duplicate=False) if id(p) in mine]
        numbers = {path: number for number, path in enumerate(self._chain.layers)}
        paths = [layer_of(name, set(numbers)) for name in names]
        return () if None in paths else tuple(sorted({numbers[path] for path in paths if path is not None}))

    def sums(self, changed: Layers) -> Tensor:
        """Sum of log-likelihoods of each span, float64 (n_spans,), in nats.

        Args:
            changed: what `layers_of` says of all that differs from the model as it was; its first never falls from
                call to call.
        """
        if self._chain is None or not changed:
            return span_sums(self._model, self._batches, self._n, self._gathers)
        found = torch.zeros(self._n, dtype=torch.float64)
        for number, batch in enumerate(self._batches):
            found[batch.members] = self._resumed(self._chain, changed, number)
        return found

    def _resumed(self, chain: Layerwise, changed: Layers, number: int) -> Tensor:
        """The sums of one batch, from the first changed layer on."""
        first = changed[0]
        hidden = chain.run(first, number)
        if len(changed) > 1:
            return self._read(chain, first + 1, number, hidden)
        if first != self._layer:
            self._layer, self._known = first, {}
        key = number, hashlib.sha256(bytes_of(hidden)).digest()
        if key not in self._known:
            self._known[key] = self._read(chain, first + 1, number, hidden)
        return self._known[key]

    def _read(self, chain: Layerwise, layer: int, number: int, hidden: Tensor) -> Tensor:
        """The sums of one batch, from the residual stream in front of a layer."""
        batch = self._batches[number]
        logits = scored_logits(self._model, batch, self._gathers, lambda: chain.logits(layer, number, hidden))
        return batch.read(logits)[0]


def _chain(model: nn.Module, batches: Sequence[Batch]) -> Layerwise | None:
    """The batches in front of the first layer; None where resuming a small one does not give its logits."""
    small = min(batches, key=lambda batch: batch.inputs["input_ids"].numel()).inputs
    trial = Layerwise.of(model, [small])
    if trial is None:
        return None
    whole = model(**small, use_cache=False).logits
    near = TOLERANCE * float(whole.abs().max())
    for number in range(len(trial.layers)):
        try:
            resumed = trial.logits(number + 1, 0, trial.run(number, 0))
        except Exception:  # the model reads of a layer's answer more than the residual stream
            return None
        if not torch.allclose(resumed, whole, rtol=0, atol=near):
            return None
    return Layerwise.of(model, [batch.inputs for batch in batches])
