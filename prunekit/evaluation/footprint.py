"""Cost of running a model: parameters, multiply-accumulates, memory and latency."""

import copy
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prunekit.checks import PROCESS, Amount, Count, Model, NotNegative, check_fields, checked
from prunekit.compat import TorchDispatchMode, cache_name, storage_key, tree_leaves
from prunekit.errors import PrunekitError
from prunekit.models import check_has_weights, count_parameters, device_of, evaluating, known_device, max_positions

MIB = 1024**2
WARM_UP = 2  # runs before the clock counts: allocation, kernel selection, caches
MEASURED = {
    "cpu": "weights and the tensors alive at once in a forward pass; an operator's own scratch space is not counted",
    "cuda": "weights and the CUDA allocator's peak above them in a forward pass",
}


@dataclass(frozen=True)
class Latency:
    """Time of repeated runs, in milliseconds: the median and the 10th and 90th percentiles."""

    median: NotNegative
    p10: NotNegative
    p90: NotNegative

    def __repr__(self) -> str:
        return f"{self.median:.3g} ms ({self.p10:.3g}–{self.p90:.3g})"


@dataclass(frozen=True)
class Cost:
    """The cost of one forward pass over `batch_size` × `seq_len` tokens.

    Attributes:
        n_parameters: parameters, tied ones counted once.
        macs: multiply-accumulates of all matrix products, attention's two included (the causal half is not
            taken off).
        weight_bytes: bytes of parameters and buffers.
        peak_bytes: most bytes in use at once in a forward pass; `peak_measured` says how.
        peak_measured: what `peak_bytes` counts, in words.
        prefill: time of the forward pass.
        decode: time of one further token with the KV cache, for the whole batch.
        seq_len: tokens a sequence.
        batch_size: sequences.
        repeats: timed runs behind each latency.
        device: where it ran.
    """

    n_parameters: Amount
    macs: Amount
    weight_bytes: Amount
    peak_bytes: Amount
    peak_measured: str
    prefill: Latency
    decode: Latency
    seq_len: Count
    batch_size: Count
    repeats: Count
    device: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Cost":
        """The cost from the form of `to_dict`.

        Raises:
            PrunekitError: a figure that cannot be.
        """
        times = {name: Latency(**fields[name]) for name in ("prefill", "decode")}
        found = cls(**{**fields, **times})
        for part in (found, *times.values()):
            check_fields(part)
        return found

    def __repr__(self) -> str:
        return (
            f"Cost({self.n_parameters:,} parameters; {self.macs:,} MACs for {self.batch_size} × {self.seq_len} tokens; "
            f"weights {self.weight_bytes / MIB:.1f} MiB, peak {self.peak_bytes / MIB:.1f} MiB; "
            f"prefill {self.prefill}, decode {self.decode} a token; {self.device})"
        )


@checked
def cost(
    model: Model,
    *,
    seq_len: Count = 64,
    batch_size: Count = 1,
    repeats: Count = 10,
    device: str | torch.device | None = None,
) -> Cost:
    """Parameters, multiply-accumulates, memory and latency of a model.

    Args:
        model: a causal language model of `transformers`; it is left where it is.
        seq_len: tokens a sequence. 64 is LLM-Pruner's for MACs.
        batch_size: sequences.
        repeats: timed runs, after two for warming up.
        device: where to measure; None is where the model lies, elsewhere a copy is measured.

    Returns:
        A `Cost`.

    Raises:
        PrunekitError: a size is below 1, the sequence does not fit the model, or there is no such device.

    Source: LLM-Pruner (Ma et al. 2023), Table 3, counts MACs at 64 tokens; theirs leave attention's products out.
    """
    check_has_weights(model)  # of weights that come from a disk, times and memory would be the disk's
    check_length(model, seq_len)
    model = on_device(model, device)
    where = device_of(model)
    ids = random_tokens(model, batch_size, seq_len)
    with evaluating(model), torch.no_grad():
        return Cost(
            n_parameters=count_parameters(model),
            macs=count_macs(model, ids),
            weight_bytes=bytes_of_weights(model),
            peak_bytes=bytes_of_weights(model) + measure_activations(model, ids),
            peak_measured=MEASURED.get(where.type, MEASURED["cpu"]),
            prefill=time_prefill(model, ids, repeats),
            decode=time_decode(model, ids, repeats),
            seq_len=seq_len,
            batch_size=batch_size,
            repeats=repeats,
            device=torch.cuda.get_device_name(where) if where.type == "cuda" else where.type,
        )


