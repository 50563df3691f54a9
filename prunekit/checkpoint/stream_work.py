"""The work folder of a streamed run, which keeps finished parts so that the run can resume."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor

from prunekit.annotations import shown
from prunekit.checkpoint.folders import read_object
from prunekit.digests import digest_of_text
from prunekit.errors import DiskError, PrunekitError
from prunekit.files import check_new_folder, open_to_readers, write_text, writing

Facts = Mapping[str, Any]
"""Arguments of a run, as JSON: two runs with equal arguments give equal files."""


class Work:
    """A folder beside the output. Its finished steps are used by a run with the same arguments, and by no other.

    Attributes:
        root: the folder, `.OUT.partial` beside OUT; it may not exist yet.
        facts: the file of its arguments.
        scores: scores of the groups finished so far.
        source: a copy of the source with the model's own tensors, where it has others.
        checkpoint: the unfinished output folder; a rename makes it OUT.
        plan: the plan, which the output carries along.
    """

    def __init__(self, out: Path) -> None:
        self.root = out.absolute().parent / f".{out.name}.partial"
        self.facts, self.scores, self.source = (self.root / n for n in ("facts.json", "scores.safetensors", "source"))
        self.checkpoint = self.root / "checkpoint"
        self.plan = self.checkpoint / "plan.json"

    def check(self, facts: Facts) -> None:
        """Raise an error for a folder that was made with something else; nothing is written.

        Raises:
            PrunekitError: names the first fact that differs, or the file of them that is damaged.
        """
        if not self.checkpoint.exists():  # nothing was made yet
            return
        before = read_object(self.facts)
        for name, now in json.loads(json.dumps(facts)).items():
            if now != before.get(name):
                raise PrunekitError(
                    f"{str(self.root)!r} holds an unfinished run with another {name}: {shown(before.get(name))}, now "
                    f"{shown(now)}; give what it was given to go on, or remove that folder to begin anew"
                )

    def claim(self, facts: Facts) -> None:
        """Write down the arguments for `check`; makes the folder where there is none."""
        self.root.mkdir(parents=True, exist_ok=True)
        write_text(self.facts, json.dumps(facts, indent=1))
        self.checkpoint.mkdir(exist_ok=True)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep every other run out of the folder.

        Raises:
            PrunekitError: another run is at work there, or nothing can be written there.
        """
        path = self.root.with_name(f"{self.root.name}.lock")
        lock = FileLock(path)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise PrunekitError(
                    f"another run is at work in {str(self.root)!r}; wait until it ends, or choose another output"
                ) from None
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            lock.release()

    @contextmanager
    def kept_if_stopped(self) -> Iterator[None]:
        """Say where the finished part lies when the block is interrupted, or the disk is full, or a part is damaged.

        Raises:
            PrunekitError: something cannot be written, or read back.
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
        except PrunekitError as error:
            if f"{self.root}/" not in str(error):
                raise
            raise PrunekitError(f"{error}, or remove the folder {str(self.root)!r} to begin anew") from error

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


def facts_of_files(folder: Path) -> dict[str, list[int]]:
    """Name, size and time of change of a checkpoint's configuration, index and weights."""
    found = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in found}


def fingerprint(tokens: Tensor | None) -> str | None:
    """A short name for a calibration set."""
    return None if tokens is None else digest_of_text(repr(tokens.tolist()))[:16]
