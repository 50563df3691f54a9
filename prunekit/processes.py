"""Several processes that work together, as `accelerate launch` and `torchrun` start them."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor

from prunekit.errors import PrunekitError

T = TypeVar("T")
_SPLIT = ContextVar("split", default=False)


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

    All of them must enter it and do the same there, each with a model of its own; each gets the whole result, the same
    as one process. One process alone does all.
    """
    this_process()  # of several, each has a GPU of its own as its default
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
    """Of the pieces that the processes share, every n-th, or all."""
    n = n_sharing()
    return islice(pieces, 0 if n == 1 else this_process().process_index, None, n)


def summed(found: Tensor) -> Tensor:
    """What the processes that share found, added up, on the CPU: where each left zero what is not its own."""
    if n_sharing() == 1:
        return found
    total = found.to(this_process().device)
    torch.distributed.all_reduce(total)
    return total.cpu()


def check_alike(mark: int, what: str) -> None:
    """Raise an error, in each of the processes that share, where they do not work on the same.

    Args:
        mark: a number by which it is known, of less than 64 bits.
        what: it, in words, such as `"questions"`.

    Raises:
        PrunekitError: one of them has another number.
    """
    if n_sharing() == 1:
        return
    ends = torch.tensor([mark, -mark], device=this_process().device)
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
    """Raise an error for a model that is spread over devices, where several processes would train it.

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
