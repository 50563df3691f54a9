"""Compensation: re-fits the consumer layers of pruned units by least squares."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from prunekit.calibration import check_tokens, mean_loss
from prunekit.checks import Model, Positive, check_choice, checked
from prunekit.discovery import Groups, discover
from prunekit.errors import PrunekitError
from prunekit.importance.input_statistics import Reader, in_portions, linear_readers, sums_over_inputs, wide
from prunekit.models import evaluating
from prunekit.pruning.describing import describe
from prunekit.pruning.least_squares import choose, fit_sums
from prunekit.pruning.plans import PruningPlan
from prunekit.pruning.removal import remaining

FITS = ("weights", "bias", "both")


@checked
@torch.no_grad()
def compensate(
    small: Model,
    model: Model,
    plan: PruningPlan,
    calib: Tensor,
    *,
    fit: str = "weights",
    ridge: Positive | None = None,
) -> pd.DataFrame:
    """Re-fits every linear layer of a cut model that lost inputs, by least squares.

    In the dense model a layer reads the inputs X that stay and the inputs X_p that were pruned, and returns
    XW + X_pW_p. The re-fitted weights are W + Δ with Δ = (XᵀX + λD)⁻¹ XᵀX_pW_p, D the diagonal of XᵀX: what the pruned
    inputs added is predicted from those that stay, by least squares, and the ridge draws Δ towards 0. With a bias, X
    and X_pW_p are centred, and the bias takes up their means. A token with larger inputs than the median one (of its
    batch, about 1,024 tokens) counts as if they were as large: else a few with massive activations would decide for
    all.

    By default every fourth window is held out. For each layer λ is the one of `least_squares.RIDGES` whose fit on the
    other windows leaves the smallest error on these; the layer is then fitted on all. A layer whose held-out error does
    not fall keeps its weights. Where the loss on held-out windows is higher after all layers than before, every layer
    does.

    It takes one forward pass of the dense model, no gradient, and only sums over tokens are kept. Layers with a tied
    weight and those that do not read each token exactly once, such as experts, are left as they are.

    Args:
        small: what `prune(model, plan)` returned; it is changed.
        model: the dense model.
        plan: by which it was cut; of no whole layers and blocks, behind which others would move, and of no tokens.
        calib: integers (n_samples, seq_len).
        fit: `"weights"`, and the biases that are there; `"bias"`, the mean of X_pW_p and nothing else; or `"both"`.
            The last two add a missing bias, which most configurations cannot express: such a checkpoint
            loads with prunekit.
        ridge: λ, above 0, for all layers, whatever it does to held-out tokens; None chooses it, or takes
            `curvature.RIDGE` where there is one window only. Not used with `"bias"`.

    Returns:
        One row per layer: module, inputs (left), ridge (NaN where the layer kept its weights), error_before and
        error_after (‖X_pW_p − XΔ‖² / ‖XW + X_pW_p‖², tokens weighed so; on held-out tokens where the ridge was chosen).
        Its `attrs["loss"]` are the loss on held-out windows before and after, where they judged. `small.compensation`
        is the same table.

    Raises:
        PrunekitError: an unknown `fit`, one that adds biases to unmerged adapters, a plan that takes whole layers,
            blocks or tokens or is of another dense model, a ridge that is not above 0 or too small, bad tokens, or
            activations that are not finite.

    Source: least squares as in OSSCAR (Meng et al. 2024) and ZipLM (Kurtic et al. 2023); the bias alone as in FLAP (An
        et al., AAAI 2024). Differs: the ridge is relative to each input and chosen on held-out tokens; massive tokens
        are held down. Inputs are those of the dense model. (Fitting the cut model's own inputs to the dense outputs,
        layer after layer, gained a third as much on SmolLM2-135M and took twice as long.)
    """
    check_choice("fit", fit, FITS)
    if small is model:
        raise PrunekitError("small is model itself; give what prune(model, plan) returned, and the dense model")
    if fit != "weights" and hasattr(small, "peft_config"):
        raise PrunekitError(f"fit={fit!r} would add biases to adapters, which merging drops: merge_and_unload() first")
    kept = _kept(plan, model)
    tokens = check_tokens(calib, model)
    learnt, held = split_windows(tokens) if ridge is None else (tokens, None)
    before = None if held is None else mean_loss(small, held)
    rows, old = [], SavedWeights(small)
    lost = _readers(small, model)
    with evaluating(model):
        once = _run_once(model, lost, learnt[:1])
    for portion in in_portions({path: _gram_bytes(lost[path]) for path in once}):
        readers = {path: lost[path] for path in portion}
        sums = _grams(model, readers, learnt), None if held is None else _grams(model, readers, held)
        for path in tqdm(readers, desc="compensate", unit="layer", leave=False, delay=1):
            module: Any = small.get_submodule(path)
            biased = fit != "weights" or module.bias is not None
            dense = oriented(model.get_submodule(path), readers[path])
            left = kept.get((path, readers[path].input_dim)), kept.get((path, 1 - readers[path].input_dim))
            found, judge = (None if gram is None else fit_sums(gram[path], dense, *left, biased) for gram in sums)
            assert found is not None
            choice = choose(found, judge, fit, ridge)
            if choice.change is not None:
                old.change(path, partial(refit_layer, reader=readers[path], change=choice.change))
            rows.append((path, module.weight.shape[readers[path].input_dim], *choice[1:]))
    small.compensation = table = judged(rows, small, old, before, held)  # type: ignore[assignment]
    if fit != "weights":
        describe(small)  # biases came
    return table


def split_windows(tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """Windows for the fit, and held-out windows: every fourth, or the last of two or three; none of a single one."""
    n = len(tokens)
    if n == 1:
        return tokens, None
    held = torch.zeros(n, dtype=torch.bool)
    held[3::4] = True
    held[-1] |= n < 4
    return tokens[~held], tokens[held]


def _readers(small: nn.Module, model: nn.Module) -> dict[str, Reader]:
    """Path → linear layer, for the layers that lost inputs."""
    dense = {name.removesuffix(".weight"): reader for name, reader in linear_readers(model).items()}
    shapes = {name.removesuffix(".weight"): p.shape for name, p in model.named_parameters()}
    weights = dict(small.named_parameters(remove_duplicate=False))
    uses = Counter(map(id, weights.values()))  # a tied weight serves others too, such as embeddings
    return {
        path: dense[path]
        for path in (name.removesuffix(".weight") for name in linear_readers(small))
        if path in dense
        and uses[id(weight := weights[f"{path}.weight"])] == 1
        and weight.shape[dense[path].input_dim] < shapes[path][dense[path].input_dim]
    }


def _run_once(model: nn.Module, paths: Iterable[str], batch: Tensor) -> list[str]:
    """The modules that see each token of a batch exactly once, in the order in which they run."""
    read: dict[str, list[int]] = {}

    def note(path: str, _module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        (x,) = (*args, *kwargs.values())
        read.setdefault(path, []).append(x.shape[:-1].numel())

    with ExitStack() as hooks:
        for path in paths:
            module = model.get_submodule(path)
            hooks.callback(module.register_forward_pre_hook(partial(note, path), with_kwargs=True).remove)
        model(input_ids=batch, use_cache=False)  # type: ignore[operator]
    return [path for path, n_rows in read.items() if n_rows == [batch.numel()]]


def _gram_bytes(reader: Reader) -> int:
    """Bytes of a layer's sums, for the fit and the held-out windows."""
    module: Any = reader.modules[0]
    return 16 * module.weight.shape[reader.input_dim] ** 2


