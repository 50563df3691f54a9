"""Compensation: what reads pruned units is re-fitted, so that it hands on nearly what it did in the dense model."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from prunekit.calibration import TOKENS_A_BATCH, check_tokens
from prunekit.discovery.preparing import evaluating
from prunekit.errors import PrunekitError
from prunekit.importance.inputs import Reader, computing_wide, linear_readers
from prunekit.pruning.plans import PruningPlan

RIDGE = 0.01


@dataclass(frozen=True, eq=False)
class _Fit:
    """Least squares of one linear layer, summed up over tokens.

    Attributes:
        gram: XᵀX of the inputs that are left, (n_in, n_in); with a bias, the last input is 1.
        cross: XᵀR, (n_in, n_out), with R what the outputs lack.
        lack: ‖R‖² before the fit.
        size: ‖Y‖² of the dense outputs.
    """

    gram: Tensor
    cross: Tensor
    lack: float
    size: float

    def solved(self, ridge: float) -> Tensor:
        """The change of the weights (n_in, n_out) that takes most of R away and stays small."""
        damping = ridge * self.gram.diagonal().mean()
        factor = torch.linalg.cholesky(self.gram + damping * torch.eye(len(self.gram)).to(self.gram))
        return torch.cholesky_solve(self.cross, factor)

    def lack_after(self, change: Tensor) -> float:
        """‖R‖² once the weights have changed."""
        gained = 2 * (change * self.cross).sum() - (change * (self.gram @ change)).sum()
        return max(self.lack - float(gained), 0.0)


@torch.no_grad()
def compensate(
    small: nn.Module, model: nn.Module, plan: PruningPlan, calib: Tensor, *, ridge: float = RIDGE
) -> pd.DataFrame:
    """Re-fit every linear layer of a cut model that lost inputs, in the order in which they run.

    A layer with inputs X, in the cut model as re-fitted so far, and outputs Y in the dense model gets the weights
    W + Δ with Δ = (XᵀX + λI)⁻¹ Xᵀ(Y − XW): the least squares of its output error, drawn towards W by the ridge. Its
    bias, where it has one, is fitted along. No gradient is needed, and only sums over tokens are kept.

    Args:
        small: what `prune(model, plan)` returned; it is changed.
        model: the dense model.
        plan: by which it was cut.
        calib: integers (n_samples, seq_len).
        ridge: λ, as a part of the mean of XᵀX's diagonal; above 0.

    Returns:
        One row a layer: module, inputs (left), error_before and error_after (‖Y − XW‖² / ‖Y‖²).

    Raises:
        PrunekitError: a ridge that is not above 0, bad tokens, models that do not belong together, or activations
            that are not finite; layers done before stay re-fitted.

    Source: least squares as in OSSCAR (Meng et al. 2024) and ZipLM (Kurtic et al. 2023). Differs: the targets are the
        dense model's own outputs at each layer, so that what earlier layers lack is made up for too.
    """
    if isinstance(ridge, bool) or not isinstance(ridge, (int, float)) or not 0 < ridge < float("inf"):
        raise PrunekitError(f"ridge={ridge!r} is not allowed; give a number above 0, such as {RIDGE}")
    tokens = check_tokens(calib, model)
    batches = tokens.split(max(1, TOKENS_A_BATCH // tokens.shape[1]))
    readers = _in_order(small, _readers(small, model), batches[0])
    kept = _kept_outputs(plan)
    rows = []
    with evaluating(small), evaluating(model):
        for path, reader in tqdm(readers.items(), desc="compensate", unit="layer", leave=False, delay=1):
            fit = _gather(small, model, path, kept.get((path, 1 - reader.input_dim)), batches)
            rows.append(_refit(small.get_submodule(path), reader, fit, path, ridge))
    return pd.DataFrame(rows, columns=["module", "inputs", "error_before", "error_after"])


def _readers(small: nn.Module, model: nn.Module) -> dict[str, Reader]:
    """Path → how it reads, for the linear layers of their own that lost inputs; they stand where they stood."""
    dense = {name.removesuffix(".weight"): p for name, p in model.named_parameters() if name.endswith(".weight")}
    found = {name.removesuffix(".weight"): reader for name, reader in linear_readers(small).items()}
    own = {path: reader for path, reader in found.items() if len(reader.modules) == 1 and path in dense}
    return {
        path: reader
        for path, reader in own.items()
        if small.get_parameter(f"{path}.weight").shape[reader.input_dim] < dense[path].shape[reader.input_dim]
    }


def _kept_outputs(plan: PruningPlan) -> dict[tuple[str, int], Tensor]:
    """(path, dim of its weight) → the rows that stay, where some go."""
    if plan.groups is None:
        raise PrunekitError("the plan was read from a file and carries no groups; make it again with plan(groups, ...)")
    gone: dict[tuple[str, int], list[Tensor]] = {}
    for name in plan.keep:
        for member in plan.groups[name].members:
            place = (member.parameter.removesuffix(".weight"), member.dim)
            gone.setdefault(place, []).append(member.owned_by(plan.removed(name)))
    shapes = {name.removesuffix(".weight"): shape for name, shape in plan.groups.shapes.items()}
    kept = {}
    for place, indices in gone.items():
        stays = torch.ones(shapes[place[0]][place[1]], dtype=torch.bool)
        stays[torch.cat(indices)] = False
        kept[place] = stays.nonzero().flatten()
    return kept


def _in_order(model: nn.Module, readers: dict[str, Reader], batch: Tensor) -> dict[str, Reader]:
    """The readers in the order in which they first run; those that do not are left out."""
    order: list[str] = []
    hooks = [
        reader.modules[0].register_forward_pre_hook(lambda *_, path=path: order.append(path))
        for path, reader in readers.items()
    ]
    try:
        with evaluating(model):
            model(input_ids=batch, use_cache=False)  # type: ignore[operator]
    finally:
        for hook in hooks:
            hook.remove()
    return {path: readers[path] for path in dict.fromkeys(order)}


class _Reached(Exception):  # noqa: N818 - no error
    """Ends a forward pass once what it was made for is known."""


@contextmanager
def _until(module: nn.Module, seen: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """While open, forward passes end at a module, and its inputs and outputs, (n_tokens, …) each, are noted."""

    def note(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], result: Tensor) -> None:
        (x,) = (*args, *kwargs.values())
        seen.append((x.flatten(0, -2), result.flatten(0, -2)))
        raise _Reached

    hook = module.register_forward_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _run_until(model: nn.Module, path: str, batch: Tensor) -> tuple[Tensor, Tensor]:
    seen: list[tuple[Tensor, Tensor]] = []
    with _until(model.get_submodule(path), seen), computing_wide(model), suppress(_Reached):
        model(input_ids=batch, use_cache=False)  # type: ignore[operator]
    return seen[0]


def _gather(small: nn.Module, model: nn.Module, path: str, kept: Tensor | None, batches: tuple[Tensor, ...]) -> _Fit:
    sums: list[Tensor] = []
    lack = size = 0.0
    for batch in batches:
        (x, got), (_, wanted) = _run_until(small, path, batch), _run_until(model, path, batch)
        wanted = wanted if kept is None else wanted[:, kept.to(wanted.device)]
        if got.shape != wanted.shape:
            raise PrunekitError(f"{path} gives {tuple(got.shape)} in the cut model, {tuple(wanted.shape)} in the dense")
        x, rest = x.double(), (wanted - got).double()
        if small.get_submodule(path).bias is not None:
            x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        news = [x.T @ x, x.T @ rest]
        sums = [old + new for old, new in zip(sums, news, strict=True)] if sums else news
        lack, size = lack + float(rest.square().sum()), size + float(wanted.double().square().sum())
    if not all(bool(total.isfinite().all()) for total in sums):
        raise PrunekitError(f"what {path} reads is not finite; check the weights")
    return _Fit(sums[0], sums[1], lack, size)


def _refit(module: Any, reader: Reader, fit: _Fit, path: str, ridge: float) -> tuple[str, int, float, float]:  # noqa: ANN401
    change = fit.solved(ridge)
    n_in = module.weight.shape[reader.input_dim]
    weights = change[:n_in] if reader.input_dim == 0 else change[:n_in].T
    module.weight.add_(weights.to(module.weight))
    if module.bias is not None:
        module.bias.add_(change[n_in].to(module.bias))
    size = max(fit.size, torch.finfo(torch.float64).tiny)
    return path, n_in, fit.lack / size, fit.lack_after(change) / size
