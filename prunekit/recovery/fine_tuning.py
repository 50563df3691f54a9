"""`recover`: trains a pruned model and returns it with its log."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from prunekit.account import check_measure, closed, opened, set_aside
from prunekit.calibration import check_finite
from prunekit.checks import FilePath, Length, Model, Tokenizer, checked
from prunekit.digests import digest_of
from prunekit.documents import TextSource, is_stream, logger
from prunekit.errors import PrunekitError, warn
from prunekit.files import new_folder
from prunekit.processes import check_one_place, check_shards, this_process
from prunekit.recovery.data import TrainingWindows, TrainOn, windows_for
from prunekit.recovery.distillation import Distillation
from prunekit.recovery.lora import LoRA, attach, detach
from prunekit.recovery.resuming import digest_of_run, open_run
from prunekit.recovery.settings import FullTuning, train_all
from prunekit.recovery.training import flags_kept, seeded, train
from prunekit.sparsity.zero_masks import TRAINED, masked_adapters, renew_report, share_of_zeros
from prunekit.sparsity.zero_masks import keep_zeros as zeros_kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOG = "recovery_log.json"
MANY_ZEROS = 0.05  # share of zeros that does not occur by chance


@checked
def recover(
    model: Model,
    method: LoRA | FullTuning | Distillation,
    data: Tensor | TextSource | TrainingWindows,
    *,
    train_on: TrainOn = "replies",
    keep_zeros: bool | None = None,
    tokenizer: Tokenizer | None = None,
    seq_len: Length | None = None,
    inplace: bool = False,
    output_dir: FilePath | None = None,
    folder: FilePath | None = None,
    held_out: Tensor | None = None,
    measure: bool = True,
) -> "PreTrainedModel":
    """Trains a model after pruning to recover its quality.

    Runs where the Trainer finds itself: CPU, one or several GPUs, or several processes of `accelerate launch` or
    `torchrun` (docs/scaling.md): they share out each step's windows, the first alone writes files, and all return the
    same model. The same seed and data give the same weights on the same machine, and the caller's random numbers are
    not disturbed.

    Args:
        model: a causal LM, its layers as uneven as they may be.
        method: how to train, such as `LoRA()`, `LoRA.paper()` or `FullTuning()`; or `Distillation(dense)` with one of
            them, towards what the model before pruning predicts.
        data: integers (n, seq_len); or what `prunekit.documents.documents_of` reads: text, documents, chats, a file, a
            data set, token ids, `"world"`. Data that is streamed is read as far as the method's `max_steps` need.
        train_on: `"replies"` trains on the replies alone where the data says which these are: what the assistant says
            in a chat, completions of prompts, outputs of instructions. `"all"` trains on all tokens. The loss before
            and after is that of all tokens.
        keep_zeros: weights that are zero stay so: LoRA's update is masked while it is trained and merged, full
            fine-tuning's gradients are (see `masked_adapters` and `keep_zeros` of `prunekit.sparsity`). By default
            where the model carries a `sparsity_report`, of `sparsify` or of the checkpoint.
        tokenizer: needed where `data` is text.
        seq_len: tokens a window where `data` is not a tensor; None takes the method's.
        inplace: change `model` itself, which needs no second copy of the weights.
        output_dir: a folder that does not exist yet, for the loss curve (JSON) and LoRA's adapter (safetensors), which
            holds A and B alone: where zeros were kept, peft without `masked_adapters` would fill them with it.
        folder: for checkpoints of LoRA's training, one every tenth of the steps; a training that was stopped goes on
            from there when called again with the same model, data and arguments. (Whether kept predictions are of the
            same teacher cannot be seen.)
        held_out: integers (n, seq_len) that are not trained on, on which the loss is measured before and after, about
            1,024 of these tokens. None takes the first windows of the data: training lowers the loss there more than
            elsewhere, and the account says so.
        measure: whether to measure the loss.

    Returns:
        The model with the updates merged into its weights, in evaluation mode, with the dtype, device and
        configuration of `model`. Its `recovery_log` is the loss curve, a `RecoveryLog`; its `loss_change`, a
        `LossChange`, the loss before and after (`DamageWarning` says where it rose by much); what earlier steps did
        stands in `earlier_changes`; its `sparsity_report`, if it had one, is counted again.

    Raises:
        PrunekitError: an unknown method, data that is empty or too short or text without a tokenizer, a folder
            that exists, weights that are not finite or cannot be trained, or a loss that becomes not finite. `model` is
            then unchanged, unless it is trained fully and `inplace`.
    """
    if output_dir is not None and Path(output_dir).exists():
        raise PrunekitError(f"output_dir {str(output_dir)!r} exists already: give a new folder")
    check_measure(measure, held_out)
    _check_length(seq_len, data)
    how = method.training if isinstance(method, Distillation) else method
    if folder is not None and not isinstance(how, LoRA):
        raise PrunekitError(
            "folder= keeps checkpoints of LoRA's pairs, not of whole models; leave it out, or give LoRA()"
        )
    check_shards(["folder="] if folder is not None else [])
    check_one_place(model)
    check_finite(model)
    keep = _zeros_stay(model, keep_zeros)
    check_shards(["keep_zeros=True"] if keep else [])
    length = how.seq_len if seq_len is None else seq_len
    enough = how.most_windows if is_stream(data) else None
    windows = windows_for(model, data, tokenizer, length, train_on=train_on, enough=enough)
    for remark in how.unheeded(len(windows)):
        logger.warning(remark)
    if folder is not None:  # a number of steps is what tells whether a checkpoint is the last
        how = replace(how, max_steps=how.n_steps(len(windows)))
    opening = opened("recover", model, held_out, {"the training": windows.tokens}) if measure else None
    objective = method.objective(windows, model) if isinstance(method, Distillation) else None
    digest = "" if folder is None else _digest(model, windows, method, keep)
    changed: Any = model if inplace else copy.deepcopy(model)
    prepared: Any = _adapted(changed, how, keep) if isinstance(how, LoRA) else _unfrozen(changed, keep)
    with seeded(how.seed), flags_kept(changed), prepared as trained:
        resume = None if folder is None else open_run(Path(folder), math.ceil(how.n_steps(len(windows)) / 10), digest)
        log = replace(train(trained, windows, how, objective=objective, resume=resume), method=repr(method))
        out = Path(output_dir) if output_dir is not None and this_process().is_main_process else None
        if out is not None:  # before anything that may fail: a training that is finished is not lost
            with new_folder(out) as beside:
                if isinstance(how, LoRA):
                    trained.save_pretrained(str(beside), safe_serialization=True)
                log.save(beside / LOG)
    check_finite(changed)
    set_aside(changed)
    if opening is not None:
        log = replace(log, loss_change=closed(opening, changed))
        if out is not None:
            log.save(out / LOG)
    changed.recovery_log = log  # type: ignore[assignment]
    renew_report(changed, TRAINED)
    return changed.eval()


def _check_length(seq_len: int | None, data: Any) -> None:
    """Raise an error for a length of windows where the data has one."""
    tokens = data.tokens if isinstance(data, TrainingWindows) else data
    if seq_len is not None and isinstance(tokens, Tensor) and tokens.ndim == 2 and tokens.shape[1] != seq_len:
        raise PrunekitError(
            f"seq_len={seq_len} cuts text into windows, and the data is windows of {tokens.shape[1]} tokens; leave it "
            "out, or give text"
        )


def _zeros_stay(model: nn.Module, asked: bool | None) -> bool:
    if asked is not None:
        return asked
    told = getattr(model, "sparsity_report", None) is not None
    share = 0.0 if told else share_of_zeros(model)
    if share > MANY_ZEROS:
        warn(
            f"{share:.0%} of the model's weights are zero and no report says that they shall stay so: training fills "
            "them; give keep_zeros=True to keep them, or False to turn off this warning"
        )
    return told


@contextmanager
def _adapted(model: nn.Module, method: LoRA, keep_zeros: bool) -> Iterator[Any]:
    """A context in which a model has LoRA pairs: merged at its end, dropped after an error.

    Source: LLM-Pruner, section 3.3. That zeros are kept is not of that paper; see `masked_adapters`.
    """
    adapted = attach(model, method)
    try:
        with masked_adapters(adapted) if keep_zeros else nullcontext():
            yield adapted
            detach(adapted, merge=True)  # while the masks hold
    except BaseException:
        detach(adapted, merge=False)
        raise


@contextmanager
def _unfrozen(model: nn.Module, keep_zeros: bool) -> Iterator[nn.Module]:
    """A context in which all parameters are trained; an interrupt leaves them partly trained."""
    train_all(model)
    with zeros_kept(model) if keep_zeros else nullcontext():
        yield model


def _digest(model: nn.Module, windows: TrainingWindows, method: LoRA | FullTuning | Distillation, keep: bool) -> str:
    teacher = getattr(method, "teacher", None)
    dense = digest_of(teacher).hexdigest() if isinstance(teacher, nn.Module) else None
    plan = getattr(method, "plan", None)
    return digest_of_run(model, windows, [repr(method), keep, dense, plan and plan.keep])
