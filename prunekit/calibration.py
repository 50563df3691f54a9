"""The calibration set, and the gradients gathered over it in one pass for all groups."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from prunekit.discovery.parts import outermost_elements
from prunekit.errors import PrunekitError
from prunekit.models import evaluating
from prunekit.text import (
    DOCUMENT_SEPARATOR,
    TextSource,
    begin_windows,
    leading_bos,
    read_documents,
    text_width,
    tokenize,
)

TOKENS_A_BATCH = 1024  # 16 samples of 64 tokens at once: logits for 32,000 words then take 131 MB
_ENOUGH_CHOICE = 16  # tokens to draw windows from, as a multiple of those drawn


def calibration_set(
    source: TextSource,
    tokenizer: Any,
    *,
    n_samples: int = 16,
    seq_len: int = 64,
    seed: int = 0,
    separator: str | None = DOCUMENT_SEPARATOR,
    bos: bool | None = None,
    held_out: bool = False,
) -> Tensor:
    """Draw random windows of tokens from a text, each of which begins as the model's training did.

    Documents are shuffled and joined, a line break between two, and windows are drawn from the stream. They do not
    overlap where the text fills `n_samples` windows; where it is shorter than that, they do. BOS stands first in
    every window where the tokenizer adds it by itself, and nowhere else.

    Args:
        source: what `prunekit.text.read_documents` reads: a file, text, documents, a data set, `"world"`.
        tokenizer: a transformers tokenizer.
        n_samples: number of windows, at least 1.
        seq_len: tokens in each, BOS included, at least 2 (the loss predicts each token from those before it).
        seed: which documents and windows are drawn.
        separator: marker between documents inside one text; it is split off.
        bos: True puts BOS first also where the tokenizer does not, False leaves it out; None goes by the tokenizer.
        held_out: draw windows that the same call without it does not draw, and that do not overlap with those: to
            measure on what a model was not calibrated on. Where few are left in the text, fewer come.

    Returns:
        int64 (n_samples, seq_len).

    Raises:
        PrunekitError: no text, fewer tokens than one window, an impossible size, or BOS is asked for and there is none.

    Source: LLM-Pruner's calibration (10 samples of 64 tokens of BookCorpus).
        Differs: windows of one joined stream, where the reference takes one window a book.
    """
    if n_samples < 1 or seq_len < 2:
        raise PrunekitError(f"n_samples={n_samples}, seq_len={seq_len}: at least 1 sample of 2 tokens is needed")
    generator = torch.Generator().manual_seed(seed)
    documents = read_documents(source, separator=separator)
    order = torch.randperm(len(documents), generator=generator).tolist()
    first = leading_bos(tokenizer, bos)
    width = text_width(seq_len, first)
    enough = _ENOUGH_CHOICE * n_samples * seq_len
    stream = tokenize([documents[i] for i in order], tokenizer, enough=enough)
    if len(stream) < width:
        raise PrunekitError(
            f"the text has {len(stream) + seq_len - width} tokens and one window needs seq_len={seq_len}; "
            "give more text or a smaller seq_len"
        )
    starts = _window_starts(len(stream), n_samples, width, generator, held_out)
    return begin_windows(stream[starts[:, None] + torch.arange(width)], first)


def _window_starts(n_tokens: int, n_samples: int, width: int, generator: torch.Generator, held_out: bool) -> Tensor:
    """Where the text of each window begins, int64 (n_samples,): apart where they fit side by side.

    Held-out windows are the next ones of the same draw, at most n_samples.
    """
    slots = n_tokens // width
    if held_out and slots <= n_samples:
        raise PrunekitError(
            f"the text has {n_tokens} tokens, of which n_samples={n_samples} windows of {width} tokens of text leave "
            "none to hold out; give more text or fewer windows"
        )
    if slots < n_samples:
        return torch.randint(n_tokens - width + 1, (n_samples,), generator=generator)
    offset = torch.randint(n_tokens % width + 1, (1,), generator=generator)
    order = torch.randperm(slots, generator=generator)
    return offset + width * (order[n_samples : 2 * n_samples] if held_out else order[:n_samples])


def check_tokens(calib: Tensor, model: nn.Module) -> Tensor:
    """The calibration set as int64 on the model's device, or a clear refusal.

    Args:
        calib: integers (n_samples, seq_len) with at least one sample of two tokens.
        model: the causal LM that will read them.

    Returns:
        int64 (n_samples, seq_len).

    Raises:
        PrunekitError: not an integer tensor of that shape, ids outside the model's vocabulary, or sequences
            longer than the model takes.
    """
    if not isinstance(calib, Tensor) or calib.is_floating_point() or calib.dtype == torch.bool or calib.ndim != 2:
        given = f"{calib.dtype} {tuple(calib.shape)}" if isinstance(calib, Tensor) else type(calib).__name__
        raise PrunekitError(
            f"a calibration set is an integer tensor (n_samples, seq_len), not {given}; "
            "calibration_set(text, tokenizer) makes one"
        )
    if len(calib) < 1 or calib.shape[1] < 2:
        raise PrunekitError(f"calibration set {tuple(calib.shape)}: at least 1 sample of 2 tokens is needed")
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if limit is not None and calib.shape[1] > limit:
        raise PrunekitError(f"seq_len={calib.shape[1]}, but the model takes at most {limit} tokens: make it shorter")
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    vocabulary, low, high = len(embedding.weight), int(calib.min()), int(calib.max())
    if low < 0 or high >= vocabulary:
        raise PrunekitError(f"token ids {low} to {high}, but the model knows 0 to {vocabulary - 1}: another tokenizer?")
    return calib.to(embedding.weight.device, torch.long)


def in_batches(tokens: Tensor) -> tuple[Tensor, ...]:
    """Samples (n_samples, seq_len) in portions that run at once."""
    return tokens.split(max(1, TOKENS_A_BATCH // tokens.shape[1]))


@torch.no_grad()
def mean_loss(model: nn.Module, calib: Tensor) -> float:
    """Mean loss over a calibration set, nats a token.

    Args:
        model: a causal LM; left as it was.
        calib: integers (n_samples, seq_len).

    Raises:
        PrunekitError: bad tokens, or a loss that is not finite.
    """
    tokens, total = check_tokens(calib, model), 0.0
    with evaluating(model):
        for batch in in_batches(tokens):
            total += summed_loss(model, batch).item()
    return total / len(tokens)


def check_finite(model: nn.Module) -> None:
    """Refuse a model that has a weight which is NaN, infinite or not there.

    Raises:
        PrunekitError: names the first such parameter.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise PrunekitError(f"{name} has a shape but no data (meta device): load the weights first")
        if not all_finite(parameter.detach()):
            raise PrunekitError(f"{name} has NaN or infinite weights: the checkpoint is damaged, or overflowed float16")


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite. A finite sum says so at a tenth of the cost; one that overflows does not."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


