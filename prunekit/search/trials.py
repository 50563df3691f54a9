"""The trials of a search, kept in a journal file that several processes share: each candidate is measured once."""

import json
import os
import socket
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from prunekit.checks import Whole, check_value
from prunekit.compat import JOURNAL_KEY
from prunekit.errors import PrunekitError, reason
from prunekit.files import writing
from prunekit.search.hyperparameters import Range
from prunekit.search.space import Point, Space, key_of

STUDY = "prunekit"
_BEGINNING = f'{{"{JOURNAL_KEY}"'.encode()  # of every line


class Journal(JournalFileBackend):
    """Optuna's journal, one JSON object per line; an incomplete last line is removed.

    Optuna's own lock files stay after a kill, so that others wait for half a minute. The system releases this one when
    its holder dies.

    Attributes:
        lock: held by every writer, who may acquire it again.
    """

    def __init__(self, path: Path) -> None:
        self.lock, self._path = FileLock(f"{path}.lock"), path
        super().__init__(str(path), lock_obj=self.lock)  # type: ignore[arg-type]
        with self.lock:
            self._check()
            self._mend()

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write lines, after removing an incomplete last line."""
        with writing(self._path, whole=False), self.lock:
            self._mend()
            super().append_logs(logs)

    def _check(self) -> None:
        """Raise an error for a file that is not a journal."""
        *lines, rest = self._path.read_bytes().split(b"\n")
        if not lines and not _BEGINNING.startswith(rest[: len(_BEGINNING)]):
            lines = [rest]
        for number, line in enumerate(lines, 1):
            try:
                told = json.loads(line)
            except (ValueError, RecursionError):
                told = None
            if not isinstance(told, dict) or JOURNAL_KEY not in told:
                raise PrunekitError(
                    f"line {number} of {str(self._path)!r} is no journal line: {line[:40]!r}; give another path, "
                    "or delete it and all after it to resume from the lines before"
                )

    def _mend(self) -> None:
        """Remove an incomplete last line."""
        with self._path.open("rb+") as file:
            end = file.seek(0, 2)
            file.seek(max(0, end - 1))
            if end and file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)


def open_study(path: Path, maximize: bool) -> tuple[optuna.Study, JournalStorage, FileLock]:
    """The study in a journal file, created if missing, with its storage and its lock.

    Raises:
        PrunekitError: the file is not a journal, has no readable study, or cannot be written.
    """
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        journal = Journal(path)
        with journal.lock:
            storage = JournalStorage(journal)
            if STUDY not in optuna.get_all_study_names(storage):  # Optuna writes a line before it looks
                direction = StudyDirection.MAXIMIZE if maximize else StudyDirection.MINIMIZE
                storage.create_new_study([direction], STUDY)
            study = optuna.load_study(study_name=STUDY, storage=storage)
    except PrunekitError:
        raise
    except OSError as error:
        told = f"cannot write the journal {str(path)!r} ({error.strerror}); choose another folder"
        raise PrunekitError(told) from None
    except (KeyError, AssertionError, TypeError, ValueError) as error:
        raise PrunekitError(
            f"{str(path)!r} holds no study that can be read ({reason(error)}); give another path"
        ) from error
    finally:
        optuna.logging.set_verbosity(before)
    return study, storage, journal.lock


class Trials:
    """The trials of one search, in a journal file that several processes share.

    A candidate is added once, as a waiting trial. `claim` makes it a running one, under a lock, with the number of the
    run. Each run holds its own lock while it lives. When that lock is free, the trials that the run had claimed wait
    again. Optuna's own tools read the journal: its parameters are the hyperparameters, its value is the metric.
    """

    def __init__(self, path: Path, space: Space, identity: Mapping[str, Any], *, maximize: bool) -> None:
        """Open a journal, or begin one.

        Args:
            path: path of the journal.
            space: space of the candidates; narrowed spaces count as the same.
            identity: identifies the search, name → plain data.
            maximize: whether a higher metric is better.

        Raises:
            PrunekitError: not a journal, or the journal of another search.
        """
        self.path, self._run, self._closed = path, uuid.uuid4().hex, False
        self.study, self._storage, self.lock = open_study(path, maximize)
        self._distributions = {name: _distribution(knob) for name, knob in space.knobs.items()}
        with self.lock:
            self._identify(identity)
            self._check(space)
        self._claimed: dict[int, Trial] = {}
        self._life = self._life_of(self._run)
        self._life.acquire()

    def close(self) -> None:
        """Return claimed and unfinished trials to the waiting ones."""
        self._claimed.clear()
        with self.lock:
            self._closed = True
            self._life.release()
            self._take_back()
            for left in self.path.parent.glob(f"{self.path.name}.*.lock"):  # of finished runs, including this one
                self._lives(left.name.removeprefix(f"{self.path.name}.").removesuffix(".lock"))

    def add(self, number: int, make: Callable[[list[Point]], list[Point]]) -> None:
        """Add the candidates of a round, unless another process has added them.

        Args:
            number: number of the round.
            make: candidates already in the round → the missing ones.
        """
        with self.lock:
            there = [trial.params for trial in self._every() if trial.user_attrs["round"] == number]
            for point in make(there):
                told: Any = {"params": point, "distributions": self._distributions, "user_attrs": {"round": number}}
                self.study.add_trial(create_trial(state=TrialState.WAITING, **told))

    def claim(self) -> tuple[int, Point] | None:
        """Claim a waiting trial for this process: its number and candidate; None if none waits."""
        with self.lock:
            self._take_back()
            if not self._every(TrialState.WAITING) or self._closed:  # one of joblib's threads may ask when all is over
                return None
            trial = self.study.ask()
            trial.set_user_attr("worker", {"run": self._run, "host": socket.gethostname(), "pid": os.getpid()})
        self._claimed[trial.number] = trial
        return trial.number, trial.params

    def finish(self, number: int, measured: Mapping[str, float], metric: str) -> None:
        """Store what was measured for a claimed trial."""
        trial = self._claimed.pop(number)
        with self.lock:  # before Optuna's own, as in a claim, which another thread may be making
            trial.set_user_attr("measured", dict(measured))
            self.study.tell(trial, measured[metric])

    def fail(self, number: int, why: str) -> None:
        """Store that a claimed trial failed, and the reason."""
        trial = self._claimed.pop(number)
        with self.lock:
            trial.set_user_attr("why", why)
            self.study.tell(trial, state=TrialState.FAIL)

    def n_open(self) -> int:
        """Number of trials that wait or run."""
        with self.lock:
            self._take_back()
        return len(self._every(TrialState.WAITING, TrialState.RUNNING))

    def points(self, before: int) -> list[Point]:
        """All candidates added in earlier rounds, failed ones included."""
        return [trial.params for trial in self._every() if trial.user_attrs["round"] < before]

    def finished(self) -> list[FrozenTrial]:
        """The measured trials, in the order in which they were added."""
        return self._every(TrialState.COMPLETE)

    def failed(self) -> dict[int, str]:
        """Trial number → reason, for failed trials."""
        return {
            trial.number: trial.user_attrs.get("why", "it was interrupted") for trial in self._every(TrialState.FAIL)
        }

    def table(self) -> pd.DataFrame:
        """One row per measured trial: number, round, the hyperparameters, and what was measured."""
        rows = [
            {"number": t.number, "round": t.user_attrs["round"], **t.params, **t.user_attrs["measured"]}
            for t in self.finished()
        ]
        return pd.DataFrame(rows, columns=None if rows else ["number", "round", *self._distributions])

    def _every(self, *states: TrialState) -> list[FrozenTrial]:
        """The trials, or those in these states."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    def _take_back(self) -> None:
        """Return trials of dead processes to the waiting ones."""
        study = self._storage.get_study_id_from_name(STUDY)
        for trial in self._every(TrialState.RUNNING):
            worker = trial.user_attrs.get("worker")  # None: killed right after its claim
            if worker is None or not self._lives(worker["run"]):
                number = self._storage.get_trial_id_from_study_id_trial_number(study, trial.number)
                self._storage.set_trial_state_values(number, TrialState.WAITING)

    def _lives(self, run: str) -> bool:
        """Whether a run is alive; the lock file of a dead run is deleted."""
        life = self._life_of(run)
        try:
            life.acquire(timeout=0)
        except Timeout:
            return True
        life.release()
        Path(life.lock_file).unlink(missing_ok=True)
        return False

    def _life_of(self, run: str) -> FileLock:
        """The lock that a run holds while it lives; any of its threads may release it."""
        return FileLock(f"{self.path}.{run}.lock", thread_local=False)

    def _identify(self, identity: Mapping[str, Any]) -> None:
        """Check that the journal belongs to this search; store the identity in a new journal."""
        known = self.study.user_attrs.get("identity")
        if known is None:
            if self._every():
                raise PrunekitError(f"{str(self.path)!r} is a journal that prunekit did not write; give another path")
            self.study.set_user_attr("identity", dict(identity))
            return
        differs = [name for name in identity if known.get(name) != identity[name]]
        if differs:
            raise PrunekitError(
                f"{str(self.path)!r} is of another search (different {' and '.join(differs)}); give another folder, or "
                "the arguments that it was started with"
            )

    def _check(self, space: Space) -> None:
        """Raise an error for candidates that were edited, or that stand in the journal twice."""
        seen: set[str] = set()
        for trial in self._every():
            where = f"trial {trial.number} of {str(self.path)!r}"
            try:
                key, number = key_of(space.check(trial.params)), trial.user_attrs["round"]
                check_value("round", number, Whole)
            except (PrunekitError, KeyError) as error:
                raise PrunekitError(
                    f"{where} is no candidate of this search ({reason(error)}); delete the journal to begin anew"
                ) from None
            if key in seen:
                raise PrunekitError(f"{where} repeats an earlier candidate; delete the journal to begin anew")
            seen.add(key)


def _distribution(knob: Any) -> BaseDistribution:
    return FloatDistribution(knob.low, knob.high) if isinstance(knob, Range) else CategoricalDistribution(knob.options)
