"""The work folder of a streamed run, which keeps finished parts so that the run can resume."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from prunekit.annotations import shown
from prunekit.checkpoint.folders import read_object
from prunekit.digests import check_recorded, digest_of_file, digest_of_text
from prunekit.errors import DiskError, PrunekitError
from prunekit.files import check_new_folder, fcntl, open_to_readers, write_text, writing

Facts = Mapping[str, Any]
"""Arguments of a run, as JSON: two runs with equal arguments give equal files."""


class Work:
    """A folder beside the output. Its finished steps are used by a run with the same arguments, and by no other.

    Attributes:
        root: the folder, `.OUT.partial` beside OUT; it may not exist yet.
        scores: scores of the groups finished so far.
        source: a copy of the source with the model's own tensors, where it has others.
        checkpoint: the unfinished output folder; a rename makes it OUT.
        plan: the plan, which the output carries along.
        written: the note of the finished files of the output.
    """

    def __init__(self, out: Path) -> None:
        self.root = out.absolute().parent / f".{out.name}.partial"
        self.scores, self.source = self.root / "scores.safetensors", self.root / "source"
        self.checkpoint, self.written = self.root / "checkpoint", self.root / "written.json"
        self.plan = self.checkpoint / "plan.json"
        self._anew = f"remove the folder {str(self.root)!r} to begin anew"

    def check(self, facts: Mapping[str, Facts]) -> None:
        """Raise an error for a folder in which a step was made with something else; nothing is written.

        Args:
            facts: step → what it is made with.

        Raises:
            PrunekitError: names the first fact that differs, or the file of them that is damaged.
        """
        for step, now in json.loads(json.dumps(facts)).items():
            path = self.root / f"{step}.json"
            before = self._noted(path) if path.is_file() else now
            for name in [name for name in now if now[name] != before.get(name)][:1]:
                raise PrunekitError(
                    f"{str(self.root)!r} holds an unfinished run with another {name}: {shown(before.get(name))}, now "
                    f"{shown(now[name])}; give what it was given to go on, or remove that folder to begin anew"
                )

    def _noted(self, path: Path) -> dict[str, Any]:
        try:
            return read_object(path)
        except PrunekitError as error:
            raise PrunekitError(f"{error}, or {self._anew}") from None

    def check_written(self) -> None:
        """Raise an error for a finished file that was changed, cut short or removed since.

        Raises:
            PrunekitError: names the file.
        """
        try:
            check_recorded(self.written, self.checkpoint, self._anew)
        except PrunekitError as error:
            told = str(error)
            raise PrunekitError(told if self._anew in told else f"{told}, or {self._anew}") from None

    def claim(self, facts: Mapping[str, Facts]) -> None:
        """Write down the arguments of each step for `check`; makes the folder where there is none.

        Raises:
            PrunekitError: as `check`, or the folder cannot be made.
        """
        self.check(facts)
        if not self.checkpoint.is_dir():
            with writing(self.root, whole=False):
                self.checkpoint.mkdir(parents=True)
        for step, now in facts.items():
            write_text(self.root / f"{step}.json", json.dumps(now, indent=1))

    def disclaim(self) -> None:
        """Remove the folder, unless a step is finished there."""
        if not self.scores.is_file() and not self.source.is_dir():
            shutil.rmtree(self.root)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep every other run out of the folder, where the system lets go of the lock of a run that was killed.

        Raises:
            PrunekitError: another run is at work there, or nothing can be written there.
        """
        if fcntl is None:
            yield
            return
        path = self.root.with_name(f"{self.root.name}.lock")
        with writing(path, whole=False):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("w")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))
            except BlockingIOError:
                held = False
            except OSError:  # a disk that keeps no locks
                held = True
            if not held:  # or it ended between our opening the file and locking it, and another one has begun
                raise PrunekitError(
                    f"another run is at work in {str(self.root)!r}; wait until it ends, or choose another output"
                )
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    @contextmanager
    def kept_if_stopped(self) -> Iterator[None]:
        """Say where the finished part lies when the block is interrupted, or the disk is full.

        Raises:
            PrunekitError: something cannot be written.
            KeyboardInterrupt: with these words.
        """
        kept = f"what is finished lies in {str(self.root)!r}; the same call goes on from it"
        try:
            yield
        except KeyboardInterrupt:
            raise KeyboardInterrupt(kept) from None
        except (OSError, SafetensorError, DiskError) as error:
            cause = error.__cause__ if isinstance(error, DiskError) else error
            reason = getattr(cause, "strerror", None) or cause
            raise DiskError(f"cannot go on ({reason}); {kept}, once there is room") from error

    def finish(self, out: Path) -> None:
        """Move the finished output into its place and drop the rest.

        Raises:
            PrunekitError: something stands there by now; nothing is lost.
        """
        check_new_folder(out)
        for beside in self.checkpoint.glob(".*"):  # what a killed run was just writing
            beside.unlink()
        open_to_readers(self.checkpoint)
        if out.exists():
            out.rmdir()
        self.checkpoint.replace(out)
        shutil.rmtree(self.root)


def facts_of_files(folder: Path) -> dict[str, list[int | str]]:
    """Name, size, time of change and a digest of a checkpoint's configuration, index and weights.

    Copies that keep the time, such as those out of archives, are distinguished by the digest.
    """
    found = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns, digest_of_file(path)] for path in found}


def fingerprint(tokens: Tensor | None) -> str | None:
    """A short name for a calibration set."""
    return None if tokens is None else digest_of_text(repr(tokens.tolist()))[:16]
