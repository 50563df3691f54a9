"""Packing: many token sequences in one row, what they begin with read only once.

The inputs of all spans, sorted, are a tree: choices of one question part where they differ, and so do questions that
begin alike. A row holds a piece of that tree. A token sees itself and what stands above it, and its position is its
depth. Not every decoder listens to both, so that it is tried before it is used.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.evaluation.likelihood import Span, device_of

ROW = 128  # nodes a row; of 64, 128 and 256 the quickest on the embedded world
TOLERANCE = 1e-4  # relative, of a span's sum in float32; wider where the model's numbers are coarser
CONTROL = 0.05  # what packing may err by, as a part of what a row errs by whose tree the model is not told of


@dataclass(frozen=True, eq=False)
class Row:
    """A piece of the tree of all spans' inputs.

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
        """Whether a node (down) sees another (across), bool (width, width); what is no node sees itself."""
        seen = np.eye(width, dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one width, and where in their logits the scored tokens' are.

    Attributes:
        inputs: the model's keyword arguments: input_ids (rows, width), and where rows are packed, position_ids and
            attention_mask (rows, 1, width, width), added to attention scores.
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

    def sums(self, logits: Tensor) -> Tensor:
        """Each member's summed log-likelihood in nats, float64 (n_members,), from logits (rows, width, vocabulary)."""
        rows = logits.flatten(0, 1)[self.places].float()
        found = rows[self.at, self.tokens] - rows.logsumexp(-1)[self.at]
        return torch.zeros(len(self.members), dtype=torch.float64).index_add_(0, self.owners, found.cpu().double())


def pack(spans: Sequence[Span], width: int = ROW) -> list[Row]:
    """Rows of a tree each, filled span by span in sorted order; a span never lies in two rows.

    Args:
        spans: what is to be scored.
        width: nodes a row at most; one that is longer has a row of its own.
    """
    rows: list[Row] = []
    before: tuple[int, ...] = ()
    path: list[int] = []
    for number in sorted(range(len(spans)), key=lambda n: spans[n].tokens[:-1]):
        inputs = spans[number].tokens[:-1]
        shared = _shared(before, inputs)
        if not rows or len(rows[-1].tokens) + len(inputs) - shared > width:
            rows.append(Row([], [], {}))
            shared = 0
        row, path = rows[-1], path[:shared]
        for token in inputs[shared:]:
            row.parents.append(path[-1] if path else -1)
            path.append(len(row.tokens))
            row.tokens.append(token)
        row.paths[number] = path[:]
        before = inputs
    return rows


def unpacked(spans: Sequence[Span]) -> list[Row]:
    """Rows of one sequence each; what spans have the same inputs share one."""
    rows: dict[tuple[int, ...], Row] = {}
    for number, span in enumerate(spans):
        inputs = span.tokens[:-1]
        row = rows.setdefault(inputs, Row([*inputs], [*range(-1, len(inputs) - 1)], {}))
        row.paths[number] = [*range(len(inputs))]
    return [*rows.values()]


def _shared(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """With how many equal tokens two sequences begin."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def packed_batches(model: nn.Module, spans: Sequence[Span], rows: Sequence[Row], tokens_a_batch: int) -> list[Batch]:
    """Batches of rows of similar widths, padded on the right, with the tree as mask and positions."""
    dtype, found = _dtype(model), []
    for several in _in_batches(rows, tokens_a_batch, equal=False):
        width = max(len(row.tokens) for row in several)
        seen = torch.from_numpy(np.stack([row.visible(width) for row in several]))[:, None]
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)
        inputs = {
            "input_ids": _padded([row.tokens for row in several], width),
            "position_ids": _padded([row.depths() for row in several], width),
            "attention_mask": mask,
        }
        found.append(_batch(several, spans, inputs, device_of(model)))
    return found


def plain_batches(model: nn.Module, spans: Sequence[Span], tokens_a_batch: int) -> list[Batch]:
    """Batches of equally long sequences, as every decoder takes them: nothing padded, nothing masked."""
    return [
        _batch(several, spans, {"input_ids": torch.tensor([row.tokens for row in several])}, device_of(model))
        for several in _in_batches(unpacked(spans), tokens_a_batch, equal=True)
    ]


def _dtype(model: nn.Module) -> torch.dtype:
    """That of the model's numbers; quantised weights are no numbers."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _in_batches(rows: Sequence[Row], tokens_a_batch: int, *, equal: bool) -> Iterator[list[Row]]:
    """The longest rows first, as many together as have so many tokens with what is padded; at least one."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        width = len(batch[0].tokens) if batch else 0
        if batch and ((len(batch) + 1) * width > tokens_a_batch or (equal and len(row.tokens) < width)):
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


def choose_batches(model: nn.Module, spans: Sequence[Span], tokens_a_batch: int) -> tuple[list[Batch], bool]:
    """The batches to run, and whether they are packed: they are where that gives this model's own likelihoods.

    Args:
        model: a causal LM in evaluation mode.
        spans: what is to be scored.
        tokens_a_batch: positions a forward pass, about; it does not change the result.
    """
    rows = pack(spans)
    if _packs(model, spans, rows, tokens_a_batch):
        return packed_batches(model, spans, rows, tokens_a_batch), True
    return plain_batches(model, spans, tokens_a_batch), False


def span_sums(model: nn.Module, batches: Sequence[Batch], n_spans: int) -> Tensor:
    """Sum of log p(token | all before it) over each span's scored tokens, float64 (n_spans,), in nats, on the CPU."""
    sums = torch.zeros(n_spans, dtype=torch.float64)
    for batch in batches:
        sums[batch.members] = batch.sums(model(**batch.inputs, use_cache=False).logits)
    return sums


def sample_rows(rows: Sequence[Row]) -> list[Row]:
    """The row with the longest span (windows of attention end somewhere), the fullest one, and a few others."""
    deepest = max(range(len(rows)), key=lambda n: max(map(len, rows[n].paths.values())))
    fullest = max(range(len(rows)), key=lambda n: len(rows[n].paths))
    return [rows[n] for n in sorted({deepest, fullest, *range(0, len(rows), len(rows) // 2 + 1)})]


def _packs(model: nn.Module, spans: Sequence[Span], rows: Sequence[Row], tokens_a_batch: int) -> bool:
    """Whether a model listens to positions and mask, tried on a few rows.

    The control is that it errs where it is told of neither: where it does not, as with rows of one sequence each or a
    model that nothing moves, the trial shows nothing, and there is nothing to gain or nothing to trust.
    """
    few = sample_rows(rows)
    chosen = sorted({span for row in few for span in row.paths})
    own = span_sums(model, plain_batches(model, [spans[n] for n in chosen], tokens_a_batch), len(chosen))
    trial = packed_batches(model, spans, few, tokens_a_batch)
    try:
        error = _error(span_sums(model, trial, len(spans))[chosen], own)
    except Exception:  # whatever it is that a model's code says of arguments that it does not expect
        return False
    untold = [replace(batch, inputs={"input_ids": batch.inputs["input_ids"]}) for batch in trial]
    control = _error(span_sums(model, untold, len(spans))[chosen], own)
    coarse = 8 * torch.finfo(_dtype(model)).eps
    return error <= max(TOLERANCE, coarse) and error < CONTROL * control


def _error(sums: Tensor, own: Tensor) -> float:
    """The largest difference of a span's sum, relative to it or to one nat; NaN counts as infinite."""
    return float(((sums - own).abs() / own.abs().clamp_min(1)).nan_to_num(nan=torch.inf).max())
