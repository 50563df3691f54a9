"""Spans of tokens to score, checks that they fit a model, and how they are packed into rows.

The inputs of all spans, sorted, are a tree: choices of one question part where they differ, and so do questions that
begin alike. A row holds a piece of that tree, so that shared prefixes are run only once. A token sees itself and what
stands above it, and its position is its depth.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from prunekit.errors import PrunekitError


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


def check_batches(model: nn.Module, spans: Sequence[Span], batch_size: int) -> None:
    """Raises an error for spans that a model cannot take."""
    if batch_size < 1:
        raise PrunekitError(f"batch_size={batch_size}; it is a number of rows, at least 1")
    check_tokens_fit(model, max((max(span.tokens) for span in spans), default=0))


def check_tokens_fit(model: nn.Module, highest: int) -> None:
    """Raises an error for a token outside the model's vocabulary."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    n_vocabulary = embedding.weight.shape[0]
    if highest >= n_vocabulary:
        raise PrunekitError(
            f"the text holds token {highest}, but the model's vocabulary has {n_vocabulary}: "
            "this tokenizer belongs to another model; load both from the same place"
        )


def require_finite(values: Tensor, model: nn.Module) -> None:
    """Raises an error if a value is NaN or infinite; the message names the parameters at fault."""
    if bool(values.isfinite().all()):
        return
    here = ((name, weight) for name, weight in model.named_parameters() if not weight.is_meta)  # the rest is offloaded
    broken = [name for name, weight in here if not bool(weight.isfinite().all())]
    shown = ", ".join(broken[:3]) + (f" and {len(broken) - 3} more" if len(broken) > 3 else "")
    cause = (
        f"the weights {shown} are NaN or infinite; load the checkpoint again or redo the step that wrote them"
        if broken
        else f"all weights are finite, so the activations overflow in {next(model.parameters()).dtype}; try float32"
    )
    raise PrunekitError(f"the model's log-likelihoods are not finite: {cause}")


ROW = 128  # nodes a row; of 64, 128 and 256 the quickest on the embedded world
WIDEST = 4096  # nodes a row at most where long beginnings are shared; a mask of that width takes 64 MiB
GROWTH = 3  # a row grows to so many times the beginning that it would otherwise repeat: attention is quadratic


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


def pack(
    spans: Sequence[Span], width: int = ROW, *, widest: int = WIDEST, numbers: Iterable[int] | None = None
) -> list[Row]:
    """Rows with a prefix tree each, filled span by span in sorted order; no span is split.

    Spans that begin alike stay in one row where it has room for all of them. A row grows beyond `width` where what
    the next span shares with it is long, since a new row would have to read that again.

    Args:
        spans: the spans to score.
        width: nodes a row, about; a span that is longer has a row of its own, or shares it with its like.
        widest: nodes to which a row may grow; a longer span still has one.
        numbers: which spans; None takes all.
    """
    rows: list[Row] = []
    before: tuple[int, ...] = ()
    path: list[int] = []
    for family in _families(spans, range(len(spans)) if numbers is None else numbers):
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


def _families(spans: Sequence[Span], numbers: Iterable[int]) -> Iterator[list[int]]:
    """Runs of span numbers, sorted by inputs; each shares a prefix of a third or more with the one before."""
    family: list[int] = []
    for number in sorted(numbers, key=lambda n: spans[n].tokens[:-1]):
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
    """Rows of one sequence each; spans with the same inputs share a row. Arguments are those of `pack`."""
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
