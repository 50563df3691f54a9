"""Gathers gradients over a calibration set, in one pass for all groups."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from prunekit.calibration import check_finite, check_tokens, in_batches, summed_loss
from prunekit.discovery.parts import outermost_elements
from prunekit.errors import PrunekitError
from prunekit.layer_gradients import LayerBackward
from prunekit.models import evaluating


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradient statistics over a calibration set, one tensor per parameter, in its shape.

    Attributes:
        g: parameter name → gradient of the mean loss.
        h: parameter name → mean over samples of the squared gradient of one sample's loss; None where
            it was not requested.
        loss: mean loss over the calibration set, nats per token.
        n_samples: size of the calibration set.
        tokens: the calibration set, int64 (n_samples, seq_len).
    """

    g: dict[str, Tensor]
    h: dict[str, Tensor] | None
    loss: float
    n_samples: int
    tokens: Tensor | None = None

    def __repr__(self) -> str:
        which = "g" if self.h is None else "g and h"
        return f"Gradients({which} of {len(self.g)} parameters; {self.n_samples} samples, loss {self.loss:.4f})"


def gather_gradients(
    model: nn.Module, calib: Tensor | LayerBackward, parameters: Iterable[str], *, second: bool = False
) -> Gradients:
    """Gathers gradients of the language-modelling loss for some parameters, in one pass over the calibration set.

    The model is unchanged afterwards, whatever happens: training mode, `requires_grad` and `.grad` of every
    parameter. Frozen and half-precision parameters are fine; sums are kept in float32 (float64 for
    float64). Each gradient is added to its sum and freed as soon as it exists, so the peak is the model,
    the sums and the activations of one batch (one sample where `second`); after
    `model.gradient_checkpointing_enable()` those between its layers and inside one.

    Args:
        model: a causal LM.
        calib: integers (n_samples, seq_len); input and labels at once. Or a backward pass that stands at a layer, whose
            parameters alone are meant then; its batches are single samples where `second`.
        parameters: names as in `model.named_parameters()`.
        second: also gather `h`, one sample at a time.

    Returns:
        `Gradients`, on the parameters' devices; zeros for parameters without effect on the loss.

    Raises:
        PrunekitError: unknown parameters, bad tokens, or a weight, loss or gradient that is not finite.

    Source: LLM-Pruner, Eq. 3 to 5; `h` is the diagonal Fisher information it uses for the Hessian.
    """
    if not isinstance(calib, LayerBackward):  # else it was checked before the first layer
        check_finite(model)
    (tokens, source), chosen = source_of(model, calib, second=second), _chosen(model, parameters)
    found: dict[str, Tensor] = {}
    h = {name: _zeros_like(p) for name, p in chosen.items()} if second else None
    with evaluating(model), frozen(model), ExitStack() as hooks, _checkpointed(model), torch.enable_grad():
        for name, p in chosen.items():
            p.requires_grad_(True)
            add = _adder(found, None if h is None else h[name], name, len(tokens))
            hooks.callback(p.register_post_accumulate_grad_hook(add).remove)
        loss = run_backward(model, source)
    g = {name: found[name] if name in found else _zeros_like(p) for name, p in chosen.items()}
    for name, gradient in g.items():
        if not bool(torch.isfinite(gradient).all()):
            raise PrunekitError(f"the gradient of {name} is not finite: load the model in float32 or bfloat16")
    means = None if h is None else {n: t.div_(len(tokens)) for n, t in h.items()}
    return Gradients(g, means, loss / len(tokens), len(tokens), tokens)


def batches_of(tokens: Tensor, second: bool) -> tuple[Tensor, ...]:
    """Samples (n_samples, seq_len) in the batches that gradients are gathered by: one by one for squared ones."""
    return tokens.split(1) if second else in_batches(tokens)


def source_of(
    model: nn.Module, calib: Tensor | LayerBackward, *, second: bool
) -> tuple[Tensor, Sequence[Tensor] | LayerBackward]:
    """The tokens of a calibration set, checked, and what `run_backward` takes for them.

    Raises:
        PrunekitError: bad tokens. Who goes layer by layer has checked them before.
    """
    if isinstance(calib, LayerBackward):
        return calib.tokens, calib
    tokens = check_tokens(calib, model)
    return tokens, batches_of(tokens, second)


def run_backward(model: nn.Module, calib: Sequence[Tensor] | LayerBackward, factor: float = 1.0) -> float:
    """The backward pass of every batch through the whole model, or through the layer at which `calib` stands.

    Args:
        model: a causal LM in evaluation mode.
        calib: integers (batch, seq_len) each; or a backward pass layer by layer, whose loss has its own factor.
        factor: multiplies the loss.

    Returns:
        The sum over samples of their mean loss, in nats, without the factor.
    """
    if isinstance(calib, LayerBackward):
        calib.run()
        return calib.loss
    total = 0.0
    for batch in tqdm(calib, desc="gradients", unit="batch", leave=False, delay=1):
        loss = summed_loss(model, batch)
        (loss * factor).backward()
        total += loss.item()
    return total


def _chosen(model: nn.Module, parameters: Iterable[str]) -> dict[str, nn.Parameter]:
    every = dict(model.named_parameters())
    names = list(dict.fromkeys(parameters))
    if not names:
        raise PrunekitError("no parameter given; name some of model.named_parameters()")
    unknown = [name for name in names if name not in every]
    if unknown:
        raise PrunekitError(f"the model has no parameter {unknown[0]!r}; see model.named_parameters()")
    return {name: every[name] for name in names}


def _zeros_like(parameter: Tensor) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)


@contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """A context with gradient checkpointing if the model has it turned on."""
    asked = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    modules = dict.fromkeys(model.get_submodule(path) for path in outermost_elements(model)) if asked else {}
    before = {module: vars(module).get("forward") for module in modules}
    try:
        for module in modules:
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]
        yield
    finally:
        for module, own in before.items():
            vars(module).pop("forward", None)
            if own is not None:
                module.forward = own


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """A context in which no parameter has or requires a gradient; restored at its end."""
    before = {p: (p.requires_grad, p.grad) for p in model.parameters()}
    try:
        for p in before:
            p.grad = None
            p.requires_grad_(False)
        yield
    finally:
        for p, (requires_grad, grad) in before.items():
            p.requires_grad_(requires_grad)
            p.grad = grad


def _adder(g: dict[str, Tensor], h: Tensor | None, name: str, n_samples: int) -> Any:
    """Hook that adds a parameter's new gradient to its sums and frees it; the first one becomes the sum."""

    def add(parameter: Tensor) -> None:
        gradient = parameter.grad.to(torch.promote_types(parameter.dtype, torch.float32))  # type: ignore[union-attr]
        parameter.grad = None
        if h is not None:
            h.addcmul_(gradient, gradient)
        if name in g:
            g[name].add_(gradient, alpha=1 / n_samples)
        else:
            g[name] = gradient.div_(n_samples)

    return add
