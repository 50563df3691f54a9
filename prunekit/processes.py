"""Several processes that work together, as `accelerate launch` and `torchrun` start them."""

import os
from collections.abc import Iterable

import torch
from accelerate import PartialState

from prunekit.errors import PrunekitError


def this_process() -> PartialState:
    """This process among those that were started together; one alone is the main one."""
    return PartialState(cpu=not torch.accelerator.is_available())


def n_processes() -> int:
    """How many processes were started together."""
    return int(os.environ.get("WORLD_SIZE", 1))


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


def _is_on(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true")
