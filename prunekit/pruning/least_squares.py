"""Least squares of one linear layer from sums over tokens, with the ridge chosen on held-out tokens."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from prunekit.errors import PrunekitError
from prunekit.importance.curvature import RIDGE, raised
from prunekit.pruning.removal import remaining

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)  # that are tried for each layer


@dataclass(frozen=True, eq=False)
class Fit:
    """Sums over tokens for the least squares of one linear layer.

    Attributes:
        gram: XᵀX of the inputs that are left, float64 (n_in, n_in); with a bias, the last input is 1.
        cross: XᵀR, (n_in, n_out), with R what the pruned inputs added to the outputs.
        biased: whether there is a bias.
        lack: ‖R‖² before the fit.
        size: ‖Y‖² of the dense outputs.
        basis: (n_out, n_pruned), orthonormal columns that span the rows of R, where fewer inputs were pruned than
            there are outputs; else None.
    """

    gram: Tensor
    cross: Tensor
    biased: bool
    lack: float
    size: float
    basis: Tensor | None = None

    def __add__(self, other: "Fit") -> "Fit":
        """The sums over both sets of tokens."""
        lack, size = self.lack + other.lack, self.size + other.size
        return Fit(self.gram + other.gram, self.cross + other.cross, self.biased, lack, size, self.basis)

    def solved(self, ridge: float) -> Tensor:
        """The ridge solution: the change of the weights (n_in, n_out) that reduces R; the bias has no ridge."""
        if not self.biased:
            return torch.cholesky_solve(self.cross, _factor(self.gram, ridge))
        n, inputs, rest = self.gram[-1, -1], self.gram[:-1, -1], self.cross[-1]  # tokens, weighed, and sums over them
        centred = self.gram[:-1, :-1] - torch.outer(inputs, inputs) / n
        rounding = len(inputs) * torch.finfo(self.gram.dtype).eps  # is all that is left of constant inputs
        centred.diagonal().add_(rounding * self.gram.diagonal()[:-1].sum())
        change = torch.cholesky_solve(self.cross[:-1] - torch.outer(inputs, rest) / n, _factor(centred, ridge))
        return torch.cat([change, (rest - inputs @ change)[None] / n])

    def within(self, basis: Tensor) -> "Fit":
        """The same least squares in the coordinates of R's rows: fewer columns, and the same errors."""
        return replace(self, cross=self.cross @ basis, basis=None)

    def constant(self) -> Tensor:
        """The change (n_in, n_out) of the bias alone: the mean of R."""
        change = torch.zeros_like(self.cross)
        change[-1] = self.cross[-1] / self.gram[-1, -1]
        return change

    def lack_after(self, change: Tensor) -> float:
        """‖R‖² after a change of the weights."""
        gained = 2 * (change * self.cross).sum() - (change * (self.gram @ change)).sum()
        return max(self.lack - float(gained), 0.0)

    def error(self, lack: float) -> float:
        """‖R‖² as a share of ‖Y‖²."""
        return lack / max(self.size, torch.finfo(torch.float64).tiny)


class Choice(NamedTuple):
    """The re-fit of a layer.

    Attributes:
        change: of its weights, (n_in, n_out), and of its bias; None where it keeps them.
        ridge: the chosen ridge; NaN if the layer keeps its weights.
        before: ‖R‖² / ‖Y‖² as it is, on the tokens that judge.
        after: the same once it has changed.
    """

    change: Tensor | None
    ridge: float
    before: float
    after: float


def fit_sums(gram: Tensor, weight: Tensor, inputs: Tensor | None, outputs: Tensor | None, biased: bool) -> Fit:
    """Least squares of one layer, from its dense weights (n_in, n_out) and what stays of both."""
    gram, n = gram.double(), len(weight)
    inputs = torch.arange(n) if inputs is None else inputs
    weight = weight if outputs is None else weight[:, outputs.to(weight.device)]
    stays = torch.cat([inputs, torch.tensor([n])]) if biased else inputs
    stays, gone = stays.to(gram.device), remaining(n, inputs).to(gram.device)
    lacking = weight[gone]  # (n_pruned, n_out)
    lack = float((lacking * (gram[gone][:, gone] @ lacking)).sum())
    size = float((weight * (gram[:n, :n] @ weight)).sum())
    basis = torch.linalg.qr(lacking.T).Q if len(lacking) < lacking.shape[1] else None
    return Fit(gram[stays][:, stays], gram[stays][:, gone] @ lacking, biased, lack, size, basis)


def choose(found: Fit, judge: Fit | None, fit: str, ridge: float | None) -> Choice:
    """The change with the smallest error on held-out tokens; without these, that of the given ridge."""
    if found.basis is None:
        return _chosen(found, judge, fit, ridge)
    basis = found.basis  # R = X_p W_p has no more directions than inputs were pruned, and so has the change
    taken = _chosen(found.within(basis), None if judge is None else judge.within(basis), fit, ridge)
    return taken if taken.change is None else taken._replace(change=taken.change @ basis.T)


def _chosen(found: Fit, judge: Fit | None, fit: str, ridge: float | None) -> Choice:
    if judge is None:
        taken = RIDGE if ridge is None else ridge
        change = found.constant() if fit == "bias" else found.solved(taken)
        taken = math.nan if fit == "bias" else taken
        return Choice(change, taken, found.error(found.lack), found.error(found.lack_after(change)))
    tried = {math.nan: found.constant()} if fit == "bias" else {r: found.solved(r) for r in RIDGES}
    lacks = {r: judge.lack_after(change) for r, change in tried.items()}
    best = min(lacks, key=lambda r: lacks[r])
    if not lacks[best] < judge.lack:
        return Choice(None, math.nan, judge.error(judge.lack), judge.error(judge.lack))
    both = found + judge
    change = both.constant() if fit == "bias" else both.solved(best)
    return Choice(change, best, judge.error(judge.lack), judge.error(lacks[best]))


def _factor(gram: Tensor, ridge: float) -> Tensor:
    """The Cholesky factor of XᵀX with a share added to its diagonal."""
    lower, failed = torch.linalg.cholesky_ex(raised(gram, ridge))
    if failed:
        raise PrunekitError(f"ridge={ridge!r} is too small for inputs that depend on each other; try {RIDGE}")
    return lower
