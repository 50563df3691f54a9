"""The calibration set, its tokens in batches, and a model's loss on it."""

from typing import Any

import torch
from torch import Tensor, nn

from prunekit.checks import Count, Length, Seed, Tokenizer, checked
from prunekit.documents import Document, Reading, TextSource, at_least_one, is_stream
from prunekit.errors import PrunekitError
from prunekit.models import check_has_weights, evaluating, max_positions
from prunekit.text import DOCUMENT_SEPARATOR, JOINT, begin_windows, leading_bos, text_width, token_ids, tokenize

TOKENS_A_BATCH = 1024  # 16 samples of 64 tokens at once: logits for 32,000 words then take 131 MB
_ENOUGH_CHOICE = 16  # tokens to draw windows from, as a multiple of those drawn


@checked
def calibration_set(
    source: TextSource,
    tokenizer: Tokenizer | None,
    *,
    n_samples: Count = 16,
    seq_len: Length = 64,
    seed: Seed = 0,
    separator: str | None = DOCUMENT_SEPARATOR,
    bos: bool | None = None,
    held_out: bool = False,
) -> Tensor:
    """Draws a calibration set: random windows of tokens from a text, with BOS where the model expects it.

    Documents are shuffled and joined, a line break between two, and windows are drawn from the stream. They do not
    overlap where the text fills `n_samples` windows; where it is shorter than that, they do. BOS stands first in
    every window where the tokenizer adds it by itself, and nowhere else.

    Args:
        source: what `prunekit.documents.documents_of` reads: a file, text, documents, chats, a data set, token ids,
            `"world"`. Of a data set that is streamed, only as many documents are read as the draw chooses from: 16
            times the tokens that are drawn.
        tokenizer: a transformers tokenizer; None will do where the source is token ids.
        n_samples: number of windows, at least 1.
        seq_len: tokens in each, BOS included, at least 2 (the loss predicts each token from those before it).
        seed: which documents and windows are drawn.
        separator: marker between documents inside one text; it is split off.
        bos: True puts BOS first also where the tokenizer does not, False leaves it out; None goes by the tokenizer.
        held_out: draw windows that the same call without it does not draw, and that do not overlap with those: to
            measure on what a model was not calibrated on. If the text is short, there are fewer.

    Returns:
        int64 (n_samples, seq_len).

    Raises:
        PrunekitError: no text, fewer tokens than one window, an invalid size, or BOS requested from a tokenizer
            without.

    Source: LLM-Pruner's calibration (10 samples of 64 tokens of BookCorpus).
        Differs: windows of one joined stream, where the reference takes one window a book.
    """
    generator = torch.Generator().manual_seed(seed)
    enough = _ENOUGH_CHOICE * n_samples * seq_len
    reading = Reading(source, tokenizer, separator=separator)
    documents = _read(reading, tokenizer, enough if is_stream(source) else None)
    order = torch.randperm(len(at_least_one(documents, source)), generator=generator).tolist()
    first = None if tokenizer is None else leading_bos(tokenizer, bos)
    width = text_width(seq_len, first)
    stream = tokenize([documents[i] for i in order], tokenizer, enough=enough, bos=first)
    reading.say("calibration", len(stream))
    if len(stream) < width:
        raise PrunekitError(
            f"the text has {len(stream) + seq_len - width} tokens and one window needs seq_len={seq_len}; "
            "give more text or a smaller seq_len"
        )
    starts = _window_starts(len(stream), n_samples, width, generator, held_out)
    return begin_windows(stream[starts[:, None] + torch.arange(width)], first)


def _read(reading: Reading, tokenizer: Any, enough: int | None) -> list[Document]:
    """The documents; of an endless stream only the first with enough tokens."""
    if enough is None:
        return list(reading)
    documents, n_tokens = [], 0
    for document in reading:
        documents.append(document)
        n_tokens += len(token_ids(document, tokenizer, JOINT))
        if n_tokens >= enough:
            break
    return documents


def _window_starts(n_tokens: int, n_samples: int, width: int, generator: torch.Generator, held_out: bool) -> Tensor:
    """Start of each window's text, int64 (n_samples,), without overlap where possible.

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
    """The calibration set as int64 on the model's device, checked.

    Args:
        calib: integers (n_samples, seq_len) with at least one sample of two tokens.
        model: the causal LM that will read them.

    Returns:
        int64 (n_samples, seq_len).

    Raises:
        PrunekitError: not an integer tensor of that shape, ids outside the model's vocabulary, sequences longer than
            the model takes, or a model without weights in memory.
    """
    if not hasattr(model, "get_input_embeddings"):
        raise PrunekitError(
            f"a {type(model).__name__} is not a transformers model, so it cannot run on tokens; give one (an "
            "importance that reads none takes any model, such as Magnitude())"
        )
    check_has_weights(model)
    if not isinstance(calib, Tensor) or calib.is_floating_point() or calib.dtype == torch.bool or calib.ndim != 2:
        given = f"{calib.dtype} {tuple(calib.shape)}" if isinstance(calib, Tensor) else type(calib).__name__
        raise PrunekitError(
            f"a calibration set is an integer tensor (n_samples, seq_len), not {given}; "
            "calibration_set(text, tokenizer) makes one"
        )
    if len(calib) < 1 or calib.shape[1] < 2:
        raise PrunekitError(f"calibration set {tuple(calib.shape)}: at least 1 sample of 2 tokens is needed")
    limit = max_positions(model)
    if limit is not None and calib.shape[1] > limit:
        raise PrunekitError(f"seq_len={calib.shape[1]}, but the model takes at most {limit} tokens: make it shorter")
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    vocabulary, low, high = len(embedding.weight), int(calib.min()), int(calib.max())
    if low < 0 or high >= vocabulary:
        raise PrunekitError(
            f"token ids {low} to {high}, but the model knows 0 to {vocabulary - 1}: they come from another tokenizer; "
            "use the model's own"
        )
    return calib.to(embedding.weight.device, torch.long)


def in_batches(tokens: Tensor) -> tuple[Tensor, ...]:
    """Samples (n_samples, seq_len) in batches."""
    return tokens.split(max(1, TOKENS_A_BATCH // tokens.shape[1]))


@torch.no_grad()
def mean_loss(model: nn.Module, calib: Tensor) -> float:
    """Mean loss over a calibration set, nats per token.

    Args:
        model: a causal LM; unchanged afterwards.
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
    """Raise an error if a weight is NaN, infinite or on the meta device.

    Raises:
        PrunekitError: names the first such parameter.
    """
    check_has_weights(model)
    for name, parameter in model.named_parameters():
        if not all_finite(parameter.detach()):
            raise PrunekitError(f"{name} has NaN or infinite weights: the checkpoint is damaged, or overflowed float16")


def all_finite(values: Tensor) -> bool:
    """Whether all values are finite. A finite sum proves it at a tenth of the cost; otherwise each value is checked."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


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
