"""Progressive pruning: units shrink to zero while LoRA trains, and what they knew moves into the others."""

import copy
import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from prunekit.calibration import check_finite, check_tokens
from prunekit.discovery import Groups, discover
from prunekit.errors import PrunekitError
from prunekit.files import write_text
from prunekit.pruning import PruningPlan, plan
from prunekit.pruning.planning import plan_without
from prunekit.recovery.data import token_windows
from prunekit.recovery.lhspg import LHSPG, Saliency, update_saliency
from prunekit.recovery.log import RecoveryLog
from prunekit.recovery.lora import LoRA, attach, detach
from prunekit.recovery.training import Resume, newest_checkpoint, seeded, train
from prunekit.text import TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFIX = "base_model.model."  # of every name inside a peft model


class Progressed(NamedTuple):
    """What progressive pruning returns.

    Attributes:
        model: of the shape that it had, with zeros; `prune(model, plan)` computes the same and is smaller. Its
            `recovery_log` is `log`.
        plan: the units that are zero go.
        log: the loss curve.
        history: the norm of each of these units, step by step, as `LHSPG.history` has it.
    """

    model: Any
    plan: PruningPlan
    log: RecoveryLog
    history: pd.DataFrame

    def __repr__(self) -> str:
        return f"Progressed({self.plan!r}; {self.log!r})"

    def before_the_end(self) -> pd.DataFrame:
        """How large the units still were one step before each period's end, against its start.

        Returns:
            One row a period: period, units, start and before_end (mean norms), share (before_end / start, mean over
            units), largest_share.
        """
        rows = []
        for period, table in self.history.groupby("period"):
            norms = table.pivot_table(index=["group", "unit"], columns="step", values="norm")
            share = norms.iloc[:, -2] / norms.iloc[:, 0].clip(lower=1e-30)
            means = norms.iloc[:, 0].mean(), norms.iloc[:, -2].mean()
            rows.append((period, len(norms), *means, share.mean(), share.max()))
        return pd.DataFrame(rows, columns=["period", "units", "start", "before_end", "share", "largest_share"])


def prune_progressively(
    model: "PreTrainedModel",
    pruning_ratio: float,
    data: Tensor | TextSource,
    method: LoRA | None = None,
    *,
    protect: Iterable[str] = (),
    n_periods: int = 5,
    warmup: float = 0.1,
    rest: float = 0.0,
    saliency: Saliency = update_saliency,
    tokenizer: Any = None,  # noqa: ANN401
    folder: str | Path | None = None,
) -> Progressed:
    """Train with LoRA while units go period by period, until they are exactly zero (LHSPG).

    Args:
        model: a causal LM; it is left alone.
        pruning_ratio: fraction of all the model's parameters that is to go, met within 0.5% or refused. Heads and FFN
            channels give up the same share; which layers lose them is up to saliency.
        data: as for `recover`.
        method: how LoRA trains; its steps are shared out between warm-up, periods and rest. None is `LoRA()`.
        protect: names of groups that lose nothing, such as `KnowledgeDistribution.unprunable()`.
        n_periods: in which the units go in equal parts.
        warmup: share of the steps before the first units are chosen, in [0, 1).
        rest: share of the steps after the last period, in [0, 1).
        saliency: which units go; see `LHSPG`.
        tokenizer: needed where `data` is text.
        folder: for checkpoints, one a period; a run that was stopped goes on from there when called again with the same
            arguments.

    Returns:
        The zeroed model, the plan that cuts the zeros out, the loss curve, and the norms on the way.

    Raises:
        PrunekitError: a budget that cannot be met, an unknown group, more periods than steps, bad data, a folder of
            another run, or a gradient that is not finite: then the last checkpoint in `folder` is a good one.

    Source: LoRAShear (arXiv 2310.18356), section 3.3. T_w, P and T_p are not given there: 5 periods and a tenth of the
        steps are ours.
    """
    check_finite(model)
    method = method or LoRA()
    tokens = check_tokens(token_windows(data, tokenizer, method.seq_len), model).cpu()
    method = replace(method, max_steps=method.n_steps(len(tokens)))
    steps = _split(method.max_steps or 0, n_periods, warmup, rest)
    groups = discover(model)
    prunable = groups.without(protect)
    wanted = units_for(prunable, pruning_ratio)
    resume = (
        None if folder is None else _open(Path(folder), steps.period, [method, pruning_ratio, steps], tokens, model)
    )
    changed = copy.deepcopy(model)
    with seeded(method.seed):
        adapted = attach(changed, method)
        ours = [
            g for g in discover(adapted) if _plain(g.name) in {p.name for p in prunable.of_kind(*wanted) if p.exact}
        ]
        optimizer = LHSPG(
            adapted, ours, wanted, lr=method.learning_rate, n_periods=n_periods, saliency=saliency,
            warmup_steps=steps.warmup, period_steps=steps.period,
        )  # fmt: skip
        try:
            log = train(adapted, tokens, method, optimizer=optimizer, resume=resume)
        except PrunekitError as error:
            raise PrunekitError(f"{error}; {_what_is_left(resume)}") from None
    small: Any = detach(adapted, merge=True).eval()
    small.recovery_log = log
    gone = {_plain(name): units for name, units in optimizer.redundant.items()}
    notes = {"pruning_ratio": pruning_ratio, "of": "parameters", "importance": "LHSPG", "n_periods": n_periods}
    chosen = plan_without(groups, gone, notes)
    return Progressed(small, chosen, log, optimizer.history().assign(group=lambda t: t["group"].map(_plain)))


