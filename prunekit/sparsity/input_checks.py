"""Checks that a model can be sparsified, before anything is computed."""

from typing import Any

from torch import nn

from prunekit.calibration import check_finite
from prunekit.errors import PrunekitError

_QUANTISED = ("torch.ao.nn.", "bitsandbytes.", "torchao.", "auto_gptq.", "awq.", "optimum.quanto")


def check_sparsifiable(model: Any) -> None:
    """Raise an error if a model is not a causal LM, is quantised, has adapters, or has non-finite weights.

    Raises:
        PrunekitError: the model cannot be sparsified; the message says why.
    """
    if not isinstance(model, nn.Module):
        raise PrunekitError(f"model is a {type(model).__name__}; give a causal LM, such as load(path) returns")
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
    """How a model is quantised; None where it is not."""
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
