"""Several processes that work together, as `accelerate launch` and `torchrun` start them."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import PartialState

from prunekit.errors import PrunekitError


def this_process() -> PartialState:
    """This process among those that were started together; one alone is the main one."""
    return PartialState(cpu=not torch.accelerator.is_available())


def n_processes() -> int:
    """How many processes were started together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def evenly(n: int) -> int:
    """What several processes take of `n` windows a step: each as many, and at least one."""
    return max(1, n // n_processes()) * n_processes()


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