def _grams(model: nn.Module, readers: Mapping[str, Reader], tokens: Tensor) -> dict[str, Tensor]:
    """Path → ZᵀZ (n_in + 1, n_in + 1); Z: inputs and a column of ones, each row scaled by its token weight."""

    def measure(x: Tensor) -> Tensor:
        z = torch.cat([x, torch.ones_like(x[:, :1])], 1) * token_weights(x)
        return z.T @ z

    return sums_over_inputs(model, tokens, readers, measure)


def token_weights(x: Tensor) -> Tensor:
    """Weights of tokens, (n_tokens, 1), which reduce large ones to the median size."""
    sizes = x.norm(dim=1, keepdim=True)
    median = sizes.median().clamp_min(torch.finfo(sizes.dtype).tiny)
    return median / sizes.clamp_min(median)


def oriented(module: Any, reader: Reader) -> Tensor:
    """A layer's weights, float64 (n_in, n_out)."""
    weight = wide(module.weight.detach()).double()
    return weight if reader.input_dim == 0 else weight.T


def judged(
    rows: list[tuple[Any, ...]], small: nn.Module, old: "SavedWeights", before: float | None, held: Tensor | None
) -> pd.DataFrame:
    """The table with the losses; if the loss on held-out windows rose, the layers get their old weights back."""
    table = pd.DataFrame(rows, columns=["module", "inputs", "ridge", "error_before", "error_after"])
    if before is None or held is None:
        return table
    after = mean_loss(small, held)
    if not after <= before:
        old.give_back()
        table = table.assign(ridge=math.nan, error_after=table["error_before"])
    table.attrs["loss"] = (before, after)
    return table


