"""The folder of a training that goes on where it was stopped: the Trainer's checkpoints, and what run they are of."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from prunekit.digests import RECORD, check_recorded, digest_of
from prunekit.errors import PrunekitError
from prunekit.files import read_json, write_text
from prunekit.processes import this_process
from prunekit.recovery.data import TrainingWindows


class Resume(NamedTuple):
    """The place from which an interrupted training resumes.

    Attributes:
        folder: of the Trainer's own checkpoints; the newest is kept, and taken up where there is one.
        every: optimiser steps between two.
    """

    folder: Path
    every: int


def digest_of_run(model: nn.Module, windows: TrainingWindows, run: list[Any]) -> str:
    """What distinguishes a run from others.

    Args:
        model: before the training, without adapters.
        windows: that it trains on.
        run: its settings, as plain values.
    """
    digest = digest_of(model)
    digest.update(json.dumps([*run, list(windows.tokens.shape)]).encode())
    for values in (windows.tokens, windows.labels):
        digest.update(values.cpu().numpy().tobytes())
    return digest.hexdigest()


def open_run(folder: Path, every: int, digest: str) -> Resume:
    """A folder for checkpoints, new or of the same run; a note in it identifies the run.

    Args:
        folder: of the checkpoints.
        every: optimiser steps between two.
        digest: of the run.

    Raises:
        PrunekitError: what stands there belongs to another run.
    """
    note = folder / "run.json"
    if folder.is_file():
        raise PrunekitError(f"{str(folder)!r} is a file; give a new folder")
    with this_process().main_process_first():
        told = _told(note) if note.exists() else None
        if told != digest and folder.exists() and any(path.name[0] != "." for path in folder.iterdir()):
            raise PrunekitError(
                f"{str(folder)!r} holds something else than this run; give a new folder, or the same model, data and "
                "arguments"
            )
        if told is None:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(note, json.dumps(digest))
        for path in folder.glob("checkpoint-*"):  # half-written; the Trainer might keep it in place of a newer one
            if path.is_dir() and not (path / RECORD).exists():
                shutil.rmtree(path)
    return Resume(folder, every)


def _told(note: Path) -> Any:
    """What a note says.

    Raises:
        PrunekitError: it is damaged.
    """
    try:
        return read_json(note)
    except PrunekitError as error:
        raise PrunekitError(f"{error}, or delete the folder {str(note.parent)!r} to begin anew") from None


def newest_checkpoint(folder: Path) -> str | None:
    """The last complete checkpoint in a folder; the record of its files is written last."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{RECORD}")]
    return max(map(str, whole), key=steps_of, default=None)


def checked_checkpoint(folder: Path) -> str | None:
    """The checkpoint to go on from.

    Raises:
        PrunekitError: one of its files was changed, cut short or removed.
    """
    newest = newest_checkpoint(folder)
    if newest is not None:
        advice = f"delete the folder {newest!r} to begin anew, or give the files as they were"
        check_recorded(Path(newest) / RECORD, Path(newest), advice)
    return newest


def steps_of(checkpoint: str) -> int:
    """Optimiser steps that a checkpoint was written after."""
    return int(checkpoint.rpartition("-")[2])


def take_up(model: Any, optimizer: torch.optim.Optimizer | None, checkpoint: str) -> list[dict[str, float]]:
    """Adapters and optimiser of a training that is finished; its history."""
    from peft import load_peft_weights, set_peft_model_state_dict

    device = str(next(model.parameters()).device)
    set_peft_model_state_dict(model, load_peft_weights(checkpoint, device=device))
    if optimizer is not None:
        optimizer.load_state_dict(torch.load(Path(checkpoint) / "optimizer.pt", map_location=device, weights_only=True))
    history: list[dict[str, float]] = json.loads((Path(checkpoint) / "trainer_state.json").read_text())["log_history"]
    return history
