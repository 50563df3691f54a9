"""Compensation: what reads pruned units is re-fitted, so that it hands on nearly what it did in the dense model."""

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from prunekit.calibration import check_tokens, in_batches
from prunekit.discovery.parts import layer_of
from prunekit.discovery.preparing import evaluating
from prunekit.errors import PrunekitError
from prunekit.importance.inputs import Reader, computing_wide, linear_readers
from prunekit.importance.reconstruction import RIDGE, check_ridge, factor
from prunekit.importance.reduction import check_choice
from prunekit.layerwise import Passes
from prunekit.pruning.plans import PruningPlan

FITS = ("weights", "bias", "both")


@dataclass(frozen=True, eq=False)
class _Fit:
    """Least squares of one linear layer, summed up over tokens, of which none counts for more than the median one.

    Attributes:
        gram: XᵀX of the inputs that are left, (n_in, n_in); with a bias, the last input is 1.
        cross: XᵀR, (n_in, n_out), with R what the outputs lack.
        biased: whether there is a bias.
        lack: ‖R‖² before the fit.
        size: ‖Y‖² of the dense outputs.
    """

    gram: Tensor
    cross: Tensor
    biased: bool
    lack: float
    size: float

    def solved(self, ridge: float) -> Tensor:
        """The change of the weights (n_in, n_out) that takes most of R away and stays small; a bias may be any size."""
        if not self.biased:
            return torch.cholesky_solve(self.cross, factor(self.gram, ridge))
        n, inputs, rest = self.gram[-1, -1], self.gram[:-1, -1], self.cross[-1]  # tokens, weighed, and sums over them
        centred = self.gram[:-1, :-1] - torch.outer(inputs, inputs) / n
        rounding = len(inputs) * torch.finfo(self.gram.dtype).eps  # is all that is left of constant inputs
        centred.diagonal().add_(rounding * self.gram.diagonal()[:-1].sum())
        change = torch.cholesky_solve(self.cross[:-1] - torch.outer(inputs, rest) / n, factor(centred, ridge))
        return torch.cat([change, (rest - inputs @ change)[None] / n])

    def constant(self) -> Tensor:
        """The change (n_in, n_out) of the bias alone: the mean of R."""
        change = torch.zeros_like(self.cross)
        change[-1] = self.cross[-1] / self.gram[-1, -1]
        return change

    def lack_after(self, change: Tensor) -> float:
        """‖R‖² once the weights have changed."""
        gained = 2 * (change * self.cross).sum() - (change * (self.gram @ change)).sum()
        return max(self.lack - float(gained), 0.0)


