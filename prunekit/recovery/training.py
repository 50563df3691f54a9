"""Runs the transformers Trainer over windows of tokens and cleans up after it."""

import copy
import math
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import StackDataset

from prunekit.account import few, loss_on
from prunekit.calibration import all_finite
from prunekit.checks import PROCESS
from prunekit.compat import LOSS_KEYWORDS
from prunekit.documents import logger
from prunekit.errors import PrunekitError
from prunekit.files import writing
from prunekit.processes import evenly, is_sharded, n_processes
from prunekit.recovery.data import TrainingWindows
from prunekit.recovery.log import RecoveryLog, log_of, progress
from prunekit.recovery.resuming import Resume, checked_checkpoint, steps_of, take_up
from prunekit.recovery.settings import TrainingSettings

if TYPE_CHECKING:
    from transformers import TrainingArguments

_ON_DEVICE = 8  # windows in memory at once; a larger batch is accumulated
# A model and a batch → what is minimised. The batch has input_ids, labels, and the number of each window.
Objective = Callable[[Any, dict[str, Tensor]], Tensor]


def train(
    model: nn.Module,
    windows: TrainingWindows,
    method: TrainingSettings,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    resume: Resume | None = None,
    objective: Objective | None = None,
) -> RecoveryLog:
    """Train the parameters that require a gradient, on every process and device that the Trainer finds.

    Args:
        model: adapted, or of which all is trained; changed in place, and left in training mode on the Trainer's device.
        windows: tokens and labels, on the CPU.
        method: the optimiser's settings.
        optimizer: another than AdamW with the method's learning rate; the schedule is the method's.
        resume: keep checkpoints, and go on from the newest; None keeps none.
        objective: what is minimised; None is the loss of the text.

    Returns:
        The loss curve.

    Raises:
        PrunekitError: the loss is not finite.
    """
    from transformers import Trainer, default_data_collator
    from transformers.trainer_callback import PrinterCallback

    numbers = {} if objective is None else {"number": torch.arange(len(windows))}
    rows = StackDataset(input_ids=windows.tokens, labels=windows.labels, **numbers)  # type: ignore[arg-type]
    trained = copy.deepcopy(model) if is_sharded() else model  # FSDP shares out the weights of what it trains, for good
    with nullcontext(str(resume.folder)) if resume else tempfile.TemporaryDirectory() as folder:
        trainer: Any = Trainer(
            model=trained,
            args=_arguments(method, len(rows), folder, resume.every if resume else None),
            train_dataset=rows,
            data_collator=default_data_collator,
            callbacks=[progress()],
            optimizers=(optimizer, None),
        )
        # The Trainer would divide by seq_len labels where the model predicts seq_len - 1 of them.
        setattr(trainer, LOSS_KEYWORDS, False)
        if objective is not None:
            trainer.compute_loss = lambda model, inputs, **_: objective(model, inputs)
        trainer.remove_callback(PrinterCallback)
        newest = checked_checkpoint(resume.folder) if resume else None
        if newest is not None and steps_of(newest) >= (method.max_steps or math.inf):
            history = take_up(model, optimizer, newest)  # the Trainer would make one step more
        else:
            with writing(Path(folder), whole=False):
                trainer.train(resume_from_checkpoint=newest)
            history = trainer.state.log_history
    if trained is not model:
        _bring_back(trained, model)
    log = log_of(model, windows.tokens, method, history)
    _check_outcome(model, windows.tokens, method)
    return log


@torch.no_grad()
def _bring_back(sharded: nn.Module, model: nn.Module) -> None:
    """Give a model what was trained in its copy, put together from the shards of all processes."""
    for parameter, shard in zip(model.parameters(), sharded.parameters(), strict=True):
        if parameter.requires_grad:
            parameter.copy_(shard.full_tensor() if isinstance(shard, DTensor) else shard)


def relative_error(outputs: Tensor, wanted: Tensor) -> Tensor:
    """‖Y − Y_wanted‖² / ‖Y_wanted‖² of each token, their mean; both (…, width)."""
    size = wanted.square().sum(-1).clamp_min(torch.finfo(wanted.dtype).tiny)
    return ((outputs - wanted).square().sum(-1) / size).mean()


def _check_outcome(model: nn.Module, tokens: Tensor, method: TrainingSettings) -> None:
    """Raise an error for weights or a loss that the last update left not finite: each loss is of the step before."""
    broken = [name for name, p in model.named_parameters() if not all_finite(p.detach())]
    if broken or math.isinf(loss_on(model, few(tokens))):
        what = f"the weights of {broken[0]} are" if broken else "the loss is"
        raise PrunekitError(
            f"{what} not finite after the last step: learning_rate={method.learning_rate} is too high, or the model's "
            "precision too low"
        )


def _arguments(method: TrainingSettings, n_windows: int, folder: str, every: int | None) -> "TrainingArguments":
    from transformers import TrainingArguments

    wanted = method.windows_a_step(n_windows)
    taken = evenly(wanted)
    batch = taken // n_processes()
    if taken != wanted:
        logger.warning(
            f"batch_size: {wanted} windows a step cannot be shared out evenly among {n_processes()} processes: "
            f"a step takes {taken}"
        )
    at_once = math.gcd(batch, _ON_DEVICE)
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=batch // at_once,
        num_train_epochs=method.epochs,
        max_steps=method.max_steps or -1,
        learning_rate=method.learning_rate,
        weight_decay=method.weight_decay,
        lr_scheduler_type="linear",
        warmup_steps=method.warmup,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if every else "no",
        save_steps=every or 1,
        save_total_limit=1,
        report_to="none",
        use_cpu=not torch.accelerator.is_available(),  # without it, processes on CPUs would not find each other
        disable_tqdm=True,  # a bar of our own shows the loss without a line a step
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=method.seed,
    )


@contextmanager
def flags_kept(model: Any) -> Iterator[None]:
    """A context that restores trainable flags, modes, device and use of the KV cache, and removes gradients."""
    device, mode, use_cache = next(model.parameters()).device, model.training, getattr(model.config, "use_cache", None)
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    finally:
        for parameter, flag in trained.items():
            parameter.requires_grad_(flag)
            parameter.grad = None
        model.train(mode)
        model.config.use_cache = use_cache  # the Trainer turns it off
        if next(model.parameters()).device != device:
            model.to(device)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A context with all random generators seeded, for one thread at a time; the caller's states are restored."""
    with PROCESS, torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        states = random.getstate(), np.random.get_state()
        try:
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
