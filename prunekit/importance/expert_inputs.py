"""Inputs of experts whose matrices are stacked in one parameter, each expert's apart."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from prunekit.compat import TRANSPOSED_EXPERTS, without_function_modes

Note = Callable[[str, int, Tensor], None]
_PRODUCTS = (functional.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm)


def stacked_experts(model: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """Parameter name → its module and the dimension of the inputs, of stacked matrices (expert, out, in) or turned."""
    found = {}
    for path, module in model.named_modules():
        turned = vars(module).get(TRANSPOSED_EXPERTS)
        for name, p in module._parameters.items() if isinstance(turned, bool) else ():
            if p is not None and p.dim() == 3:
                found[f"{path}.{name}"] = (module, 1 if turned else 2)
    return found


@contextmanager
def watching_experts(modules: Mapping[str, nn.Module], note: Note) -> Iterator[None]:
    """A context that reports the inputs of every expert that runs, with eager experts.

    Args:
        modules: name of a stacked parameter → its module.
        note: called with the name, the expert's number and its inputs (n_tokens, n_in).
    """
    running: list[nn.Module] = []
    names = {(id(module), name.rpartition(".")[2]): name for name, module in modules.items()}

    def enter(module: nn.Module, _args: Any) -> None:
        running.append(module)

    def leave(_module: nn.Module, _args: Any, _result: Any) -> None:
        running.pop()

    with ExitStack() as hooks:
        for module in set(modules.values()):
            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        with _Products(running, names, note):
            yield


class _Products(TorchFunctionMode):
    def __init__(self, running: list[nn.Module], names: Mapping[tuple[int, str], str], note: Note) -> None:
        super().__init__()
        self._running, self._names, self._note = running, names, note

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if self._running and func in _PRODUCTS:
            with without_function_modes():
                given = (*args, *(kwargs or {}).values())
                self._look(self._running[-1], *given[:2])
        return func(*args, **(kwargs or {}))

    def _look(self, module: nn.Module, inputs: Tensor, weight: Tensor) -> None:
        """Tell which slice of which parameter the weight is; they may be widened copies while the module runs."""
        for own, p in module._parameters.items():
            name = self._names.get((id(module), own))
            if name and p is not None and p.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr():
                self._note(name, (weight.storage_offset() - p.storage_offset()) // p.stride(0), inputs.flatten(0, -2))
