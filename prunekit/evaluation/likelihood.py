"""Spans of tokens to score, how they are packed into rows, and batches of rows.

The inputs of all spans, sorted, are a tree: choices of one question part where they differ, and so do questions that
begin alike. A row holds a piece of that tree, so that shared prefixes are run only once. A token sees itself and what
stands above it, and its position is its depth.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.errors import PrunekitError
from prunekit.models import device_of

ROW = 128  # nodes a row; of 64, 128 and 256 the quickest on the embedded world
WIDEST = 4096  # nodes a row at most where long beginnings are shared; a mask of that width takes 64 MiB
GROWTH = 3  # a row grows to so many times the beginning that it would otherwise repeat: attention is quadratic
AT_ONCE = 2048  # positions whose logits are turned into likelihoods at once
FULL = 0.9  # of a batch's width, what its shortest row has at least: no more than a tenth is padding


@dataclass(frozen=True)
class Span:
    """A sequence of tokens, of which the last ones are scored.

    Attributes:
        tokens: token ids, at least 2.
        start: position of the first token that is scored, in [1, len(tokens)); what stands before it is context.
        n_cut: tokens of the context that were cut off on the left, since the model does not take so many.
    """

    tokens: tuple[int, ...]
    start: int
    n_cut: int = 0

    @property
    def n_scored(self) -> int:
        """Number of scored tokens."""
        return len(self.tokens) - self.start


def check_tokens_fit(model: nn.Module, highest: int) -> None:
    """Raises an error for a token outside the model's vocabulary."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    n_vocabulary = embedding.weight.shape[0]
    if highest >= n_vocabulary:
        raise PrunekitError(
            f"the text holds token {highest}, but the model's vocabulary has {n_vocabulary}: "
            "this tokenizer belongs to another model; load both from the same place"
        )