def units_for(groups: Groups, pruning_ratio: float) -> dict[str, int]:
    """How many units of each kind go, so that all kinds give up the same share and the budget is met.

    Args:
        groups: those that may lose units.
        pruning_ratio: fraction of all the model's parameters, in [0, 1).

    Raises:
        PrunekitError: what `plan` raises.
    """
    alike = {group.name: torch.arange(group.n_units, dtype=torch.float64) for group in groups}
    summary = plan(groups, alike, pruning_ratio).summary()
    return {str(kind): int(row["before"] - row["after"]) for kind, row in summary.iterrows()}


def _what_is_left(resume: Resume | None) -> str:
    kept = newest_checkpoint(resume.folder) if resume else None
    return f"the last good state is in {kept}" if kept else "no checkpoint was kept; give folder=… to have some"


class _Steps(NamedTuple):
    warmup: int
    period: int


def _split(n_steps: int, n_periods: int, warmup: float, rest: float) -> _Steps:
    for name, share in (("warmup", warmup), ("rest", rest)):
        if not 0 <= share < 1:
            raise PrunekitError(f"{name}={share!r} is a share of the training's steps; give a number in [0, 1)")
    if isinstance(n_periods, bool) or not isinstance(n_periods, int) or n_periods < 1:
        raise PrunekitError(f"n_periods={n_periods!r}; give an integer of 1 or more")
    before = round(warmup * n_steps)
    period = (n_steps - before - round(rest * n_steps)) // n_periods
    if period < 1:
        raise PrunekitError(
            f"n_periods={n_periods} do not fit into {n_steps} steps of which {warmup:.0%} warm up and {rest:.0%} come "
            "after; give fewer periods, or a method with more max_steps or epochs"
        )
    return _Steps(n_steps - round(rest * n_steps) - n_periods * period, period)


def _plain(name: str) -> str:
    """A name of the adapted model as the model without adapters has it."""
    return name.removeprefix(_PREFIX)


def _open(folder: Path, every: int, settings: list[Any], tokens: Tensor, model: Any) -> Resume:  # noqa: ANN401
    """A folder for checkpoints, new or of the same run.

    Raises:
        PrunekitError: what stands there belongs to another run.
    """
    first = next(p for p in model.parameters()).detach().float().sum().item()
    digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    run, note = json.dumps([*map(repr, settings), digest, first]), folder / "run.json"
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (note.is_file() and note.read_text(encoding="utf-8") == run):
        raise PrunekitError(
            f"{str(folder)!r} holds something else than this run; give a new folder, or the same arguments"
        )
    write_text(note, run)
    return Resume(folder, every)
