"""Several processes that work together, as `accelerate launch` and `torchrun` start them."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from typing import Any, TypeVar
from zlib import crc32

import torch
from accelerate import PartialState
from torch import Tensor

from prunekit.errors import PrunekitError

T = TypeVar("T")
_SPLIT = ContextVar("split", default=False)
_LAUNCH = "start them by accelerate launch or torchrun, or unset WORLD_SIZE"


def this_process() -> PartialState:
    """This process among those that were started together; one alone is the main one."""
    return PartialState(cpu=not torch.accelerator.is_available())


def n_processes() -> int:
    """How many processes were started together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def evenly(n: int) -> int:
    """What several processes take of `n` windows a step: each as many, and at least one."""
    return max(1, n // n_processes()) * n_processes()


@contextmanager
def split_work() -> Iterator[None]:
    """Within it, evaluation and knowledge are shared out among the processes that were started together.

    All of them must enter it and do the same there, each with its own copy of one model; each gets the whole result,
    that of one process. One process alone does all.

    Raises:
        PrunekitError: WORLD_SIZE says that there are several, and no launcher started them.
    """
    try:
        n = this_process().num_processes  # of several, each has a GPU of its own as its default from here on
    except ValueError as error:  # of torch, where it is not told how to find the others
        raise PrunekitError(f"{n_processes()} processes cannot be joined; {_LAUNCH}") from error
    if n != n_processes():
        raise PrunekitError(f"WORLD_SIZE is {n_processes()}, and {n} process(es) were joined; {_LAUNCH}")
    before = _SPLIT.set(True)
    try:
        yield
    finally:
        _SPLIT.reset(before)


def n_sharing() -> int:
    """How many processes share the work: 1 outside `split_work`."""
    return n_processes() if _SPLIT.get() else 1


def is_first() -> bool:
    """Whether this process alone works, or is the first of those that share."""
    return n_sharing() == 1 or this_process().is_main_process


def own_share(pieces: Iterable[T]) -> Iterator[T]:
    """The pieces of work that are this process's: every n-th of n processes that share, or all."""
    n = n_sharing()
    return islice(pieces, 0 if n == 1 else this_process().process_index, None, n)


def summed(found: Tensor) -> Tensor:
    """The sum over the processes that share, on the CPU; each has zeros where another one measured."""
    if n_sharing() == 1:
        return found
    total = found.to(this_process().device)
    torch.distributed.all_reduce(total)
    return total.cpu()


def of_first(found: Tensor) -> Tensor:
    """What the first of the processes that share has; alone, the tensor itself."""
    if n_sharing() == 1:
        return found
    sent = found.to(this_process().device).contiguous()
    torch.distributed.broadcast(sent, 0)
    return sent.to(found.device)


def check_same_model(model: torch.nn.Module) -> None:
    """Raise an error where processes that share the work have different models, or one that is spread over devices.

    Of each parameter one number is compared.

    Raises:
        PrunekitError: they have.
    """
    if n_sharing() == 1:
        return
    check_one_place(model)
    here = ((name, p.detach().flatten()[:1].float()) for name, p in model.named_parameters() if not p.is_meta)
    check_alike(crc32(str([(name, p.tolist(), p.shape) for name, p in here]).encode()), "models")


def check_alike(number: int, what: str) -> None:
    """Raise an error in every process that shares the work if their numbers differ.

    Args:
        number: a number that identifies the input, below 2**62 in size.
        what: the input in words, such as `"questions"`.

    Raises:
        PrunekitError: the numbers differ.
    """
    if n_sharing() == 1:
        return
    ends = torch.tensor([number, -number], device=this_process().device)
    torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX)
    if ends.sum() == 0:
        return
    raise PrunekitError(
        f"the {n_sharing()} processes that share the work have different {what}; give all of them the same models, "
        "data and seeds"
    )


def is_sharded() -> bool:
    """Whether FSDP shares the weights out among the processes."""
    return _is_on("ACCELERATE_USE_FSDP")


def check_shards(whole: Iterable[str] = ()) -> None:
    """Raise an error, before a training starts, for shards of weights that it cannot put together again.

    Args:
        whole: what is asked for that needs each weight whole, in words.

    Raises:
        PrunekitError: DeepSpeed, FSDP in its first version or where one process alone loads, or one of `whole` with
            FSDP.
    """
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        raise PrunekitError(
            "DeepSpeed's shards cannot be put together here; give accelerate launch --multi_gpu, or --use_fsdp"
        )
    if not is_sharded():
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise PrunekitError("FSDP's first version flattens weights; give accelerate launch --fsdp_version 2")
    if _is_on("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise PrunekitError(
            "with FSDP's efficient loading only the first process has weights; give accelerate launch "
            "--fsdp_cpu_ram_efficient_loading false"
        )
    for what in whole:
        raise PrunekitError(
            f"{what} needs each weight whole, and FSDP shares them out; give --multi_gpu in place of it"
        )


def check_one_place(model: Any) -> None:
    """Raise an error for a model that is spread over devices, where several processes would train or run it.

    Raises:
        PrunekitError: it is, and they would.
    """
    places = set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))
    if n_processes() > 1 and len(places) > 1:
        raise PrunekitError(
            f"the model is spread over {', '.join(sorted(places))}, and {n_processes()} processes were started: each "
            "needs a model of its own; leave out device_map=, or start one process"
        )


def _is_on(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true")
