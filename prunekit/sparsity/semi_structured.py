"""2:4-sparse weights in torch's semi-structured form, which the sparse tensor cores of NVIDIA GPUs multiply."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.errors import PrunekitError
from prunekit.sparsity.report import SparsityReport

CAPABILITY = (8, 0)  # Ampere, the first with sparse tensor cores
DTYPES = (torch.float16, torch.bfloat16)
# Multiples that both of torch's backends take: in 2.13 cuSPARSELt asks for 16 rows and 16 columns, CUTLASS for 32, 64.
ROWS, COLUMNS = 32, 64
_RUN = 4


def to_semi_structured(model: nn.Module) -> int:
    """Give the 2:4-sparse linear layers of a model, in place, weights in torch's semi-structured form.

    That form holds the non-zero half of a weight and where it lies, 9/16 of the bytes in half precision, and products
    with it can be faster; whether they are depends on the shapes and the batch: measure. Such weights can no longer be
    trained, pruned or saved. **This has not been run on a GPU by those who wrote it**: the choice of the matrices,
    CUTLASS's form and the way of its products through a model were tested on CPUs; NVIDIA's kernels and cuSPARSELt not.

    Args:
        model: on a GPU, in float16 or bfloat16. Of its linear modules those of its sparsity report are looked at; all,
            where it carries none. A weight is converted where of every four in a row at least two are zero, and its
            rows and columns are multiples of 32 and 64. GPT-2's Conv1D, stacked experts and shared weights stay dense.

    Returns:
        How many were converted.

    Raises:
        PrunekitError: no CUDA, a GPU that is too old, nothing that can be converted, other dtypes, weights on the CPU,
            or what torch raises. Nothing was changed then, unless it says so.

    Source: `torch.sparse.to_sparse_semi_structured`. Its float32 form, of CUTLASS alone, is 1:2 (one zero in every two)
        and would silently lose weights of a 2:4 matrix, so it is refused; int8 is for quantised models.
    """
    check_device()
    found = _convertible(model)
    for number, (name, linear) in enumerate(found):
        try:
            form = torch.sparse.to_sparse_semi_structured(linear.weight.detach().contiguous())
        except (RuntimeError, NotImplementedError) as error:
            done = f"; {number} matrices are converted already: load the model again" if number else ""
            raise PrunekitError(f"torch cannot convert {name} ({error}){done}") from error
        linear.weight = nn.Parameter(form, requires_grad=False)
    return len(found)


def check_device() -> None:
    """Refuse machines on which no product with that form can run.

    Raises:
        PrunekitError: what is missing, and what to do without it.
    """
    without = "leave semi_structured out: the weights, zeros among them, then run as dense ones"
    if not torch.cuda.is_available() or torch.version.cuda is None:
        raise PrunekitError(f"semi-structured weights need an NVIDIA GPU, and torch finds none here; {without}")
    capability = torch.cuda.get_device_capability()
    if capability < CAPABILITY:
        has, needs = (".".join(map(str, version)) for version in (capability, CAPABILITY))
        raise PrunekitError(f"this GPU has compute capability {has}, semi-structured weights need {needs}; {without}")


def check_dense_form(model: nn.Module, what: str) -> None:
    """Refuse a model whose weights are in semi-structured form already.

    Args:
        model: any.
        what: cannot be done with it, such as `"saved"`.

    Raises:
        PrunekitError: names the weight.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, torch.sparse.SparseSemiStructuredTensor):
            raise PrunekitError(
                f"{name} is in semi-structured form, which cannot be {what}; load the model without semi_structured"
            )


def _convertible(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linear modules to convert, after all checks."""
    sparse = [(name, linear) for name, linear in _linears(model) if is_two_of_four(linear.weight.detach())]
    if not sparse:
        raise PrunekitError(
            "no linear layer has two zeros in every four weights of a row; make such with sparsify(..., sparsity='2:4')"
        )
    name, first = sparse[0]
    if first.weight.dtype not in DTYPES:
        raise PrunekitError(
            f"{name} is {first.weight.dtype}, of which torch has no 2:4 form; load the model with dtype='float16' or "
            "'bfloat16'"
        )
    if not _on_gpu(first.weight):
        raise PrunekitError(f"{name} is on the {first.weight.device.type}; move the model first: model.to('cuda')")
    fitting = [(name, linear) for name, linear in sparse if _divides(linear.weight)]
    if not fitting:
        raise PrunekitError(
            f"no 2:4-sparse weight has rows and columns that {ROWS} and {COLUMNS} divide, as torch needs: {name} is "
            f"{tuple(first.weight.shape)}"
        )
    return fitting


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    report: Any = getattr(model, "sparsity_report", None)
    told = {row["matrix"] for row in report.rows} if isinstance(report, SparsityReport) else None
    users: dict[int, int] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            users[id(p)] = users.get(id(p), 0) + 1
    for path, module in model.named_modules():
        name = f"{path}.weight"
        if isinstance(module, nn.Linear) and users[id(module.weight)] == 1 and (told is None or name in told):
            yield name, module


def is_two_of_four(weight: Tensor) -> bool:
    """Whether at least two of every four weights along each row of (out, in) are zero."""
    if weight.dim() != 2 or weight.shape[1] % _RUN or not weight.is_floating_point():
        return False
    return bool(((weight != 0).unflatten(1, (-1, _RUN)).sum(2) <= _RUN // 2).all())


def _on_gpu(weight: Tensor) -> bool:
    return weight.is_cuda


def _divides(weight: Tensor) -> bool:
    return weight.shape[0] % ROWS == 0 and weight.shape[1] % COLUMNS == 0
