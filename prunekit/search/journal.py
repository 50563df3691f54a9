"""The journal file of a search, which several processes share, and the study in it."""

import json
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection

from prunekit.compat import JOURNAL_KEY
from prunekit.errors import PrunekitError, reason
from prunekit.files import writing

STUDY = "prunekit"
_BEGINNING = f'{{"{JOURNAL_KEY}"'.encode()  # of every line


class KernelLock:
    """A file lock that the system releases when its holder dies.

    Optuna's own lock files stay after a kill, so that others wait for half a minute. The holder may acquire it again.
    """

    def __init__(self, path: Path) -> None:
        self._lock = FileLock(f"{path}.lock")

    def acquire(self) -> bool:
        """Wait for the lock and take it."""
        self._lock.acquire()
        return True

    def release(self) -> None:
        """Release the lock."""
        self._lock.release()

    def __enter__(self) -> "KernelLock":
        self.acquire()
        return self

    def __exit__(self, *_raised: object) -> None:
        self.release()


class Journal(JournalFileBackend):
    """Optuna's journal, one JSON object per line; an incomplete last line is removed.

    Attributes:
        lock: held by every writer.
    """

    def __init__(self, path: Path) -> None:
        self.lock, self._path = KernelLock(path), path
        super().__init__(str(path), lock_obj=self.lock)  # type: ignore[arg-type]
        with self.lock:
            self._check()

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write lines, after removing an incomplete last line."""
        with writing(self._path, whole=False), self.lock:
            self._mend()
            super().append_logs(logs)

    def _check(self) -> None:
        """Raise an error for a file that is not a journal; remove an incomplete last line."""
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n") and (number > 1 or _BEGINNING.startswith(line[: len(_BEGINNING)])):
                    continue
                try:
                    told = json.loads(line)
                except (ValueError, RecursionError):
                    told = None
                if not isinstance(told, dict) or JOURNAL_KEY not in told:
                    raise PrunekitError(
                        f"line {number} of {str(self._path)!r} is no journal line: {line[:40]!r}; give another path, "
                        "or delete it and all after it to resume from the lines before"
                    )
        self._mend()

    def _mend(self) -> None:
        with self._path.open("rb+") as file:
            end = file.seek(0, 2)
            file.seek(max(0, end - 1))
            if end == 0 or file.read(1) == b"\n":
                return
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def open_study(path: Path, maximize: bool) -> tuple[optuna.Study, KernelLock]:
    """The study in a journal file, created if missing, and its lock.

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
    except OSError as error:
        raise PrunekitError(
            f"cannot write the journal {str(path)!r} ({error.strerror}); choose another folder"
        ) from None
    except PrunekitError:
        raise
    except (KeyError, AssertionError, TypeError, ValueError) as error:
        raise PrunekitError(
            f"{str(path)!r} holds no study that can be read ({reason(error)}); give another path"
        ) from error
    finally:
        optuna.logging.set_verbosity(before)
    return study, journal.lock
