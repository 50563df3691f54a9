"""Repeated likelihoods of the same spans, reusing layers and prefixes that did not change."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from prunekit.discovery.groups import CoupledGroup
from prunekit.discovery.parts import layer_of
from prunekit.evaluation.likelihood import Span
from prunekit.evaluation.sequence_scores import TOLERANCE, Batch, choose_reading, scored_logits, span_sums
from prunekit.fingerprint import bytes_of
from prunekit.layerwise import Layerwise

Layers = tuple[int, ...]
MANY = 100  # approximate runs of the same spans, which justify a test of packing


class Runner:
    """Computes likelihoods of the same spans again and again, skipping layers that did not change.

    Layers below a changed one are not run. Those above it run only if the changed layer's output for a batch is new:
    ablating all heads and ablating the whole block give the same output.

    Attributes:
        packed: whether spans share rows of a batch; tested on this model, like the next.
        resumed: whether layers are skipped.
    """

    def __init__(self, model: nn.Module, spans: Sequence[Span], tokens_a_batch: int) -> None:
        """Takes a causal LM in evaluation mode, the spans, and the approximate positions per forward pass."""
        self._model, self._n = model, len(spans)
        reading = choose_reading(model, spans, tokens_a_batch, runs=MANY)
        self.packed, self._gathers = bool(reading.packed), reading.gathers
        self._batches = list(reading.batches(model))
        self._chain = _chain(model, self._batches)
        self.resumed = self._chain is not None
        self._known: dict[tuple[int, bytes], Tensor] = {}  # batch and digest of the changed layer's output → sums
        self._layer = -1  # the layer of these sums

    def layers_of(self, group: CoupledGroup) -> Layers:
        """Ascending numbers of the layers with a group's weights; () if a module outside the layers uses them too."""
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
            changed: layers that differ from the dense model, by `layers_of`; the first must not decrease between calls.
        """
        if self._chain is None or not changed:
            return span_sums(self._model, self._batches, self._n, self._gathers)
        found = torch.zeros(self._n, dtype=torch.float64)
        for number, batch in enumerate(self._batches):
            found[batch.members] = self._resumed(self._chain, changed, number)
        return found

    def _resumed(self, chain: Layerwise, changed: Layers, number: int) -> Tensor:
        """Sums of one batch, run from the first changed layer."""
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
        """Sums of one batch, run from the residual stream before a layer."""
        batch = self._batches[number]
        logits = scored_logits(self._model, batch, self._gathers, lambda: chain.logits(layer, number, hidden))
        return batch.read(logits)[0]


def _chain(model: nn.Module, batches: Sequence[Batch]) -> Layerwise | None:
    """The batches before the first layer; None if resuming a small batch does not reproduce its logits."""
    small = min(batches, key=lambda batch: batch.inputs["input_ids"].numel()).inputs
    trial = Layerwise.of(model, [small])
    if trial is None:
        return None
    whole = model(**small, use_cache=False).logits
    near = TOLERANCE * float(whole.abs().max())
    for number in range(len(trial.layers)):
        try:
            resumed = trial.logits(number + 1, 0, trial.run(number, 0))
        except Exception:  # the model uses more of a layer's output than the residual stream
            return None
        if not torch.allclose(resumed, whole, rtol=0, atol=near):
            return None
    return Layerwise.of(model, [batch.inputs for batch in batches])
