"""Sources of training text: draws documents and joins them into windows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunekit.calibration import check_tokens
from prunekit.documents import TextSource, is_stream
from prunekit.errors import PrunekitError
from prunekit.recovery.data import IGNORED, TrainingWindows, TrainOn, labelled_documents, windows_of
from prunekit.text import leading_bos, text_width

MOST_STREAMED = 4_000_000  # tokens of a source that is streamed, and may never end

Sources = Mapping[str, Tensor | TextSource]


@dataclass
class Source:
    """The text of one source, with a held-out part for measurement.

    Attributes:
        name: of the source.
        documents: to train on, shuffled, each int64 (2, length): 1 to seq_len tokens, BOS not included, and their
            labels, some of which are trained on.
        validation: to measure on, int64 (n_windows, seq_len).
        bos: the token that stands first in every window; None for none.
        drawn: documents drawn so far.
    """

    name: str
    documents: list[Tensor]
    validation: Tensor
    bos: int | None = None
    drawn: int = 0

    @property
    def seq_len(self) -> int:
        """Tokens of a window."""
        return self.validation.shape[1]

    @property
    def n_windows(self) -> int:
        """Number of windows in the training documents."""
        return n_tokens(self.documents) // text_width(self.seq_len, self.bos)

    def draw(self, n_windows: int) -> list[Tensor]:
        """The next documents to fill a number of windows; each is used once before any is repeated."""
        found: list[Tensor] = []
        left = n_windows * text_width(self.seq_len, self.bos)
        while left > 0:
            found.append(self.documents[self.drawn % len(self.documents)])
            left -= found[-1].shape[1]
            self.drawn += 1
        return found


def open_sources(
    sources: Sources,
    tokenizer: Any,
    seq_len: int,
    model: Any,
    *,
    train_on: TrainOn = "replies",
    n_validation: int = 32,
    seed: int = 0,
) -> list[Source]:
    """Read sources, shuffle their documents, and hold some out.

    Args:
        sources: name → what `prunekit.documents.documents_of` reads, or integers (n, length), whose rows are
            documents. Longer documents are cut into pieces of `seq_len` tokens. Of a source that is streamed, the first
            4 million tokens are read.
        tokenizer: needed where a source is text. Where it adds BOS by itself, that stands first in every window and
            nowhere else.
        seq_len: tokens of a window, BOS included; where all sources are integers of one length, their rows are the
            windows, as they are, and it is not used.
        model: that will read them.
        train_on: as for `recover`.
        n_validation: windows laid aside of each source, at most, and at most a fifth of it.
        seed: of the shuffling.

    Raises:
        PrunekitError: no source, or one that cannot be read or is too small to be measured and trained on, by name.
    """
    if not isinstance(sources, Mapping) or not sources:
        given = "empty" if isinstance(sources, Mapping) else f"a {type(sources).__name__}"
        raise PrunekitError(
            f"sources are {given}; give at least one as a mapping, name → text or tokens, like {{'wiki': 'wiki.txt'}}"
        )
    generator = torch.Generator().manual_seed(seed)
    lengths = {data.shape[-1] if isinstance(data, Tensor) and data.ndim == 2 else None for data in sources.values()}
    alike = next(iter(lengths)) if len(lengths) == 1 else None
    bos = None if alike or tokenizer is None else leading_bos(tokenizer)
    length, found = alike or seq_len, []
    for name, data in sources.items():
        try:
            pieces = _pieces(data, tokenizer, text_width(length, bos), bos, model, train_on)
        except PrunekitError as error:
            raise PrunekitError(f"source {name!r}: {error}") from None
        found.append(_source(name, pieces, length, bos, n_validation, generator))
    return found


def _pieces(
    data: Tensor | TextSource, tokenizer: Any, width: int, bos: int | None, model: Any, train_on: TrainOn
) -> list[Tensor]:
    """The documents of a source in pieces of at most a width, once a model can read them."""
    if isinstance(data, Tensor) and (data.ndim != 2 or data.is_floating_point() or data.dtype == torch.bool):
        raise PrunekitError(f"it is a {data.dtype} tensor {tuple(data.shape)}; give integers (n, length)")
    enough = MOST_STREAMED if is_stream(data) else None
    whole = labelled_documents(data, tokenizer, bos, train_on=train_on, enough=enough)
    pieces = [piece for document in whole for piece in document.split(width, 1) if document.numel()]
    if n_tokens(pieces) > 1:
        check_tokens(join(pieces, 2).tokens, model)
    return pieces


def _source(
    name: str, pieces: list[Tensor], seq_len: int, bos: int | None, n_validation: int, generator: torch.Generator
) -> Source:
    """A source of shuffled documents, the first of which are held out."""
    total, width = n_tokens(pieces), text_width(seq_len, bos)
    shuffled = [pieces[i] for i in torch.randperm(len(pieces), generator=generator).tolist()]
    wanted = min(n_validation, max(1, total // width // 5)) * width
    held, length = 0, 0
    while length < wanted and held < len(pieces):
        length += shuffled[held].shape[1]
        held += 1
    if length < wanted or held == len(pieces):
        raise PrunekitError(
            f"source {name!r} has {total} tokens in {len(pieces)} pieces; it takes a window of {seq_len} tokens "
            "to measure on, and something else to train on: give more text, or a method with a smaller seq_len"
        )
    trained = [piece for piece in shuffled[held:] if bool((piece[1] != IGNORED).any())]
    if not trained:
        raise PrunekitError(
            f"source {name!r} has no token of a reply in its pieces of {seq_len} tokens to train on; give chats in "
            "which the assistant answers, or train_on='all'"
        )
    return Source(name, trained, join(shuffled[:held], seq_len, bos).tokens, bos)


def n_tokens(documents: Sequence[Tensor]) -> int:
    """Tokens of documents together."""
    return sum(document.shape[1] for document in documents)


def join(documents: Sequence[Tensor], seq_len: int, bos: int | None = None) -> TrainingWindows:
    """Documents one after the other, as windows side by side, BOS first in each."""
    return windows_of(torch.cat(list(documents), 1).long(), seq_len, bos)


def shuffle(documents: Sequence[Tensor], seed: int) -> list[Tensor]:
    """The documents shuffled, so that a window contains several sources."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    return [documents[i] for i in order.tolist()]
