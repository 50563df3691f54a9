"""Batches of rows of tokens, as a model reads them, and where in their logits the scored tokens' are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from prunekit.evaluation.likelihood import Row, Span
from prunekit.models import device_of

AT_ONCE = 2048  # positions whose logits are turned into likelihoods at once
FULL = 0.9  # of a batch's width, what its shortest row has at least: no more than a tenth is padding


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
