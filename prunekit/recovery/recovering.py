"""A pruned model and data → a recovered model."""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from prunekit.calibration import check_finite, check_tokens
from prunekit.errors import PrunekitError
from prunekit.recovery.data import token_windows
from prunekit.recovery.log import RecoveryLog
from prunekit.recovery.lora import LoRA, attach, detach
from prunekit.recovery.training import flags_kept, seeded, train
from prunekit.text import TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def recover(
    model: "PreTrainedModel",
    method: LoRA,
    data: Tensor | TextSource,
    *,
    tokenizer: Any = None,
    seq_len: int | None = None,
    inplace: bool = False,
    output_dir: str | Path | None = None,
) -> "PreTrainedModel":
    """Train a model after pruning, to win back what the cut lost.

    Runs where the Trainer finds itself: CPU, one or several GPUs, or `torchrun`. The same seed and data give
    the same weights on the same machine, and the caller's random numbers are not disturbed.

    Args:
        model: a causal LM, its layers as uneven as they may be.
        method: how to train, such as `LoRA()` or `LoRA.paper()`.
        data: integers (n, seq_len); a `datasets.Dataset` with `input_ids` or a text column; or text, documents,
            a file, `"world"`.
        tokenizer: needed where `data` is text.
        seq_len: tokens a window where `data` is not a tensor; None takes the method's.
        inplace: change `model` itself, which needs no second copy of the weights.
        output_dir: a folder that does not exist yet, for the adapter (safetensors) and the loss curve (JSON).

    Returns:
        The model with the updates merged into its weights, in evaluation mode, with the dtype, device and
        configuration of `model`. Its `recovery_log` is the loss curve, a `RecoveryLog`.

    Raises:
        PrunekitError: an unknown method, data that is empty or too short or text without a tokenizer, a folder
            that exists, weights that are not finite, or a loss that becomes so. `model` is then unchanged.
    """
    if type(method) not in RECOVERIES:
        known = ", ".join(kind.__name__ for kind in RECOVERIES)
        raise PrunekitError(f"recovery method {method!r} is unknown; give one of {known}, such as LoRA(r=8)")
    if output_dir is not None and Path(output_dir).exists():
        raise PrunekitError(f"output_dir {str(output_dir)!r} exists already: give a new folder")
    check_finite(model)
    length = method.seq_len if seq_len is None else seq_len
    tokens = check_tokens(token_windows(data, tokenizer, length), model).cpu()
    changed = model if inplace else copy.deepcopy(model)
    log = RECOVERIES[type(method)](changed, method, tokens, output_dir)
    changed.recovery_log = log  # type: ignore[assignment]
    return changed.eval()


def recover_with_lora(model: nn.Module, method: LoRA, tokens: Tensor, output_dir: str | Path | None) -> RecoveryLog:
    """Attach, train, merge, in place; whatever stops it, the model has its own weights and no adapters.

    Raises:
        PrunekitError: what `attach` and `train` raise.

    Source: LLM-Pruner, section 3.3.
    """
    merge = False
    with seeded(method.seed), flags_kept(model):
        adapted = attach(model, method)
        try:
            log = train(adapted, tokens, method)
            if output_dir is not None:
                _save(adapted, log, Path(output_dir))
            merge = True
        finally:
            detach(adapted, merge=merge)
    return log


def _save(adapted: Any, log: RecoveryLog, folder: Path) -> None:
    """Adapter and loss curve, written beside and moved into place, by the first process alone."""
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
        whole = Path(beside) / folder.name
        adapted.save_pretrained(whole, safe_serialization=True)
        log.save(whole / "recovery_log.json")
        whole.rename(folder)


RECOVERIES: dict[type, Callable[[nn.Module, Any, Tensor, str | Path | None], RecoveryLog]] = {LoRA: recover_with_lora}
