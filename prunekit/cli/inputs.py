"""Inputs of verbs: models, calibration text, and held-out windows."""

from collections.abc import Iterable
from typing import Annotated, Any

from torch import Tensor

from prunekit.account import HOW, LossChange
from prunekit.calibration import calibration_set
from prunekit.checkpoint import load, save
from prunekit.cli.console import Of, flag, say
from prunekit.errors import PrunekitError
from prunekit.models import fitting_length
from prunekit.names import WORLD, is_world

Loading = Annotated[dict[str, Any], Of(load, "dtype", "device", "device_map", "offload_folder")]
Writing = Annotated[dict[str, Any], Of(save, "max_shard_size")]
Drawing = Annotated[dict[str, Any], Of(calibration_set, "n_samples", "seq_len", "seed")]
GIVE = "give --calibration with a text file or 'world'"


def text_for(model: str, calibration: str | None, why: str | None = None, instead: str = "") -> str | None:
    """The calibration text: the one given, else the embedded model's own; None where nothing reads one.

    Raises:
        PrunekitError: no text, but `why` needs one.
    """
    text = WORLD if calibration is None and is_world(model) else calibration
    if text is None and why is not None:
        raise PrunekitError(f"{why} reads text; {GIVE}{instead}")
    return text


def drawn(given: dict[str, int], config: Any, **defaults: int) -> dict[str, Any]:
    """Options for drawing calibration windows: given values, else defaults within the model's limit."""
    if "seq_len" in defaults:
        defaults["seq_len"] = fitting_length(defaults["seq_len"], config)
    return {"seed": 0, **defaults, **given}


def check_drawing(text: str | None, given: Iterable[str]) -> None:
    """Raise an error for options of a draw from a text that is not read.

    Args:
        text: the calibration text; None where none is read.
        given: names of the options of `calibration_set` that were given.

    Raises:
        PrunekitError: names the first of them.
    """
    option = next(iter(given), None)
    if text is None and option is not None:
        raise PrunekitError(
            f"{flag(option)} says how windows of a calibration text are drawn, and none is read here; "
            f"{GIVE}, or leave it out"
        )


def held_out_windows(text: str | None, tokenizer: Any, drawing: dict[str, Any], *, seen: bool) -> Tensor | None:
    """Windows of the calibration text that nothing else is computed from; None where it has no more.

    Args:
        text: the text, or None.
        tokenizer: of the model; None where it has none.
        drawing: how its windows are drawn.
        seen: whether windows are drawn from the text for scores or a re-fit, too; others are taken then.

    Raises:
        PrunekitError: a text that cannot be read.
    """
    if text is None or tokenizer is None:
        return None
    try:
        return calibration_set(text, tokenizer, **drawing, held_out=seen)
    except PrunekitError:
        if seen:  # it was read before: it is too short
            return None
        raise


def measured_loss(change: LossChange | None) -> dict[str, Any] | None:
    """The change of the loss for an answer; where it was not measured, standard error says how to measure it."""
    if change is None or not change.is_measured:
        say(repr(change).replace(HOW, f"{GIVE}, of which some windows are held out"))
    return None if change is None else change.to_dict()


def named_texts(given: str | None) -> dict[str, str]:
    """Texts as `name=file,name=file`; a text without a name is its own."""
    parts = [part.partition("=") for part in (given or "").split(",") if part]
    return {name: path or name for name, _, path in parts}