class SavedWeights:
    """Saved weights and biases of layers."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._held: dict[str, tuple[Tensor, Tensor | None]] = {}

    def change(self, path: str, change: Callable[[Any], None]) -> None:
        """Save a layer's weights, and change the layer; where that is refused, all saved weights are restored.

        Raises:
            PrunekitError: what `change` raises.
        """
        module: Any = self._model.get_submodule(path)
        self._held[path] = (module.weight.detach().clone(), None if module.bias is None else module.bias.clone())
        try:
            change(module)
        except PrunekitError:
            self.give_back()
            raise

    def give_back(self) -> None:
        """Restore the saved weights; an added bias is removed."""
        for path, (weight, bias) in self._held.items():
            module: Any = self._model.get_submodule(path)
            module.weight.copy_(weight)
            if bias is None:
                module.bias = None
            else:
                module.bias.copy_(bias)


def groups_of(plan: PruningPlan, model: nn.Module, advice: str) -> Groups:
    """The groups of the dense model that a plan is of.

    Raises:
        PrunekitError: the plan is of another model; ends with the advice.
    """
    groups = discover(model) if plan.groups is None else plan.groups  # a plan that was read from a file has none
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if shapes != dict(groups.shapes) or any(name not in groups for name in plan.keep):
        raise PrunekitError(f"the plan is of another dense model; {advice}")
    return groups


def _kept(plan: PruningPlan, model: nn.Module) -> dict[tuple[str, int], Tensor]:
    """(path, dim of its weight) → the indices that stay, where some go."""
    groups = groups_of(plan, model, "the order is compensate(small, model, plan, calib)")
    if plan.takes_tokens:
        raise PrunekitError(
            "the plan removes tokens, but calib has the old token ids: re-fit first, then cut the vocabulary"
        )
    for name in (name for name, units in plan.keep.items() if not units):  # layers behind it stand elsewhere then
        raise PrunekitError(
            f"the plan leaves nothing of {name!r}: take whole layers and blocks out first, then cut and compensate "
            "what is left, as prune(model, plan, compensate=calib) does"
        )
    gone: dict[tuple[str, int], list[Tensor]] = {}
    for name in plan.keep:
        for member in groups[name].members:
            place = (member.parameter.removesuffix(".weight"), member.dim)
            gone.setdefault(place, []).append(member.owned_by(plan.removed(name)))
    sizes = {name.removesuffix(".weight"): shape for name, shape in groups.shapes.items()}
    return {(path, dim): remaining(sizes[path][dim], torch.cat(indices)) for (path, dim), indices in gone.items()}


def refit_layer(module: Any, reader: Reader, change: Tensor) -> None:
    """Change a layer's weights, and its bias where the change has a row for it.

    Raises:
        PrunekitError: the changed weights are not finite; nothing is changed then.
    """
    n_in = module.weight.shape[reader.input_dim]
    weights = change[:n_in] if reader.input_dim == 0 else change[:n_in].T
    fitted = module.weight + weights.to(module.weight)
    if not bool(fitted.isfinite().all()):
        raise PrunekitError(
            f"the re-fitted weights are not finite in {fitted.dtype}; give a larger ridge, or a model in float32"
        )
    module.weight.copy_(fitted)
    if len(change) > n_in:
        if module.bias is None:
            module.bias = nn.Parameter(module.weight.new_zeros(change.shape[1]), module.weight.requires_grad)
        module.bias.add_(change[n_in].to(module.bias))
