"""One worker: the model opened once, then point after point built and measured."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import nn

from prunekit.checkpoint import load
from prunekit.errors import PrunekitError, first_line
from prunekit.fingerprint import digest_of
from prunekit.search.metrics import Metric
from prunekit.search.space import CarryOut

_OPEN: dict[str, tuple[Any, Any]] = {}  # what this process has open, by the model's fingerprint; one at a time
_ALONE = Lock()  # a worker of Dask may have several threads: one of them at a time has the model


@dataclass(frozen=True)
class Work:
    """What a worker needs to know, small enough to be sent with every point.

    Attributes:
        fingerprint: of the model's weights; by it a worker knows that it has the model open, and the right one.
        source: where `load` finds the model.
        device: where it is to lie.
        metrics: what is measured.
    """

    fingerprint: str
    source: str
    device: str
    metrics: Sequence[Metric]


@dataclass(frozen=True)
class Outcome:
    """What came of a trial: figures, or why there are none."""

    number: int
    measured: Mapping[str, float]
    why: str | None = None


def keep_open(fingerprint: str, model: nn.Module, tokenizer: Any) -> None:
    """Let this process work with a model that is there already."""
    _OPEN.clear()
    _OPEN[fingerprint] = (model, tokenizer)


def let_go() -> None:
    """Keep no model open."""
    _OPEN.clear()


def opened(work: Work) -> tuple[Any, Any]:
    """Model and tokenizer, loaded when they are first asked for; then this process computes with one thread.

    Raises:
        PrunekitError: what lies at the source is another model.
    """
    if work.fingerprint not in _OPEN:
        torch.set_num_threads(1)
        model, tokenizer = load(work.source)
        if digest_of(model).hexdigest() != work.fingerprint:
            raise PrunekitError(
                f"{work.source!r} holds another model than the one that is searched; give its own source"
            )
        keep_open(work.fingerprint, model.to(work.device), tokenizer)
    return _OPEN[work.fingerprint]


def carry_out(work: Work, number: int, build: CarryOut, data: Any) -> Outcome:
    """Build what a point says, and measure it.

    Args:
        work: what is the same for all points.
        number: of the trial.
        build: makes a model of the dense one and the data.
        data: plain.

    Returns:
        The figures by name, and the seconds that it took; or why there are none: what prunekit refuses, or memory
        that is not there.
    """
    with _ALONE:
        model, tokenizer = opened(work)
        start = time.perf_counter()
        try:
            built = build(model, data)
            figures = {metric.name: figure(metric, built, tokenizer) for metric in work.metrics}
        except PrunekitError as error:
            return Outcome(number, {}, str(error))
        except (MemoryError, torch.OutOfMemoryError) as error:  # it would come again on every resume
            return Outcome(number, {}, f"out of memory: {first_line(error)}")
        except Exception as error:
            error.add_note(f"while trial {number} was measured, {data!r:.200}; it waits to be measured again")
            raise
        return Outcome(number, figures | {"seconds": time.perf_counter() - start})


def figure(metric: Metric, model: Any, tokenizer: Any) -> float:
    """What a metric says of a model.

    Raises:
        PrunekitError: it says nothing that is a number.
    """
    given = metric.measure(model, tokenizer)
    try:
        value = math.nan if isinstance(given, str) else float(given)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if math.isnan(value) or (metric.log and value < 0):
        wanted = "a number above 0" if metric.log else "a number"
        raise PrunekitError(f"metric {metric.name!r} gave {given!r:.40} for this model; it must give {wanted}")
    return value
