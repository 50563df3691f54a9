"""Locks between threads: one model is worked on by one thread at a time, and so is what belongs to the whole process.

A trace replaces a model's parameters while it runs, and an ablation its weights, so two threads on one model would see
each other's changes. Threads with models of their own run side by side, but for the steps that change the process:
random numbers, how torch builds modules, which attention kernels it takes. A training holds the random numbers until it
ends, so that loading a model, or another training, waits for it.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_GUARD = Lock()
_OF_MODEL: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
PROCESS = RLock()
"""Held by whoever changes what the whole process shares. It is taken after the locks of models, never before."""


@contextmanager
def alone(models: Iterable[nn.Module]) -> Iterator[None]:
    """A context in which no other thread is in such a context with one of these models; it waits for that.

    A thread may enter it again. All models are given at once, so that two threads cannot wait for each other.
    """
    with _GUARD:
        locks = {id(lock): lock for lock in (_OF_MODEL.setdefault(model, RLock()) for model in models)}
    with ExitStack() as stack:
        for key in sorted(locks):
            stack.enter_context(locks[key])
        yield
