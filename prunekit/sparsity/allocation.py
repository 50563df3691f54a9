"""Allocates zeros to matrices: uniformly, or by one budget over all."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from prunekit.errors import PrunekitError
from prunekit.gradients import frozen
from prunekit.sparsity.matrices import Call, Matrix, watching
from prunekit.sparsity.patterns import Pattern

_BINS = 8192  # of the logarithm of scores, between 1e-30 and 1e10
_LOW, _HIGH = -30.0, 10.0
MOST = 0.99  # zeros of one matrix


class _Moments(NamedTuple):
    """Sums of squares of a matrix's inputs (by input) and of its output gradients (in total)."""

    inputs: Tensor
    gradients: Tensor


def allocate(
    model: nn.Module, batches: Sequence[Tensor], matrices: Sequence[Matrix], pattern: Pattern
) -> dict[Matrix, Pattern]:
    """Number of zeros for each matrix, by one budget over all of them.

    Removing w_ij adds about ½·w²·E[x_j²]·E[g_i²] nats to the loss, with x the inputs and g the loss's gradients at
    the outputs: the factored diagonal of the Fisher information, with the mean over i in place of E[g_i²], since
    the solver places the zeros inside a matrix. One threshold in nats applies to all matrices: a matrix gets one zero
    for each weight below it, up to 99%.

    Args:
        model: dense.
        batches: batches of tokens.
        matrices: the matrices to prune.
        pattern: the budget, a fraction.

    Raises:
        PrunekitError: gradients that are not finite.

    Source: Optimal Brain Damage (LeCun et al., 1990) with the factors of K-FAC; as a way to allocate it is ours.
    """
    moments = _gather(model, batches, matrices)
    histograms = torch.stack([_histogram(matrix, moments.get(matrix)) for matrix in matrices])  # (matrix, bin)
    below = histograms.cumsum(1)
    sizes = below[:, -1]
    capped = torch.minimum(below, MOST * sizes[:, None])
    wanted = pattern.sparsity * sizes.sum()
    at = int((capped.sum(0) < wanted).sum())
    if at >= _BINS:
        raise PrunekitError(
            f"sparsity={pattern.sparsity:g} over all would leave less than {1 - MOST:.0%} of some matrix"
        )
    before = capped[:, at - 1] if at else torch.zeros_like(sizes)
    inside = capped[:, at] - before
    shares = (before + inside * ((wanted - before.sum()) / inside.sum().clamp_min(1))) / sizes
    return {m: Pattern(float(share.clamp(0, MOST))) for m, share in zip(matrices, shares, strict=True)}


def _histogram(matrix: Matrix, moments: _Moments | None) -> Tensor:
    """Histogram of a matrix's scores, float64 (bin,)."""
    weight = matrix.weight.float()
    if moments is None:  # no token reached it, so it has no effect
        return torch.bincount(torch.zeros(weight.numel(), dtype=torch.long), minlength=_BINS).double()
    scores = weight.square() * (moments.inputs * moments.gradients).to(weight.device)
    places = (scores.clamp_min(10**_LOW).log10() - _LOW) / (_HIGH - _LOW) * _BINS
    return torch.bincount(places.long().clamp(0, _BINS - 1).flatten().cpu(), minlength=_BINS).double()


def _gather(model: nn.Module, batches: Sequence[Tensor], matrices: Sequence[Matrix]) -> dict[Matrix, _Moments]:
    sums: dict[Matrix, list[Tensor]] = {}

    def note(call: Call) -> None:
        x = call.inputs.detach().float()
        entry = sums.setdefault(call.matrix, [x.new_zeros(x.shape[1]), x.new_zeros(())])
        entry[0] += x.square().sum(0)

    def note_gradient(matrix: Matrix, gradient: Tensor) -> None:
        sums[matrix][1] += gradient.float().square().sum() / gradient.shape[1]

    embedding = model.get_input_embeddings()  # type: ignore[operator]
    with frozen(model):
        embedding.weight.requires_grad_(True)  # the backward pass needs a gradient
        for batch in tqdm(batches, desc="sensitivity", unit="batch", leave=False, delay=1):
            with torch.enable_grad(), watching(matrices, note, note_gradient):
                loss = model(input_ids=batch, labels=batch, use_cache=False).loss
                (loss * batch[:, 1:].numel()).backward()  # of the sum over tokens, for any batching
            embedding.weight.grad = None
    if not all(bool(t.isfinite().all()) for entry in sums.values() for t in entry):
        raise PrunekitError("activations or gradients are not finite; load the model in float32 or bfloat16")
    n_tokens = sum(batch.numel() for batch in batches)
    return {m: _Moments(x / n_tokens, g / n_tokens) for m, (x, g) in sums.items()}
