"""Sparsity patterns: a fraction of a matrix, or n:m along each row."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunekit.annotations import is_real
from prunekit.errors import PrunekitError


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