@torch.no_grad()
def compensate(
    small: nn.Module,
    model: nn.Module,
    plan: PruningPlan,
    calib: Tensor,
    *,
    fit: str = "weights",
    ridge: float = RIDGE,
) -> pd.DataFrame:
    """Re-fit every linear layer of a cut model that lost inputs, in the order in which they run.

    A layer with inputs X, in the cut model as re-fitted so far, and outputs Y in the dense model gets the weights
    W + Δ with Δ = (XᵀX + λI)⁻¹ Xᵀ(Y − XW): the least squares of its output error, drawn towards W by the ridge. With a
    bias, X and Y − XW are centred, and the bias takes up their means. A token whose dense output is larger than the
    median token's (of its batch, about 1,024 tokens) counts as if it were as large: else a few with massive
    activations, such as the first of a sequence, would decide for all.

    No gradient is needed. Only sums over tokens are kept, and of each model what stands between two layers. Layers
    with a tied weight and those that do not read each token exactly once, such as experts, are left as they are.

    Args:
        small: what `prune(model, plan)` returned; it is changed.
        model: the dense model.
        plan: by which it was cut; of no whole layers and blocks, behind which others would move, and of no tokens.
        calib: integers (n_samples, seq_len).
        fit: `"weights"`, and the biases that are there; `"bias"`, the mean of Y − XW and nothing else; or `"both"`.
            The last two add a bias where there is none, which most families have no word for: such a checkpoint
            loads with prunekit.
        ridge: λ, as a part of the mean of XᵀX's diagonal; above 0. Not used with `"bias"`.

    Returns:
        One row a layer: module, inputs (left), error_before and error_after (‖Y − XW‖² / ‖Y‖², tokens weighed so).

    Raises:
        PrunekitError: an unknown `fit`, one that adds biases to unmerged adapters, a plan that takes whole layers,
            blocks or tokens or is of another dense model, a ridge that is not above 0 or too small, bad tokens, or
            activations that are not finite; layers done before stay re-fitted.

    Source: least squares as in OSSCAR (Meng et al. 2024) and ZipLM (Kurtic et al. 2023); the bias alone as in FLAP (An
        et al., AAAI 2024). Differs: the targets are the dense model's own outputs at each layer, so that what earlier
        layers lack is made up for too, and massive tokens are held down.
    """
    check_choice("fit", fit, FITS)
    check_ridge(ridge)
    if fit != "weights" and hasattr(small, "peft_config"):
        raise PrunekitError(f"fit={fit!r} would add biases to adapters, which merging drops: merge_and_unload() first")
    kept = _kept_outputs(plan, model)
    tokens = check_tokens(calib, model)
    batches = in_batches(tokens)
    readers = _readers(small, model)
    rows = []
    with evaluating(small), evaluating(model), computing_wide(small), computing_wide(model):
        also = set(_run_once(model, readers, batches[0]))
        paths = [path for path in _run_once(small, readers, batches[0]) if path in also]
        passes = _Passes(small, batches), _Passes(model, batches)
        for path in tqdm(paths, desc="compensate", unit="layer", leave=False, delay=1):
            module, reader = small.get_submodule(path), readers[path]
            biased = fit != "weights" or module.bias is not None
            found = _gather(*passes, path, kept.get((path, 1 - reader.input_dim)), biased, len(batches))
            change = found.constant() if fit == "bias" else found.solved(ridge)
            rows.append(_refit(module, reader, found, change, path))
    return pd.DataFrame(rows, columns=["module", "inputs", "error_before", "error_after"])


def _readers(small: nn.Module, model: nn.Module) -> dict[str, Reader]:
    """Path → how it reads, for the linear layers of their own that lost inputs; they stand where they stood."""
    dense = {name.removesuffix(".weight"): p for name, p in model.named_parameters() if name.endswith(".weight")}
    found = {name.removesuffix(".weight"): reader for name, reader in linear_readers(small).items()}
    weights = dict(small.named_parameters(remove_duplicate=False))
    uses = Counter(map(id, weights.values()))  # a tied weight serves others too, such as embeddings
    return {
        path: reader
        for path, reader in found.items()
        if path in dense
        and uses[id(weight := weights[f"{path}.weight"])] == 1
        and weight.shape[reader.input_dim] < dense[path].shape[reader.input_dim]
    }


def _kept_outputs(plan: PruningPlan, model: nn.Module) -> dict[tuple[str, int], Tensor]:
    """(path, dim of its weight) → the rows that stay, where some go."""
    if not isinstance(plan, PruningPlan):
        raise PrunekitError(f"the plan is a {type(plan).__name__}; give the one that the model was cut by")
    if plan.groups is None:
        raise PrunekitError("the plan was read from a file and carries no groups; make it again with plan(groups, ...)")
    if {name: tuple(p.shape) for name, p in model.named_parameters()} != dict(plan.groups.shapes):
        raise PrunekitError("the plan is of another dense model; the order is compensate(small, model, plan, calib)")
    for name, units in plan.keep.items():
        if plan.groups[name].kind == "vocabulary" and len(units) < plan.n_units[name]:
            raise PrunekitError("the plan takes tokens, and the calibration set has their old numbers: cut those later")
        if not units:  # layers behind it stand elsewhere in the cut model
            raise PrunekitError(
                f"the plan leaves nothing of {name!r}: take whole layers and blocks out first, then cut and compensate "
                "what is left"
            )
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


