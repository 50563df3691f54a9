"""Private names of torch, transformers, peft and optuna that prunekit relies on, in one place.

A release of one of these libraries may change them; `tests/test_compat.py` has a test for each, which says what breaks
then. `_parameters`, `_modules` and `_forward_pre_hooks` of a torch module are left where they are used: they are
in every saved pickle of a module, so torch keeps them.
"""

import inspect
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["TorchDispatchMode", "tree_leaves"]  # and what stands below

EXPERTS_IMPLEMENTATION = "_experts_implementation_internal"  # attributes of a transformers configuration
ATTENTION_IMPLEMENTATION = "_attn_implementation_internal"
INITIALISED = "_is_hf_initialized"  # attribute of a parameter: transformers leaves its values as they are
TRANSPOSED_EXPERTS = "is_transposed"  # attribute of a module of stacked experts: whether they are (expert, in, out)
LOSS_KEYWORDS = "model_accepts_loss_kwargs"  # of a Trainer: whether it divides the loss by the number of labels
JOURNAL_KEY = "op_code"  # with which each line of optuna's journal begins
CACHES = ("cache", "past_key_values", "cache_params")  # names of the KV cache: from transformers 5.24 on, and before


def class_names(task: str) -> dict[str, Any]:
    """The table of transformers, model type → names of its classes, for a task such as `"CAUSAL_LM"`."""
    from transformers.models.auto import modeling_auto

    found: dict[str, Any] = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
    return found


def cache_name(names: Container[str]) -> str | None:
    """The name of the KV cache among a model's arguments or in what it returns, or None."""
    return next((name for name in CACHES if name in names), None)


@contextmanager
def untraced() -> Iterator[None]:
    """A context without torch's function and dispatch modes, so that labels are not traced."""
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        yield


@contextmanager
def without_function_modes() -> Iterator[None]:
    """A context without torch function modes and `__torch_function__` of tensor subclasses."""
    with torch._C.DisableTorchFunctionSubclass(), torch._C.DisableTorchFunction():
        yield


@contextmanager
def below_autograd() -> Iterator[None]:
    """A context in which a dispatch mode sees a product as one operation, not as autograd's parts."""
    with torch._C._AutoDispatchBelowAutograd():
        yield


def storage_key(storage: torch.UntypedStorage) -> int:
    """A key of a tensor's memory while it is alive; views share it."""
    return storage._cdata


def version_of(tensor: Tensor) -> int:
    """Number of in-place writes to a tensor; views share it."""
    return tensor._version


def argument_names(func: Any) -> list[str]:
    """Names of an operator's arguments, in order."""
    return [argument.name for argument in func._schema.arguments]


def decomposed(func: Any, args: tuple, kwargs: dict) -> Any:
    """An operator's result by torch's decomposition, or NotImplemented."""
    return func.decompose(*args, **kwargs)


SHAPE_READ = Tensor.shape.__get__  # type: ignore[attr-defined]  # the function that a mode sees where a shape is read


def offloaded(model: nn.Module) -> list[str]:
    """Paths of the modules whose weights accelerate brings from the disk or another device when they run."""
    hooks = ((path, vars(module).get("_hf_hook")) for path, module in model.named_modules())
    return [
        path for path, hook in hooks if any(getattr(one, "offload", False) for one in getattr(hook, "hooks", [hook]))
    ]


adamw_step = inspect.unwrap(torch.optim.AdamW.step)  # without the wrapper that would call an optimiser's hooks twice


def lora_inputs(layer: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Inputs of a peft LoRA layer as its own `forward` casts them."""
    cast: Tensor = layer._cast_input_dtype(x, dtype)
    return cast
