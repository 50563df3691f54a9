"""Block reconstruction: trains the layers of a cut model one after another to give the dense layers' outputs."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from prunekit.calibration import check_finite, check_tokens, mean_loss
from prunekit.checks import Count, Model, Positive, Seed, checked
from prunekit.discovery.parts import uses_of
from prunekit.errors import PrunekitError
from prunekit.importance.input_statistics import wide
from prunekit.layerwise import Layerwise
from prunekit.models import evaluating
from prunekit.pruning.compensation import groups_of, split_windows
from prunekit.pruning.plans import PruningPlan
from prunekit.recovery.training import relative_error
from prunekit.sparsity.patterns import quantised
from prunekit.sparsity.zero_masks import TRAINED, keep_zeros, renew_report

MEASURES = 8  # of the held-out error while a layer is trained
WARMUP = 0.05  # share of the steps in which the learning rate rises


@checked
def reconstruct(
    small: Model,
    model: Model,
    plan: PruningPlan,
    calib: Tensor,
    *,
    steps: Count = 200,
    learning_rate: Positive = 3e-4,
    batch_size: Count = 8,
    seed: Seed = 0,
) -> pd.DataFrame:
    """Trains the layers of a cut model one after another, so that each gives the dense layer's outputs.

    A layer's input is the residual stream of the cut model behind the layers that were trained before it; its target
    is the dense model's stream behind the same layer. All weights of the layer are trained at once with AdamW, so it
    makes up for what the cut changed inside it and before it. It is the step between least squares on one matrix
    (`compensate`) and training the whole model (`recover`); no logits are needed, and memory holds the gradients of
    one layer.

    Every fourth window is held out (of two or three, the last). A layer keeps the weights with the smallest error
    on these, and its old ones where none is smaller. If the loss on held-out windows is higher after all layers than
    before, every layer keeps its old weights.

    Training runs on a copy, in float32 where the weights are in half precision, and `small` changes at the very end:
    an interrupt or an error leaves it as it was. Dropout is off, zeros of weight matrices stay zero, and random
    numbers of the caller are not disturbed.

    Args:
        small: what `prune(model, plan)` returned, re-fitted or not; it is changed.
        model: the dense model.
        plan: by which it was cut; of no tokens and no hidden channels. Where it takes out whole layers, the layer
            before them also learns what they did.
        calib: integers (n_samples, seq_len), at least two windows.
        steps: optimiser steps of each layer.
        learning_rate: its maximum; it rises over a twentieth of the steps and falls to 0.
        batch_size: windows a step.
        seed: of the order of the batches.

    Returns:
        One row per layer: module, error_before, error_after (‖Y − Y_dense‖² / ‖Y_dense‖² of its outputs on held-out
        tokens, each token by itself, then the mean; before its own training, the layers below it trained) and steps
        (behind which its weights were kept; 0 where it has its old ones). Its `attrs["loss"]` are the loss on held-out
        windows before and after. `small.reconstruction` is the same table.

    Raises:
        PrunekitError: a plan that takes tokens or hidden channels or is of another dense model, layers that are not a
            chain or are not those of the plan, a model with adapters or a quantised one, a single window, bad tokens,
            or weights or activations that are not finite.

    Source: layer-wise reconstruction as in BRECQ (Li et al., ICLR 2021), there for quantisation. Differs: the input is
        the cut model's own, each token counts alike whatever its size, and held-out tokens choose the step. (Gained
        nothing over the re-fit on SmolLM2-135M cut by 20%, with 8,192 tokens and 48 steps: perplexity 82.3
        before, 82.9 after, 81.5 without the last layer's training. There, rates of 1e-4 and 1e-3 left larger errors of
        the first three layers than 3e-4; the dense model's stream as input gained a third as much in ten layers.)
    """
    _check_models(small, model)
    removed = _removed_layers(plan, model)
    tokens = check_tokens(calib, model)
    fit, held = split_windows(tokens)
    if held is None:
        raise PrunekitError("calib is a single window, and one has to be held out; give two or more")
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False), torch.no_grad(), evaluating(model):
        before, worker = mean_loss(small, held), _trainable_copy(small)
        rows = [
            _train(task, steps, learning_rate, generator)
            for task in _tasks(worker, model, removed, fit.split(batch_size), held.split(batch_size))
        ]
        table = pd.DataFrame(rows, columns=["module", "error_before", "error_after", "steps"])
        _cast_like(worker, small)
        after = mean_loss(worker, held)
    table.attrs["loss"] = (before, after)
    if after <= before:
        _take_over(small, worker)
        renew_report(small, TRAINED)
    else:
        table = table.assign(error_after=table["error_before"], steps=0)
    small.reconstruction = table
    return table


class _Task(NamedTuple):
    """A layer to train.

    Attributes:
        path: of the layer.
        layer: the module.
        parameters: that it alone has.
        outputs: batch → its outputs (batch, seq, d_model).
        targets: the dense outputs of each batch.
        n_fit: batches to train on; the rest are held out.
    """

    path: str
    layer: nn.Module
    parameters: list[nn.Parameter]
    outputs: Callable[[int], Tensor]
    targets: list[Tensor]
    n_fit: int

    def error(self, batch: int) -> Tensor:
        """‖Y − Y_dense‖² / ‖Y_dense‖² of each token, their mean."""
        target = self.targets[batch]
        return relative_error(self.outputs(batch).to(target.dtype), target)

    def held_out_error(self) -> float:
        """The mean error on held-out tokens."""
        held = range(self.n_fit, len(self.targets))
        n_tokens = [self.targets[batch][..., 0].numel() for batch in held]
        total = sum(float(self.error(batch)) * n for batch, n in zip(held, n_tokens, strict=True))
        return total / sum(n_tokens)


def _tasks(
    worker: nn.Module, model: nn.Module, removed: list[str], fit: Sequence[Tensor], held: Sequence[Tensor]
) -> Iterator[_Task]:
    """The layers in order; each must be trained before the next one is asked for."""
    batches = [*fit, *held]
    dense, cut = Layerwise.of(model, batches), Layerwise.of(worker, batches)
    if dense is None or cut is None:
        raise PrunekitError(
            f"the layers of this {type(model).__name__} are not a chain, in which each reads the output of the one "
            "before and nothing else of it; use compensate(small, model, plan, calib), or recover(...)"
        )
    stay = [number for number, path in enumerate(dense.layers) if path not in removed]
    if len(stay) != len(cut.layers):
        raise PrunekitError(
            f"the cut model has {len(cut.layers)} layers, and the plan leaves {len(stay)}; give what "
            "prune(model, plan) returned, and that plan"
        )
    everywhere = uses_of(worker)
    for number, path in enumerate(tqdm(cut.layers, desc="reconstruct", unit="layer", leave=False, delay=1)):
        end = stay[number + 1] if number + 1 < len(stay) else len(dense.layers)
        layer = worker.get_submodule(path)
        inside = uses_of(layer)
        own = [p for p in layer.parameters() if p.is_floating_point() and inside[id(p)] == everywhere[id(p)]]
        cut.streams(number)
        yield _Task(path, layer, own, partial(cut.run, number), [wide(y) for y in dense.streams(end)], len(fit))


def _train(task: _Task, steps: int, learning_rate: float, generator: torch.Generator) -> tuple[str, float, float, int]:
    """Train a layer, and leave it the weights with the smallest held-out error: path, error before and after, step.

    Raises:
        PrunekitError: the outputs are not finite before the training; weights whose outputs are not are never kept.
    """
    before = best = task.held_out_error()
    if not math.isfinite(before):
        raise PrunekitError(f"the outputs of {task.path} are not finite: load the model in float32 or bfloat16")
    kept, at, order = [p.clone() for p in task.parameters], 0, list[int]()
    every = math.ceil(steps / MEASURES)
    if not task.parameters:
        return task.path, before, before, 0
    for parameter in task.parameters:
        parameter.requires_grad_(True)
    with keep_zeros(task.layer):
        optimizer = torch.optim.AdamW(task.parameters, weight_decay=0.0)
        for step in range(steps):
            order = order or torch.randperm(task.n_fit, generator=generator).tolist()
            optimizer.param_groups[0]["lr"] = learning_rate * _rate(step, steps)
            with torch.enable_grad():
                optimizer.zero_grad()
                task.error(order.pop()).backward()
            optimizer.step()
            if (step + 1) % every and step + 1 < steps:
                continue
            error = task.held_out_error()
            if error < best:
                best, at, kept = error, step + 1, [p.clone() for p in task.parameters]
        for parameter, value in zip(task.parameters, kept, strict=True):
            parameter.copy_(value)
            parameter.grad = None  # of this layer alone, to save memory
    return task.path, before, best, at


def _rate(step: int, steps: int) -> float:
    """Learning rate of a step, as a part of its maximum: it rises, then falls along a half cosine."""
    rising = min(1.0, (step + 1) / max(1.0, WARMUP * steps))
    return rising * (1 + math.cos(math.pi * step / steps)) / 2


def _check_models(small: nn.Module, model: nn.Module) -> None:
    if small is model:
        raise PrunekitError("small is model itself; give what prune(model, plan) returned, and the dense model")
    for each in (small, model):
        if hasattr(each, "peft_config"):
            raise PrunekitError("the model has adapters; call merge_and_unload() on it first")
        how = quantised(each)
        if how is not None:
            raise PrunekitError(
                f"the model is quantised ({how}), and its weights cannot be trained: give full precision"
            )
        check_finite(each)


def _removed_layers(plan: PruningPlan, model: nn.Module) -> list[str]:
    """Paths of the layers that a plan takes out."""
    groups_of(plan, model, "the order is reconstruct(small, model, plan, calib)")
    if plan.takes_tokens:
        raise PrunekitError(
            "the plan removes tokens, but calib has the old token ids: reconstruct first, then cut the vocabulary"
        )
    for name in plan.cut_groups("hidden"):
        raise PrunekitError(
            f"the plan removes hidden channels ({name!r}), and the layers of both models must have outputs of one "
            "width: reconstruct first, then cut these; or train the whole model with recover(...)"
        )
    return plan.removed_layers


def _trainable_copy(small: nn.Module) -> nn.Module:
    """A copy in evaluation mode, without gradients, its half-precision weights in float32."""
    worker = copy.deepcopy(small).eval().requires_grad_(False)
    for tensor in (*worker.parameters(), *worker.buffers()):
        if tensor.is_floating_point():
            tensor.data = wide(tensor.data)
    return worker


def _cast_like(worker: nn.Module, small: nn.Module) -> None:
    """Round the weights to the precision of the cut model's."""
    pairs = zip((*worker.parameters(), *worker.buffers()), (*small.parameters(), *small.buffers()), strict=True)
    for trained, old in pairs:
        trained.data = trained.data.to(old.dtype)


def _take_over(small: nn.Module, worker: nn.Module) -> None:
    """Copy the trained weights into the cut model."""
    for parameter, trained in zip(small.parameters(), worker.parameters(), strict=True):
        if not torch.equal(parameter, trained):
            parameter.data.copy_(trained)