def random_tokens(model: nn.Module, batch_size: int, seq_len: int) -> Tensor:
    """Fixed pseudo-random tokens for a vocabulary and sizes, integers (batch, seq), on the model's device."""
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (batch_size, seq_len), generator=generator).to(device_of(model))


def check_length(model: nn.Module, seq_len: int) -> None:
    """Raises an error for sequences that are longer than the model takes."""
    limit = max_positions(model)
    if limit is not None and seq_len > limit:
        raise PrunekitError(f"seq_len={seq_len}, but this model takes at most {limit} tokens; give {limit} or less")


def on_device(model: nn.Module, device: str | torch.device | None) -> nn.Module:
    """The model, or a copy on another device."""
    here = device_of(model)
    if device is None or known_device(device) == here or str(device) == here.type:
        return model
    return copy.deepcopy(model).to(device)


def count_macs(model: nn.Module, ids: Tensor) -> int:
    """Multiply-accumulates of the matrix products in one forward pass over ids (batch, seq).

    Attention runs as plain products meanwhile: fused kernels on the CPU are not counted by torch.
    """
    with PROCESS, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    return counter.get_total_flops() // 2


def bytes_of_weights(model: nn.Module) -> int:
    """Bytes of parameters and buffers, shared storage counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(model)}
    return sum(storages.values())


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*model.parameters(), *model.buffers()]


def measure_activations(model: nn.Module, ids: Tensor) -> int:
    """Peak bytes in use besides the weights in one forward pass over ids (batch, seq)."""
    if ids.device.type == "cuda":
        torch.cuda.synchronize(ids.device)
        torch.cuda.reset_peak_memory_stats(ids.device)
        before = torch.cuda.memory_allocated(ids.device)
        model(input_ids=ids, use_cache=False)
        return torch.cuda.max_memory_allocated(ids.device) - before
    with LiveBytes(tensors_of(model)) as live:
        model(input_ids=ids, use_cache=False)
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live storages that operators return.

    Unlike the process's memory it does not depend on the allocator or on what ran before, so two models can
    be compared. What an operator allocates and frees inside itself is not seen.

    Attributes:
        peak: most bytes alive at once.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._alive = 0
        self._seen = {storage_key(tensor.untyped_storage()) for tensor in known}

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operator and counts its new storages."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage_key(storage), storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self._alive += size
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._alive -= size


def time_prefill(model: nn.Module, ids: Tensor, repeats: int) -> Latency:
    """Time of a forward pass over ids (batch, seq)."""
    run = partial(model, input_ids=ids, use_cache=False)
    return summarise([timed(run, ids.device) for _ in range(WARM_UP + repeats)])


def time_decode(model: nn.Module, ids: Tensor, repeats: int) -> Latency:
    """Time of one further token after ids (batch, seq), with the KV cache.

    Where context is scarce the prompt is shortened so that all runs fit; where even that is too little, the
    cache starts again.
    """
    limit = max_positions(model) or ids.shape[1] + WARM_UP + repeats
    prompt = ids[:, : max(1, limit - WARM_UP - repeats)]
    times: list[float] = []
    cache, length = dict[str, Any](), limit
    while len(times) < WARM_UP + repeats:
        if length >= limit:
            cache, length = cache_of(model, prompt), prompt.shape[1]
            if length >= limit:
                raise PrunekitError(f"this model takes {limit} token(s): there is no next one to time")
        step = partial(model, input_ids=ids[:, :1], use_cache=True, **cache)
        times.append(timed(step, ids.device))
        length += 1
    return summarise(times)


def cache_of(model: nn.Module, ids: Tensor) -> dict[str, Any]:
    """The KV cache after a forward pass over ids (batch, seq), by its name; empty where the model has none."""
    output = model(input_ids=ids, use_cache=True)
    name = cache_name(output)
    return {name: output[name]} if name else {}


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a run, with the device synchronised before and after."""
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Waits until a CUDA device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summarise(seconds: list[float]) -> Latency:
    """Median and spread in milliseconds, without the runs for warming up."""
    p10, median, p90 = np.percentile(np.array(seconds[WARM_UP:]) * 1000, [10, 50, 90])
    return Latency(float(median), float(p10), float(p90))
