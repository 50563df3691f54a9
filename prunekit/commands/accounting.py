"""What the commands say of the loss before and after: windows to measure on, a line of output, a warning."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from prunekit.commands.choosing import drawn
from prunekit.errors import PrunekitError

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.account import LossChange

GIVE = "give --calibration with a text file or 'world', of which some windows are held out"


def held_out_windows(args: argparse.Namespace, tokenizer: Any, *, seen: bool) -> "Tensor | None":
    """Windows of the calibration text that nothing else is computed from.

    Args:
        args: `--calibration` and how its windows are drawn; the embedded model has a text of its own.
        tokenizer: of the model; None where it has none.
        seen: whether windows are drawn from the text for scores or a re-fit, too; others are taken then.

    Returns:
        int64 (n, seq_len); None where there is no text, no tokenizer, or no more text than was seen.

    Raises:
        PrunekitError: a text that cannot be read.
    """
    from prunekit.calibration import calibration_set

    text = args.calibration or ("world" if args.model == "world" else None)
    if text is None or tokenizer is None:
        return None
    options: dict[str, Any] = dict(drawn(args))
    try:
        return calibration_set(text, tokenizer, **options, held_out=seen)
    except PrunekitError:
        if seen:  # it was read before: it is too short
            return None
        raise


def held_out_of(windows: "Tensor") -> "tuple[Tensor, Tensor | None]":
    """Recovery data without its last twentieth, and that twentieth, at most what is measured on; None where too few."""
    from prunekit.account import MOST_TOKENS

    n = min(len(windows) // 20, max(1, MOST_TOKENS // windows.shape[1]))
    return (windows[:-n], windows[-n:]) if n else (windows, None)


def tell(change: "LossChange | None", give: str = GIVE) -> None:
    """Say on standard error that a step did much harm, with what to try; or that nobody knows."""
    from prunekit.account import HOW

    if change is None or (change.is_measured and not change.is_large):
        return
    said = change.warning or repr(change).replace(HOW, give)
    print(f"prunekit: {said}", file=sys.stderr)
