"""Sparsity patterns, how zeros are allocated to matrices, and whether a model can take them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from prunekit.annotations import is_real
from prunekit.calibration import check_finite
from prunekit.errors import PrunekitError
from prunekit.gradients import frozen
from prunekit.sparsity.matrices import Call, Matrix, watching


@dataclass(frozen=True)
class Pattern:
    """The sparsity pattern of a matrix.

    Attributes:
        sparsity: fraction of zeros, in [0, 1).
        of: length of the runs along a row in each of which the same number is zero (the m of n:m); None where zeros
            may lie anywhere.
    """

    sparsity: float
    of: int | None = None

    @property
    def zeros(self) -> int:
        """Number of zeros in each run of `of` weights (n in papers on pruning)."""
        return round(self.sparsity * (self.of or 0))

    def __str__(self) -> str:
        return f"{100 * self.sparsity:g}%" if self.of is None else f"{self.zeros} of {self.of} zero"

    def check_width(self, n_in: int, name: str) -> None:
        """Raise an error for rows that the runs do not divide.

        Raises:
            PrunekitError: names the matrix.
        """
        if self.of is not None and n_in % self.of:
            raise PrunekitError(
                f"{name} has rows of {n_in} weights, which {self.of} does not divide; give a pattern whose "
                f"second number divides {n_in}, a fraction such as sparsity={self.sparsity:g}, or prune "
                f"with round_to={self.of}"
            )

    def lowest(self, scores: Tensor) -> Tensor:
        """Mask of the zeros of each run, bool, in the shape of `scores` (in, out), whose rows come in runs."""
        runs = scores.unflatten(0, (-1, self.of or 1))
        chosen = runs.topk(self.zeros, dim=1, largest=False).indices
        return torch.zeros_like(runs, dtype=torch.bool).scatter_(1, chosen, True).flatten(0, 1)


def pattern_of(sparsity: Any = None, pattern: Any = None) -> Pattern:
    """The pattern from the arguments `sparsity` and `pattern`.

    Args:
        sparsity: a fraction in [0, 1), or a text such as `"2:4"` whose two halves are the same.
        pattern: (kept, of), such as (1, 4) for three zeros in every four; one of the two is given.

    Raises:
        PrunekitError: both or neither given, or values that are not allowed.
    """
    if (sparsity is None) == (pattern is None):
        raise PrunekitError(
            f"sparsity={sparsity!r}, pattern={pattern!r}: give one of the two, as in sparsity=0.5 or pattern=(2, 4)"
        )
    if isinstance(sparsity, str):
        pattern = _from_text(sparsity)
    if pattern is not None:
        return _from_counts(pattern)
    if not is_real(sparsity) or not 0 <= sparsity < 1:
        meant = f"; did you mean {sparsity / 100:g}?" if is_real(sparsity) and 1 < sparsity < 100 else ""
        raise PrunekitError(f"sparsity={sparsity!r:.60} is not allowed; give a fraction in [0, 1), or '2:4'{meant}")
    return Pattern(float(sparsity))


def _from_text(text: str) -> tuple[int, int]:
    """The pattern of a text such as "2:4", in which kept and pruned counts are equal."""
    found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
    if not found:
        raise PrunekitError(f"sparsity={text!r} is not a pattern; give a fraction such as 0.5, or '2:4'")
    n, m = map(int, found.groups())
    if 0 < n < m and 2 * n != m:
        raise PrunekitError(
            f"sparsity={text!r} means {n} kept of {m} to hardware and {n} pruned of {m} to papers on pruning; say "
            f"pattern=({n}, {m}) for {n} kept, pattern=({m - n}, {m}) for {n} pruned"
        )
    return n, m


def _from_counts(pattern: Any) -> Pattern:
    whole = isinstance(pattern, tuple | list) and len(pattern) == 2 and all(type(n) is int for n in pattern)
    if not whole or not 1 <= pattern[0] <= pattern[1]:
        raise PrunekitError(
            f"pattern={pattern!r} is not allowed; give (kept, of), two integers with 1 ≤ kept ≤ of, such as (2, 4)"
        )
    kept, of = pattern
    return Pattern((of - kept) / of, of)


_QUANTISED = ("torch.ao.nn.", "bitsandbytes.", "torchao.", "auto_gptq.", "awq.", "optimum.quanto")


def check_sparsifiable(model: Any) -> None:
    """Raise an error if a model is not a causal LM, is quantised, has adapters, or has non-finite weights.

    Raises:
        PrunekitError: the model cannot be sparsified; the message says why.
    """
    if hasattr(model, "peft_config"):
        raise PrunekitError("the model has adapters; call merge_and_unload() on it first")
    if hasattr(model, "_orig_mod"):
        raise PrunekitError("the model is compiled; give the one that was compiled, model._orig_mod")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise PrunekitError(f"a {type(model).__name__} has an encoder and a decoder; give a causal LM")
    reason = quantised(model)
    if reason is not None:
        raise PrunekitError(
            f"the model is quantised ({reason}), and zeros would be lost or rounded there: sparsify the checkpoint of "
            "full precision, then quantise that"
        )
    if not hasattr(model, "get_input_embeddings"):
        raise PrunekitError(
            f"a {type(model).__name__} is not a transformers model, so it cannot run on tokens; give a causal LM"
        )
    check_finite(model)


def quantised(model: nn.Module) -> str | None:
    """What shows that a model is quantised, as a clause for an error message; None where it is not quantised."""
    stated = getattr(getattr(model, "config", None), "quantization_config", None)
    if stated is not None:
        method = stated.get("quant_method") if isinstance(stated, dict) else getattr(stated, "quant_method", None)
        return f"its configuration says {str(getattr(method, 'value', method))!r}"
    for name, module in model.named_modules():
        kind = type(module)
        if f"{kind.__module__}.{kind.__qualname__}".startswith(_QUANTISED):
            return f"{name or 'it'} is a {kind.__module__}.{kind.__qualname__}"
    for name, p in model.named_parameters():
        if not p.is_floating_point() or p.element_size() < 2 or type(p.data).__module__.startswith("torchao"):
            return f"{name} is {p.dtype}"
    return None


_BINS = 8192  # of the logarithm of scores, between 1e-30 and 1e10
_LOW, _HIGH = -30.0, 10.0
MOST = 0.99  # zeros of one matrix


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
    sensitivities = _sensitivities(model, batches, matrices)
    histograms = torch.stack([_histogram(matrix, sensitivities.get(matrix)) for matrix in matrices])  # (matrix, bin)
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


def _histogram(matrix: Matrix, sensitivity: Tensor | None) -> Tensor:
    """Histogram of a matrix's scores, float64 (bin,)."""
    weight = matrix.weight.float()
    if sensitivity is None:  # no token reached it, so it has no effect
        return torch.bincount(torch.zeros(weight.numel(), dtype=torch.long), minlength=_BINS).double()
    scores = weight.square() * sensitivity.to(weight.device)
    places = (scores.clamp_min(10**_LOW).log10() - _LOW) / (_HIGH - _LOW) * _BINS
    return torch.bincount(places.long().clamp(0, _BINS - 1).flatten().cpu(), minlength=_BINS).double()


def _sensitivities(model: nn.Module, batches: Sequence[Tensor], matrices: Sequence[Matrix]) -> dict[Matrix, Tensor]:
    """Matrix → E[x²]·E[g²] of each of its inputs (in,), for matrices that a token reached."""
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
    return {m: (x / n_tokens) * (g / n_tokens) for m, (x, g) in sums.items()}
