"""A space without a model to build, where the point itself is measured; and figures that wait for others."""

import os
import time
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path

import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from torch import nn

from prunekit.search import Choice, HyperparameterSpace, Metric, Range
from prunekit.search.space import Point, key_of

PATIENCE = 300  # seconds, after which whoever waits gives up: a test fails then and does not hang
KNOBS = {
    "share": Range(0.0, 1.0),
    "width": Choice((8, 16, 32)),
    "scale": Choice((0.5, 1.5)),
    "by": Choice(("l1", "taylor")),
    "whole": Choice((False, True)),
}


def the_point(model, point):
    """Builds nothing."""
    return point


def score_of(point, tokenizer=None):
    return point["share"] * point["scale"] + point["width"] / 100 + (point["by"] == "l1") / 7 - point["whole"] / 3


SPACE = HyperparameterSpace(KNOBS, the_point)
SCORE = Metric("score", score_of)


def model(seed=0):
    """The least that a search takes for one."""
    torch.manual_seed(seed)
    return nn.Linear(2, 2)


def wait_until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not what():
        if time.monotonic() > end:
            raise TimeoutError("waited in vain")
        time.sleep(0.05)


def gated(point, tokenizer, *, folder: Path, free: int):
    """The score; of all that are measured so many go through at once, the others wait for the file `open`."""
    if _ticket(folder) >= free:
        wait_until((folder / "open").exists)
    return score_of(point)


def _ticket(folder: Path) -> int:
    """0, 1, …, each given once, whoever asks."""
    for number in count():
        try:
            (folder / str(number)).open("x").close()
        except FileExistsError:
            continue
        return number
    raise AssertionError


def together(point, tokenizer, *, folder: Path, n: int):
    """The score, told when so many processes are at it."""
    (folder / str(os.getpid())).touch()
    wait_until(lambda: len(list(folder.iterdir())) >= n)
    return score_of(point)


def read_by_optuna(journal: Path) -> optuna.Study | None:
    """The study, as Optuna's own tools see it; None as long as there is none."""
    if not journal.exists():
        return None
    try:
        return optuna.load_study(study_name="prunekit", storage=JournalStorage(JournalFileBackend(str(journal))))
    except KeyError:
        return None


def states_of(journal: Path) -> list[str]:
    study = read_by_optuna(journal)
    return [] if study is None else [trial.state.name for trial in study.trials]


def keys(points: Iterable[Point]) -> list[str]:
    """By which points are compared, with their types."""
    return [f"{key_of(point)} {[type(value).__name__ for value in point.values()]}" for point in points]


def pid_of(point, tokenizer):
    return os.getpid()


def threads_of(point, tokenizer):
    return torch.get_num_threads()


_GIVEN: list[nn.Module] = []  # that this process built of; kept, so that no other takes the place of one


def noting(model, point):
    """Builds nothing, but remembers the model."""
    if not any(model is other for other in _GIVEN):
        _GIVEN.append(model)
    return point


def loads_of(point, tokenizer):
    """How often this process was given the weights that it was given last in another model."""
    first, *_ = _GIVEN[-1].parameters()
    return sum(torch.equal(next(model.parameters()), first) for model in _GIVEN)
