"""A worker process: loads the model once, then builds and measures candidates."""

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from threading import Lock, Thread
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from prunekit.checkpoint import load
from prunekit.digests import digest_of
from prunekit.discovery import Groups, discover
from prunekit.errors import PrunekitError
from prunekit.pruning import PruningPlan, prune, surgery
from prunekit.search.pairs import Metric
from prunekit.search.space import CarryOut

Fields = Mapping[str, Any]  # of a PruningPlan, all but its groups and notes

# Groups of models that a worker has seen.
_GROUPS: "WeakKeyDictionary[nn.Module, Groups]" = WeakKeyDictionary()


def cut(model: nn.Module, plan: Fields, *, calib: Tensor | None = None) -> nn.Module:
    """The smaller model that a plan gives.

    Args:
        model: the dense one; unchanged.
        plan: fields of the plan.
        calib: tokens to re-fit on; None does not re-fit.
    """
    if model not in _GROUPS:
        _GROUPS[model] = discover(model)
    chosen = PruningPlan(**plan, groups=_GROUPS[model])
    if calib is None:
        return surgery.cut(model, chosen, inplace=False)
    return prune(model, chosen, compensate=calib, measure=False)


_OPEN: dict[str, tuple[Any, Any]] = {}  # fingerprint → the loaded model and tokenizer; one at a time
PATIENCE = 2  # seconds between two looks whether the parent lives
_ALONE = Lock()  # a worker of Dask may have several threads: one of them at a time has the model


@dataclass(frozen=True)
class Work:
    """What a worker needs, small enough to be sent with every candidate.

    Attributes:
        fingerprint: digest of the model's weights, which identifies the model.
        source: where `load` finds the model.
        device: device of the model.
        metrics: the metrics to measure.
        pid: process that runs the search.
    """

    fingerprint: str
    source: str
    device: str
    metrics: Sequence[Metric]
    pid: int = field(default_factory=os.getpid)


@dataclass(frozen=True)
class Outcome:
    """The result of a trial: values, or the reason of a failure."""

    number: int
    measured: Mapping[str, float]
    why: str | None = None


def keep_open(fingerprint: str, model: nn.Module, tokenizer: Any) -> None:
    """Make a loaded model available to this process."""
    _OPEN.clear()
    _OPEN[fingerprint] = (model, tokenizer)


def let_go() -> None:
    """Forget the loaded model."""
    _OPEN.clear()


def opened(work: Work) -> tuple[Any, Any]:
    """Model and tokenizer, loaded at the first call; from then on torch uses one thread.

    Raises:
        PrunekitError: the source contains another model.
    """
    if work.fingerprint not in _OPEN:
        torch.set_num_threads(1)
        model, tokenizer = load(work.source)
        if digest_of(model).hexdigest() != work.fingerprint:
            raise PrunekitError(
                f"{work.source!r} contains another model than the one given; give the source of that model"
            )
        keep_open(work.fingerprint, model.to(work.device), tokenizer)
    return _OPEN[work.fingerprint]


@cache
def end_with(parent: int) -> None:
    """End this process soon after its parent was killed; joblib's workers would wait for minutes, with their memory."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PATIENCE)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def carry_out(work: Work, number: int, build: CarryOut, data: Any) -> Outcome:
    """Build and measure a candidate.

    Args:
        work: what all candidates share.
        number: number of the trial.
        build: (dense model, data) → the candidate's model.
        data: plain data of the candidate.

    Returns:
        Values by name, and seconds; or the reason of a failure: a PrunekitError or too little memory.
    """
    if os.getppid() == work.pid:
        end_with(work.pid)
    with _ALONE:
        model, tokenizer = opened(work)
        start = time.perf_counter()
        try:
            built = build(model, data)
            figures = {metric.name: figure(metric, built, tokenizer) for metric in work.metrics}
        except PrunekitError as error:
            return Outcome(number, {}, str(error))
        except (MemoryError, torch.OutOfMemoryError):  # else every resume would try it again
            return Outcome(number, {}, "out of memory")
        except Exception as error:
            error.add_note(f"while trial {number} was measured, {data!r:.200}; it waits to be measured again")
            raise
        return Outcome(number, figures | {"seconds": time.perf_counter() - start})


def is_figure(metric: Metric, value: Any) -> bool:
    """Whether a metric may have this value."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    return is_number and (not metric.log or value >= 0)


def figure(metric: Metric, model: Any, tokenizer: Any) -> float:
    """The value of a metric for a model.

    Raises:
        PrunekitError: the metric does not return a number.
    """
    given = metric.measure(model, tokenizer)
    try:
        value = math.nan if isinstance(given, str) else float(given)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not is_figure(metric, value):
        wanted = "a number above 0" if metric.log else "a number"
        raise PrunekitError(f"metric {metric.name!r} gave {given!r:.40} for this model; it must give {wanted}")
    return value
