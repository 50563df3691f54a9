"""Recovery data: turns text or tokens into windows of tokens, with a label for each."""

from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from prunekit.account import MOST_TOKENS
from prunekit.calibration import check_tokens
from prunekit.checks import check_choice
from prunekit.documents import Reading, TextSource, at_least_one
from prunekit.errors import PrunekitError
from prunekit.text import DOCUMENT_SEPARATOR, JOINT, TextWithReplies, leading_bos, token_ids, whole_windows

IGNORED = -100  # the label of a token that is not trained on, as transformers' losses know it
TrainOn = Literal["replies", "all"]


@dataclass(frozen=True)
class TrainingWindows:
    """Windows of tokens to train on, with their labels.

    Attributes:
        tokens: int64 (n_windows, seq_len).
        labels: the same, with `IGNORED` where a token is read and not trained on.
    """

    tokens: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> "TrainingWindows":
        """Some of the windows."""
        return TrainingWindows(self.tokens[rows], self.labels[rows])


def training_windows(
    data: "Tensor | TextSource | TrainingWindows",
    tokenizer: Any,
    seq_len: int,
    *,
    train_on: TrainOn = "replies",
    enough: int | None = None,
) -> TrainingWindows:
    """Tokens to train on, as windows of one length on the CPU, with labels.

    Documents are joined and cut into windows side by side; the rest at the end is dropped. BOS stands first
    in every window where the tokenizer adds it by itself, and nowhere else.

    Args:
        data: windows, used as they are; integers (n, length), used as they are and all trained on; or anything that
            `prunekit.documents.documents_of` reads.
        tokenizer: needed if `data` is text. Without it token ids are joined as they are.
        seq_len: length of a window, BOS included, at least 2; not used where `data` is a tensor.
        train_on: `"replies"`: of a chat, a prompt with completion or an instruction with output, only the reply is
            trained on; of any other document, every token. Windows without a token to train on are left out. `"all"`
            trains on every token.
        enough: windows that are needed, for data that is streamed: it is read so far, and no further. None reads all.

    Raises:
        PrunekitError: text without a tokenizer, nothing in it, fewer tokens than one window, an unknown `train_on`, a
            template that does not show where replies are, or no reply at all.
    """
    check_choice("train_on", train_on, get_args(TrainOn))
    if isinstance(data, TrainingWindows):
        if data.labels.shape != data.tokens.shape:
            shapes = f"{tuple(data.tokens.shape)} and {tuple(data.labels.shape)}"
            raise PrunekitError(f"tokens and labels of TrainingWindows have shapes {shapes}; give one label a token")
        return with_replies(data)
    if isinstance(data, Tensor):
        return TrainingWindows(data, data)
    return with_replies(_cut(data, tokenizer, seq_len, enough, train_on))


def windows_for(
    model: nn.Module, data: "Tensor | TextSource | TrainingWindows", tokenizer: Any, seq_len: int, **options: Any
) -> TrainingWindows:
    """What `training_windows` gives, int64, once a model can read it."""
    windows = training_windows(data, tokenizer, seq_len, **options)
    return TrainingWindows(check_tokens(windows.tokens, model).cpu(), windows.labels.long().cpu())


def with_replies(windows: TrainingWindows) -> TrainingWindows:
    """The windows in which some token is trained on.

    Raises:
        PrunekitError: there are none.
    """
    trained = (windows.labels[:, 1:] != IGNORED).any(1)  # the first token of a window is never predicted
    if not trained.any():
        raise PrunekitError(
            f"none of the {len(windows)} windows of {windows.tokens.shape[1]} tokens holds a token of a reply; give "
            "chats in which the assistant answers, or train_on='all'"
        )
    return windows if trained.all() else TrainingWindows(windows.tokens[trained], windows.labels[trained])


def _cut(data: TextSource, tokenizer: Any, seq_len: int, enough: int | None, train_on: TrainOn) -> TrainingWindows:
    if seq_len < 2:
        raise PrunekitError(f"seq_len={seq_len}: a window needs at least 2 tokens")
    bos = None if tokenizer is None else leading_bos(tokenizer)
    n_tokens = None if enough is None else enough * seq_len
    stream = torch.cat(labelled_documents(data, tokenizer, bos, train_on=train_on, enough=n_tokens), 1)
    windows = windows_of(stream.long(), seq_len, bos)
    if not len(windows):
        told = f"{stream.shape[1]} tokens" if bos is None else f"{stream.shape[1] + 1} tokens with BOS"
        raise PrunekitError(
            f"the recovery data has {told} and one window needs seq_len={seq_len}; give more text or a smaller seq_len"
        )
    return windows[slice(enough)]


def windows_of(stream: Tensor, seq_len: int, bos: int | None) -> TrainingWindows:
    """Windows side by side of a stream of tokens and labels, int64 (2, length), with BOS first in each."""
    ignored = None if bos is None else IGNORED
    return TrainingWindows(whole_windows(stream[0], seq_len, bos), whole_windows(stream[1], seq_len, ignored))


def hold_out(windows: TrainingWindows) -> tuple[TrainingWindows, Tensor | None]:
    """Windows to train on, and the last twentieth of them to measure on, at most about 1,024 tokens; or None.

    Args:
        windows: as `training_windows` gives them.
    """
    n = min(len(windows) // 20, max(1, MOST_TOKENS // windows.tokens.shape[1]))
    return (windows[:-n], windows[-n:].tokens) if n else (windows, None)


def labelled_documents(
    data: Tensor | TextSource, tokenizer: Any, bos: int | None, *, train_on: TrainOn, enough: int | None = None
) -> list[Tensor]:
    """Each document as tokens and labels, int64 (2, length), without BOS at its beginning.

    Args:
        data: text, a data set, or integers (n, length) whose rows are documents.
        tokenizer: needed where `data` is text.
        bos: what `leading_bos` says of it.
        train_on: as for `training_windows`.
        enough: tokens after which no further document is read; None reads all.

    Raises:
        PrunekitError: text without a tokenizer, or nothing in it.
    """
    reading = Reading(data, tokenizer, separator=DOCUMENT_SEPARATOR)
    documents, found, n_tokens = iter(reading), list[Tensor](), 0
    # a text that is the only one ends without the line break between two
    first = list(islice(documents, 2))
    joint = JOINT * (len(first) > 1)
    for document in chain(first, documents):
        labels = ids = token_ids(document, tokenizer, joint)
        if train_on == "replies" and isinstance(document, TextWithReplies):
            labels = _reply_labels(document, tokenizer, joint)
        skipped = int(bos is not None and ids[:1] == [bos])  # BOS that a template wrote
        found.append(torch.tensor([ids[skipped:], labels[skipped:]]))
        n_tokens += len(ids) - skipped
        if enough is not None and n_tokens >= enough:
            break
    at_least_one(found, data)
    reading.say("recovery", n_tokens)
    return found


def _reply_labels(text: TextWithReplies, tokenizer: Any, joint: str) -> list[int]:
    """Tokens that have characters of a reply; the others are ignored.

    Raises:
        PrunekitError: a tokenizer that cannot say where its tokens stand in the text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise PrunekitError(
            f"a {type(tokenizer).__name__} does not say which characters a token has, which training on replies alone "
            "needs; give train_on='all', or a fast tokenizer (use_fast=True)"
        )
    told = tokenizer(text + joint, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    pairs = zip(told["input_ids"], told["offset_mapping"], strict=True)
    spans = text.replies
    return [t if any(start < end and begin < stop for begin, end in spans) else IGNORED for t, (start, stop) in pairs]