@dataclass(frozen=True, eq=False)
class Row:
    """A part of the prefix tree of all spans' inputs.

    Attributes:
        tokens: token id of each node.
        parents: of each node, the one above it, which stands before it; -1 for a root.
        paths: span number → its nodes, one for each of its tokens but the last.
    """

    tokens: list[int]
    parents: list[int]
    paths: dict[int, list[int]]

    def depths(self) -> list[int]:
        """Position of each node in the sequences that it belongs to, from 0."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
        return depths

    def visible(self, width: int) -> np.ndarray:
        """Attention mask of the tree, bool (width, width): row attends to column; padding attends to itself."""
        seen = np.eye(width, dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen


def pack(spans: Sequence[Span], width: int = ROW, *, widest: int = WIDEST) -> list[Row]:
    """Rows with a prefix tree each, filled span by span in sorted order; no span is split.

    Spans that begin alike stay in one row where it has room for all of them. A row grows beyond `width` where what
    the next span shares with it is long, since a new row would have to read that again.

    Args:
        spans: the spans to score.
        width: nodes a row, about; a span that is longer has a row of its own, or shares it with its like.
        widest: nodes to which a row may grow; a longer span still has one.
    """
    rows: list[Row] = []
    before: tuple[int, ...] = ()
    path: list[int] = []
    for family in _families(spans):
        needed = _tree_size([spans[number].tokens[:-1] for number in family])
        for place, number in enumerate(family):
            inputs = spans[number].tokens[:-1]
            shared = _shared(before, inputs)
            room = width if place == 0 else max(width, min(GROWTH * shared, widest))
            new = min(needed, width) if place == 0 else len(inputs)
            if not rows or len(rows[-1].tokens) + max(new, len(inputs)) - shared > room:
                rows.append(Row([], [], {}))
                shared = 0
            if not (inputs == before and shared):
                path = _hang(rows[-1], path[:shared], inputs[shared:])
            rows[-1].paths[number] = path
            before = inputs
    return rows


def _hang(row: Row, path: list[int], tokens: tuple[int, ...]) -> list[int]:
    """Adds tokens below a path of nodes; returns the path to the last one."""
    path = path[:]
    for token in tokens:
        row.parents.append(path[-1] if path else -1)
        path.append(len(row.tokens))
        row.tokens.append(token)
    return path


def _families(spans: Sequence[Span]) -> Iterator[list[int]]:
    """Runs of span numbers, sorted by inputs; each shares a prefix of a third or more with the one before."""
    family: list[int] = []
    for number in sorted(range(len(spans)), key=lambda n: spans[n].tokens[:-1]):
        inputs = spans[number].tokens[:-1]
        if family and GROWTH * _shared(spans[family[-1]].tokens[:-1], inputs) < len(inputs):
            yield family
            family = []
        family.append(number)
    if family:
        yield family


def _tree_size(ordered: Sequence[tuple[int, ...]]) -> int:
    """Nodes of the tree of sorted sequences."""
    pairs = zip(ordered, ordered[1:], strict=False)
    return len(ordered[0]) + sum(len(b) - _shared(a, b) for a, b in pairs)


def unpacked(spans: Sequence[Span], numbers: Iterable[int] | None = None) -> list[Row]:
    """Rows of one sequence each, of the spans with these numbers or of all; spans with the same inputs share a row."""
    rows: dict[tuple[int, ...], Row] = {}
    for number in range(len(spans)) if numbers is None else numbers:
        inputs = spans[number].tokens[:-1]
        row = rows.setdefault(inputs, Row([*inputs], [*range(-1, len(inputs) - 1)], {}))
        row.paths[number] = [*range(len(inputs))]
    return [*rows.values()]


def _shared(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Length of the common prefix of two sequences."""
    if a == b:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def sample_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows for a test: the one with the longest span (attention windows) and the one with the most spans."""
    deepest = max(range(len(rows)), key=lambda n: max(map(len, rows[n].paths.values())))
    fullest = max(range(len(rows)), key=lambda n: len(rows[n].paths))
    return [rows[n] for n in sorted({deepest, fullest})]


# --- batches ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one width, and where in their logits the scored tokens' are.

    Attributes:
        inputs: the model's keyword arguments: input_ids (rows, width); where rows are packed, position_ids and
            attention_mask (rows, 1, width, width), added to attention scores; where rows of one sequence are padded,
            attention_mask (rows, width).
        places: ascending numbers of the positions, counted through all rows, whose logits are needed.
        at: which of `places` each scored token is scored at.
        tokens: the scored tokens' ids.
        owners: which of `members` each belongs to.
        members: ascending numbers of the spans that lie here.
    """

    inputs: dict[str, Tensor]
    places: Tensor
    at: Tensor
    tokens: Tensor
    owners: Tensor
    members: Tensor

    def read(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Each member's summed log-likelihood, float64 in nats, and whether it is greedy, both (n_members,).

        Args:
            logits: (n_places, vocabulary).
        """
        pieces = [(rows.logsumexp(-1), rows.amax(-1)) for rows in map(torch.Tensor.float, logits.split(AT_ONCE))]
        norms, highest = (torch.cat(found) for found in zip(*pieces, strict=True))  # (n_places,) each
        chosen = logits[self.at, self.tokens].float()
        sums = torch.zeros(len(self.members), dtype=torch.float64)
        sums.index_add_(0, self.owners, (chosen - norms[self.at]).cpu().double())
        beaten = self.owners[(chosen < highest[self.at]).cpu()]
        return sums, torch.ones(len(self.members), dtype=torch.bool).index_fill_(0, beaten, False)


def packed_batches(
    model: nn.Module, spans: Sequence[Span], rows: Sequence[Row], tokens_a_batch: int
) -> Iterator[Batch]:
    """Right-padded batches of rows of similar widths; masks and positions follow each row's prefix tree."""
    dtype = dtype_of(model)
    for several in _in_batches(rows, tokens_a_batch, FULL):
        width = max(len(row.tokens) for row in several)
        seen = torch.from_numpy(np.stack([row.visible(width) for row in several]))[:, None]
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
        inputs = {
            "input_ids": _padded([row.tokens for row in several], width),
            "position_ids": _padded([row.depths() for row in several], width),
            "attention_mask": mask,
        }
        yield _batch(several, spans, inputs, device_of(model))


def plain_batches(
    model: nn.Module, spans: Sequence[Span], rows: Sequence[Row], tokens_a_batch: int, full: float = 1.0
) -> Iterator[Batch]:
    """Batches of rows of one sequence each, as every decoder takes them, padded on the right where `full` is below 1.

    No causal model sees what stands to the right; the mask is for those that count positions along it.
    """
    for several in _in_batches(rows, tokens_a_batch, full):
        width, least = len(several[0].tokens), len(several[-1].tokens)
        inputs = {"input_ids": _padded([row.tokens for row in several], width)}
        if least < width:
            inputs["attention_mask"] = _padded([[1] * len(row.tokens) for row in several], width)
        yield _batch(several, spans, inputs, device_of(model))


def _in_batches(rows: Sequence[Row], tokens_a_batch: int, full: float) -> Iterator[list[Row]]:
    """Batches of rows, longest first, up to a number of tokens with padding; at least one row each."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        width = len(batch[0].tokens) if batch else 0
        if batch and ((len(batch) + 1) * width > tokens_a_batch or len(row.tokens) < full * width):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _padded(lists: list[list[int]], width: int) -> Tensor:
    return torch.tensor([values + [0] * (width - len(values)) for values in lists])


def _batch(rows: Sequence[Row], spans: Sequence[Span], inputs: dict[str, Tensor], device: torch.device) -> Batch:
    width = inputs["input_ids"].shape[1]
    scored = [
        (number * width + node, token, span)
        for number, row in enumerate(rows)
        for span, path in row.paths.items()
        for node, token in zip(path[spans[span].start - 1 :], spans[span].tokens[spans[span].start :], strict=True)
    ]
    where, tokens, owners = torch.tensor(scored).T
    places, at = where.unique(return_inverse=True)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    members, owners = owners.unique(return_inverse=True)
    return Batch(inputs, places.to(device), at.to(device), tokens.to(device), owners, members)


def dtype_of(model: nn.Module) -> torch.dtype:
    """The model's floating-point type; quantised weights are not counted."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
