"""Keeps zeros during training, and updates sparsity reports from the weights."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from prunekit.compat import lora_inputs
from prunekit.errors import PrunekitError
from prunekit.sparsity.sparsity_report import SparsityReport

TRAINED = "the model was trained after it was sparsified; the output errors and the loss are older"
Masks = dict[nn.Parameter, Tensor]


@contextmanager
def keep_zeros(model: nn.Module) -> Iterator[None]:
    """For training loops of your own: while open, zeros get no gradient, and at the end they are zero again.

    Example::

        with keep_zeros(model):
            optimizer = torch.optim.AdamW(model.parameters())  # made inside
            for batch in batches:
                model(input_ids=batch, labels=batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    Zeros get no gradient and are set to zero again at the end. Make the optimiser inside: one made before may have
    momentum that moves zero weights during training, and the other weights would adapt to that.

    Args:
        model: without adapters. Every parameter of two or more dimensions counts, embeddings too, wherever it is zero;
            norms and biases do not. Parameters may move to another device meanwhile, but stay the same objects.

    Raises:
        PrunekitError: the model has adapters, whose zeros must be trained.

    Source: training under a fixed mask, as Han et al. (NeurIPS 2015) do. Differs: the mask is applied to
        gradients at each step and to weights at the end.
    """
    if any(hasattr(module, "merged_adapters") for module in model.modules()):  # as all of peft's layers have
        raise PrunekitError("the model carries adapters, which start from zeros; open masked_adapters(model) instead")
    masks = _masks(model)
    with ExitStack() as stack:
        stack.callback(_apply, masks)
        for parameter in masks:
            if parameter.grad is not None:  # it would give an optimiser made inside momentum
                parameter.grad.masked_fill_(masks[parameter].to(parameter.grad.device), 0)
            stack.callback(_without_gradient(parameter, masks).remove)
        yield


def share_of_zeros(model: nn.Module) -> float:
    """Fraction of zeros among the weights of a model's matrices."""
    matrices = [p.detach() for p in model.parameters() if p.dim() > 1]
    return sum(int((p == 0).sum()) for p in matrices) / max(sum(p.numel() for p in matrices), 1)


def _masks(model: nn.Module) -> Masks:
    """Matrices with zeros → mask of the zeros."""
    matrices = [p for p in model.parameters() if p.dim() > 1 and p.is_floating_point()]
    found = {p: p.detach() == 0 for p in matrices}
    return {p: mask for p, mask in found.items() if bool(mask.any())}


@torch.no_grad()
def _apply(masks: Masks) -> None:
    for parameter, mask in masks.items():
        parameter.masked_fill_(mask.to(parameter.device), 0)


def _without_gradient(parameter: nn.Parameter, masks: Masks) -> RemovableHandle:
    def mask(gradient: Tensor) -> Tensor:
        masks[parameter] = masks[parameter].to(gradient.device)  # a Trainer moves the model after this was opened
        return gradient.masked_fill(masks[parameter], 0)

    trained = parameter.requires_grad
    parameter.requires_grad_(True)  # a hook needs it; training may unfreeze it later
    handle = parameter.register_hook(mask)
    parameter.requires_grad_(trained)
    return handle


@contextmanager
def masked_adapters(adapted: nn.Module) -> Iterator[None]:
    """A context in which LoRA trains and merges only non-zero weights: W + M⊙(γ·B·A), M the non-zeros of W.

    A merge inside equals the trained function up to rounding. Each step computes B·A for each adapted matrix with
    zeros, which needs the memory of that matrix once more. Adapters of other matrices are unchanged.

    Args:
        adapted: a peft model with one plain LoRA adapter on linear modules (nn.Linear, GPT-2's Conv1D), not merged.

    Raises:
        PrunekitError: no LoRA; or one whose update is not γ·B·A alone, such as DoRA, one of several adapters, or one of
            an embedding or of a quantised weight; or a matrix with zeros that is trained itself.

    Source: the update is that of SQFT's SparsePEFT (Muñoz et al., arXiv 2410.03750). SPP (Lu et al., ICML 2024), which
        scales non-zero weights instead, is another. Computing M from the frozen weight at each step is ours.
    """
    layers = _adapted_layers(adapted)
    _check_nothing_else(adapted, layers)
    with ExitStack() as stack:
        for path, layer in layers.items():
            if bool((layer.get_base_layer().weight == 0).any()):
                for name, method in _masked_methods(path, layer).items():
                    setattr(layer, name, method)
                    stack.callback(delattr, layer, name)
        yield


def _adapted_layers(adapted: nn.Module) -> dict[str, Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer  # seconds to import, so only where it is used

    layers = {path: module for path, module in adapted.named_modules() if isinstance(module, BaseTunerLayer)}
    if not layers:
        raise PrunekitError("the model carries no LoRA: attach it first, with recovery.lora.attach or peft")
    for path, layer in layers.items():
        plain_lora_weight(path, layer)
    return layers


def plain_lora_weight(path: str, layer: Any) -> nn.Parameter:
    """The weight that an adapter layer updates by γ·B·A alone.

    Raises:
        PrunekitError: the layer has another kind of update; the message names it.
    """
    from peft.tuners.lora import Linear
    from transformers.pytorch_utils import Conv1D

    base = layer.get_base_layer()
    other = [kind for kind in ("lora_magnitude_vector", "lora_variant") if len(getattr(layer, kind, ()))]
    other += ["lora_bias"] if any(getattr(layer, "lora_bias", {}).values()) else []
    other += [f"a {type(base).__name__}"] if not isinstance(base, nn.Linear | Conv1D) else []
    other += [f"a {type(layer).__module__}.{type(layer).__name__}"] if type(layer) is not Linear else []
    other += [] if other or base.weight.is_floating_point() else [f"a weight of {base.weight.dtype}"]
    adapters = list(getattr(layer, "lora_A", ()))
    if len(adapters) != 1 or list(layer.active_adapters) != adapters or layer.merged_adapters or other:
        has = ", ".join(other) or f"adapters {adapters}, active {layer.active_adapters}, merged {layer.merged_adapters}"
        raise PrunekitError(f"{path} has {has}; give one plain LoRA adapter per linear module, not merged")
    return base.weight


def _check_nothing_else(adapted: nn.Module, layers: Mapping[str, Any]) -> None:
    """Raise an error for trained matrices with zeros besides A and B."""
    pairs = {p for layer in layers.values() for part in (layer.lora_A, layer.lora_B) for p in part.parameters()}
    for name, p in adapted.named_parameters():
        if p.requires_grad and p not in pairs and p.dim() > 1 and bool((p == 0).any()):
            raise PrunekitError(f"{name} is trained itself and loses its zeros; attach LoRA without modules_to_save")


def _masked_methods(path: str, layer: Any) -> dict[str, Callable]:
    """A LoRA layer's `forward` and `get_delta_weight`, by which peft merges, with the mask."""
    forward, whole, (adapter,) = layer.forward, layer.get_delta_weight, layer.lora_A

    def update(_adapter: str) -> Tensor:
        """M⊙(γ·B·A), stored as the weight is."""
        return whole(adapter).masked_fill(layer.get_base_layer().weight == 0, 0)

    def masked(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if layer.disable_adapters or layer.merged:
            return forward(x, *args, **kwargs)
        if layer.active_adapters != [adapter] or "adapter_names" in kwargs:
            raise PrunekitError(
                f"{path}: another adapter was requested while adapters are masked; use one adapter at a time"
            )
        result = layer.base_layer(x, *args, **kwargs)
        stored = update(adapter)
        weight = stored.T if layer.fan_in_fan_out else stored  # (out, in)
        inputs = layer.lora_dropout[adapter](lora_inputs(layer, x, weight.dtype))
        return (result + functional.linear(inputs, weight)).to(result.dtype)

    return {"forward": masked, "get_delta_weight": update}


def current_report(model: Any) -> SparsityReport | None:
    """The sparsity report of a model, updated from its weights.

    Returns:
        The report, its zeros counted again, with a remark if there are fewer; None if the model has no
        report, or its matrices no longer fit, as after structural pruning.

    Raises:
        PrunekitError: `model.sparsity_report` is not a report.
    """
    report = getattr(model, "sparsity_report", None)
    if report is None:
        return None
    if not isinstance(report, SparsityReport):
        raise PrunekitError(f"model.sparsity_report is a {type(report).__name__}; sparsify sets it, and so does load")
    matrices = _matrices_of(report, model)
    if matrices is None:
        return None
    counts = [int((matrix == 0).sum()) for matrix in matrices]
    rows = tuple({**row, "n_zeros": count} for row, count in zip(report.rows, counts, strict=True))
    lost = {row["matrix"]: row["n_zeros"] - n for row, n in zip(report.rows, counts, strict=True) if n < row["n_zeros"]}
    if not lost:
        return replace(report, rows=rows)
    remark = (
        f"{sum(lost.values()):,} zeros of {len(lost)} matrices ({next(iter(lost))}, …) were filled after "
        "sparsification; this report counts the remaining zeros"
    )
    return replace(report, rows=rows, remarks=(*report.remarks, remark))


def renew_report(model: Any, *remarks: str) -> None:
    """Update a model's report after its weights changed, and add remarks; delete it if it no longer fits.

    Raises:
        PrunekitError: what `current_report` raises.
    """
    report = current_report(model)
    if report is None:
        vars(model).pop("sparsity_report", None)
    else:
        more = [remark for remark in remarks if remark not in report.remarks]
        model.sparsity_report = replace(report, remarks=(*report.remarks, *more))


def _matrices_of(report: SparsityReport, model: nn.Module) -> list[Tensor] | None:
    """The weight of each row: a parameter, or one expert's slice of it; None if one is missing or of another size."""
    parameters, found = dict(model.named_parameters(remove_duplicate=False)), []
    for row in report.rows:
        name, expert = re.fullmatch(r"(.*?)(?:\[(\d+)\])?", row["matrix"], re.DOTALL).groups()  # type: ignore[union-attr]
        tensor: Any = parameters.get(name)
        if tensor is not None and expert is not None:
            tensor = tensor[int(expert)] if tensor.dim() == 3 and int(expert) < len(tensor) else None
        if tensor is None or tensor.numel() != row["n_weights"]:
            return None
        found.append(tensor)
    return found


def parsed_report(text: str, model: nn.Module) -> SparsityReport:
    """The report of a model from the JSON text stored with its weights.

    Raises:
        PrunekitError: the text is not a report, or is of another model.
    """
    report = SparsityReport.from_json(text)
    if not report.rows:
        raise PrunekitError("it lists no matrix; give what SparsityReport.to_json wrote")
    if _matrices_of(report, model) is None:
        raise PrunekitError(
            "the report lists matrices that this model does not have, or not of that size; give this model's report"
        )
    return report