def _run_once(model: nn.Module, paths: Iterable[str], batch: Tensor) -> list[str]:
    """Of these modules those that read each token of a batch exactly once, in the order in which they run."""
    read: dict[str, list[int]] = {}

    def noting(path: str) -> Callable[..., None]:
        def note(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            (x,) = (*args, *kwargs.values())
            read.setdefault(path, []).append(x.shape[:-1].numel())

        return note

    with ExitStack() as hooks:
        for path in paths:
            module = model.get_submodule(path)
            hooks.callback(module.register_forward_pre_hook(noting(path), with_kwargs=True).remove)
        model(input_ids=batch, use_cache=False)  # type: ignore[operator]
    return [path for path, n_rows in read.items() if n_rows == [batch.numel()]]


class _Passes(Passes):
    """The same, looking at one linear layer."""

    def at(self, path: str, batch: int) -> tuple[Tensor, Tensor]:
        """What a linear layer reads and returns for a batch, (n_tokens, n_in) and (n_tokens, n_out)."""
        seen: list[tuple[Tensor, Tensor]] = []

        def note(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], result: Tensor) -> None:
            (x,) = (*args, *kwargs.values())
            seen.append((x.flatten(0, -2), result.flatten(0, -2)))

        hook = self._model.get_submodule(path).register_forward_hook(note, with_kwargs=True)
        try:
            self.run(layer_of(path, set(self.layers)), batch)
        finally:
            hook.remove()
        return seen[0]


def _gather(small: _Passes, dense: _Passes, path: str, kept: Tensor | None, biased: bool, n_batches: int) -> _Fit:
    """Least squares of one layer; with a bias it reads one input more, which is 1."""
    sums: list[Tensor] = []
    lack = size = 0.0
    for batch in range(n_batches):
        (x, got), (_, wanted) = small.at(path, batch), dense.at(path, batch)
        wanted = wanted if kept is None else wanted[:, kept.to(wanted.device)]
        if got.shape != wanted.shape:
            raise PrunekitError(f"{path} gives {tuple(got.shape)} in the cut model, {tuple(wanted.shape)} in the dense")
        x, rest, wanted = x.double(), (wanted - got).double(), wanted.double()
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1) if biased else x
        x, rest, wanted = (t * _token_weights(wanted) for t in (x, rest, wanted))
        news = [x.T @ x, x.T @ rest]
        sums = [old + new for old, new in zip(sums, news, strict=True)] if sums else news
        lack, size = lack + float(rest.square().sum()), size + float(wanted.square().sum())
    if not all(bool(total.isfinite().all()) for total in sums):
        raise PrunekitError(f"what {path} reads is not finite; check the weights")
    return _Fit(sums[0], sums[1], biased, lack, size)


def _token_weights(wanted: Tensor) -> Tensor:
    """What the rows of tokens are multiplied by, (n_tokens, 1): large outputs count as the median one."""
    sizes = wanted.norm(dim=1, keepdim=True)
    median = sizes.median().clamp_min(torch.finfo(sizes.dtype).tiny)
    return median / sizes.clamp_min(median)


def _refit(module: Any, reader: Reader, fit: _Fit, change: Tensor, path: str) -> tuple[str, int, float, float]:  # noqa: ANN401
    n_in = module.weight.shape[reader.input_dim]
    weights = change[:n_in] if reader.input_dim == 0 else change[:n_in].T
    module.weight.add_(weights.to(module.weight))
    if len(change) > n_in:
        if module.bias is None:
            module.bias = nn.Parameter(module.weight.new_zeros(change.shape[1]), module.weight.requires_grad)
        module.bias.add_(change[n_in].to(module.bias))
    size = max(fit.size, torch.finfo(torch.float64).tiny)
    return path, n_in, fit.lack / size, fit.lack_after(change) / size