@dataclass(frozen=True, eq=False)
class Gradients:
    """Statistics of the loss over a calibration set, one tensor a parameter in that parameter's shape.

    Attributes:
        g: parameter name → gradient of the mean loss.
        h: parameter name → mean over samples of the squared gradient of one sample's loss; None where
            it was not asked for.
        loss: mean loss over the calibration set, nats a token.
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


def gather_gradients(model: nn.Module, calib: Tensor, parameters: Iterable[str], *, second: bool = False) -> Gradients:
    """Gradients of the language-modelling loss for some parameters, in one pass over the calibration set.

    The model is left as it was, whatever happens: training mode, `requires_grad` and `.grad` of every
    parameter. Frozen and half-precision parameters are fine; sums are kept in float32 (float64 for
    float64). Each gradient is added to its sum and freed as soon as it exists, so the peak is the model,
    the sums and the activations of one batch (one sample where `second`); after
    `model.gradient_checkpointing_enable()` those between its layers and inside one.

    Args:
        model: a causal LM.
        calib: integers (n_samples, seq_len); input and labels at once.
        parameters: names as in `model.named_parameters()`.
        second: also gather `h`, one sample at a time.

    Returns:
        `Gradients`, on the parameters' devices; zeros for what the loss does not depend on.

    Raises:
        PrunekitError: unknown parameters, bad tokens, or a weight, loss or gradient that is not finite.

    Source: LLM-Pruner, Eq. 3 to 5; `h` is the diagonal Fisher information it uses for the Hessian.
    """
    check_finite(model)
    tokens, chosen = check_tokens(calib, model), _chosen(model, parameters)
    found: dict[str, Tensor] = {}
    h = {name: _zeros_like(p) for name, p in chosen.items()} if second else None
    batches = tokens.split(1) if second else in_batches(tokens)
    loss = 0.0
    collecting = _collecting(model, chosen, found, h, len(tokens))
    with evaluating(model), collecting, _checkpointed(model), torch.enable_grad():
        for batch in tqdm(batches, desc="gradients", unit="batch", leave=False, delay=1):
            loss += _backward(model, batch) / len(tokens)
    g = {name: found[name] if name in found else _zeros_like(p) for name, p in chosen.items()}
    _check_gradients(g)
    means = None if h is None else {n: t.div_(len(tokens)) for n, t in h.items()}
    return Gradients(g, means, loss, len(tokens), tokens)


def _chosen(model: nn.Module, parameters: Iterable[str]) -> dict[str, nn.Parameter]:
    every = dict(model.named_parameters())
    names = list(dict.fromkeys(parameters))
    if not names:
        raise PrunekitError("no parameter was asked for; name some of model.named_parameters()")
    unknown = [name for name in names if name not in every]
    if unknown:
        raise PrunekitError(f"the model has no parameter {unknown[0]!r}; see model.named_parameters()")
    return {name: every[name] for name in names}


def _zeros_like(parameter: Tensor) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)


def _backward(model: nn.Module, batch: Tensor) -> float:
    """Backward through the summed loss of a batch's samples; the sum."""
    loss = summed_loss(model, batch)
    loss.backward()
    return loss.item()


def summed_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Sum over a batch's samples of their mean loss, a scalar that gradients flow through.

    Raises:
        PrunekitError: the loss is not finite.
    """
    loss = model(input_ids=batch, labels=batch, use_cache=False).loss * len(batch)
    if not bool(torch.isfinite(loss)):
        raise PrunekitError(
            f"the loss is {loss.item()} though all weights are finite: load the model in float32 or bfloat16"
        )
    return loss


@contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """While open, activations inside a layer are computed again on the way back, where a model is set to do so."""
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
def _collecting(
    model: nn.Module,
    chosen: dict[str, nn.Parameter],
    g: dict[str, Tensor],
    h: dict[str, Tensor] | None,
    n_samples: int,
) -> Iterator[None]:
    """Within, every backward adds to `g` and `h`; afterwards the parameters are as before."""
    handles = []
    with frozen(model):
        for name, p in chosen.items():
            p.requires_grad_(True)
            add = _adder(g, None if h is None else h[name], name, n_samples)
            handles.append(p.register_post_accumulate_grad_hook(add))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within, no parameter has or asks for a gradient; afterwards all are as before."""
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


def _check_gradients(g: dict[str, Tensor]) -> None:
    for name, gradient in g.items():
        if not bool(torch.isfinite(gradient).all()):
            raise PrunekitError(f"the gradient of {name} is not finite: load the model in float32 or bfloat16")
