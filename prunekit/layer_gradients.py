"""The backward pass of a model layer by layer, where memory holds neither all its weights nor all its activations."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from prunekit.calibration import summed_loss
from prunekit.errors import PrunekitError
from prunekit.layerwise import Layerwise


class LayerBackward:
    """Gradients of the loss over a calibration set, for one layer at a time: `for layer in backward: backward.run()`.

    What each layer reads waits in a file. All layers run forward twice: batch by batch, to see how they are called, and
    layer by layer. Then each runs a third time, with a graph of its own, from the last layer to the first. Memory holds
    one layer's weights and graph (of one batch), what goes on to the next layer and back, and what the caller collects.

    Attributes:
        layers: paths of the layers, in order.
        tokens: the calibration set, int64 (n_samples, seq_len).
        loss: the sum over samples of their mean loss, in nats.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Tensor], folder: Path, factor: float = 1.0) -> None:
        """Runs the layers forward.

        Args:
            model: a causal LM in evaluation mode whose parameters require no gradients; its weights may be views of
                mapped files.
            batches: integers (batch, seq_len), parts of the calibration set.
            folder: for the files, each n_samples × seq_len × d_model numbers; they are the caller's to remove.
            factor: multiplies the loss.

        Raises:
            PrunekitError: the layers are no simple chain, or the loss is not finite.
        """
        with torch.no_grad():
            chain = Layerwise.of(model, batches)
            if chain is None:
                raise _no_chain(model)
            numbers = range(len(chain.layers) + 1)
            for number in tqdm(numbers, desc="forward passes", unit="layer", leave=False, delay=1):
                streams = chain.streams(number)  # the last ones stand behind all layers
                if [len(stream) for stream in streams] != [len(batch) for batch in batches]:
                    raise _no_chain(model)
                if number < len(chain.layers):
                    save_file({"hidden": torch.cat(streams)}, _file(folder, number))
        self.layers, self.tokens, self.loss = chain.layers, torch.cat(list(batches)), 0.0
        self._chain, self._folder, self._number = chain, folder, len(chain.layers)
        self._behind: list[Tensor] = []  # gradients at the outputs of the present layer, batch by batch
        self._in_front: list[Tensor] = []  # and at its inputs, once it has run
        for batch, end in zip(batches, streams, strict=True):
            hidden = end.clone().requires_grad_()
            with torch.enable_grad(), chain.behind(self._number, hidden):
                loss = summed_loss(model, batch)
                (loss * factor).backward()
            self.loss += loss.item()
            self._in_front.append(_gradient(hidden))

    def __iter__(self) -> Iterator[str]:
        """The layers from the last to the first, once; `run` runs the present one."""
        while self._number:
            self._number -= 1
            self._behind, self._in_front = self._in_front, []
            yield self.layers[self._number]
            if not self._in_front:  # nobody wanted the gradients of this layer
                self.run()

    def run(self) -> None:
        """The present layer's backward pass over all batches; any number of times."""
        inputs = load_file(_file(self._folder, self._number))["hidden"].split([len(each) for each in self._behind])
        self._in_front = []
        for batch, (stored, gradient) in enumerate(zip(inputs, self._behind, strict=True)):
            hidden = stored.to(gradient.device, copy=True).requires_grad_()
            with torch.enable_grad():
                self._chain.call(self._number, batch, hidden).backward(gradient)
            self._in_front.append(_gradient(hidden))


def _no_chain(model: nn.Module) -> PrunekitError:
    return PrunekitError(
        f"the layers of this {type(model).__name__} do not read one another's outputs alone, so its gradients are not "
        "computed layer by layer; take Activation() or Magnitude(), which need none"
    )


def _gradient(hidden: Tensor) -> Tensor:
    assert hidden.grad is not None  # the loss and every layer of a chain read it
    return hidden.grad


def _file(folder: Path, number: int) -> Path:
    return folder / f"hidden-{number}.safetensors"
