"""Progressive pruning: units shrink to zero during LoRA training (LHSPG)."""

import copy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from prunekit.account import set_aside
from prunekit.calibration import check_finite
from prunekit.checks import Count, FilePath, Model, Share, Tokenizer, checked
from prunekit.discovery import Groups, discover
from prunekit.documents import TextSource
from prunekit.errors import PrunekitError
from prunekit.escaping import html_paragraph
from prunekit.processes import check_shards
from prunekit.pruning import PruningPlan, plan
from prunekit.pruning.budgets import parameters_per_unit
from prunekit.pruning.plan_options import DEFAULT_KINDS
from prunekit.recovery.data import TrainingWindows, TrainOn, windows_for
from prunekit.recovery.lhspg import LHSPG, PREFIX, Saliency, update_saliency
from prunekit.recovery.log import RecoveryLog
from prunekit.recovery.lora import LoRA, attach, detach
from prunekit.recovery.resuming import Resume, digest_of_run, newest_checkpoint, open_run
from prunekit.recovery.training import flags_kept, seeded, train
from prunekit.sparsity.zero_masks import TRAINED, renew_report


class Progressed(NamedTuple):
    """The result of progressive pruning.

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

    def _repr_html_(self) -> str:
        return f"{html_paragraph(self)}{self.before_the_end().to_html(float_format='{:.3f}'.format)}"

    def before_the_end(self) -> pd.DataFrame:
        """Norms of the redundant units at the start and one step before the end of each period.

        Returns:
            One row per period: period, units, start and before_end (mean norms), share (before_end / start, mean over
            units), largest_share.
        """
        rows = []
        for period, table in self.history.groupby("period"):
            norms = table.pivot_table(index=["group", "unit"], columns="step", values="norm")
            share = norms.iloc[:, -2] / norms.iloc[:, 0].clip(lower=1e-30)
            means = norms.iloc[:, 0].mean(), norms.iloc[:, -2].mean()
            rows.append((period, len(norms), *means, share.mean(), share.max()))
        return pd.DataFrame(rows, columns=["period", "units", "start", "before_end", "share", "largest_share"])


@checked
def prune_progressively(
    model: Model,
    pruning_ratio: Share,
    data: Tensor | TextSource | TrainingWindows,
    method: LoRA | None = None,
    *,
    protect: Iterable[str] = (),
    n_periods: Count = 5,
    warmup: Share = 0.1,
    rest: Share = 0.0,
    saliency: Saliency = update_saliency,
    train_on: TrainOn = "replies",
    tokenizer: Tokenizer | None = None,
    folder: FilePath | None = None,
) -> Progressed:
    """Prunes progressively: trains with LoRA while units shrink to exactly zero, period by period (LHSPG).

    Args:
        model: a causal LM; unchanged. Single weights that `sparsify` set to zero do not stay zero.
        pruning_ratio: fraction of all the model's parameters that is to go, met within 0.5% or refused. Heads and FFN
            channels give up the same share; which layers lose them is up to saliency.
        data: as for `recover`.
        method: how LoRA trains; its steps are divided among warm-up, periods and rest, and its learning rate falls to
            0 over all of them. None is `LoRA()`, whose learning rate suits models that have lost much; for a model
            that is still whole, 1e-3 is better. A run of some hundred steps is short.
        protect: names of groups of heads or channels that lose nothing. `KnowledgeDistribution.unprunable()` gives such
            names if it measured only heads and channels.
        n_periods: number of periods; each removes an equal part of the units.
        warmup: share of the steps before the first units are chosen, in [0, 1).
        rest: share of the steps after the last period, in [0, 1); without any, the last removals are never recovered
            unless `recover` follows.
        saliency: which units go; see `LHSPG`.
        train_on: as for `recover`.
        tokenizer: needed where `data` is text.
        folder: for checkpoints, one a period; a run that was stopped goes on from there when called again with the same
            model, data and arguments. (Whether `saliency` is the same cannot be seen.)

    Returns:
        The zeroed model, the plan that cuts the zeros out, the loss curve, and the norms of the removed units by step.

    Raises:
        PrunekitError: a budget that cannot be met, an unknown group, more periods than steps, bad data, a folder of
            another run, or a gradient that is not finite: then the last checkpoint in `folder` is a good one.
            `model` is unchanged.

    Source: LoRAShear (arXiv 2310.18356), section 3.3. T_w, P and T_p are not given there: 5 periods and a tenth of the
        steps are ours.
    """
    method = method or LoRA()
    check_shards(["progressive pruning"])
    check_finite(model)
    windows = windows_for(model, data, tokenizer, method.seq_len, train_on=train_on)
    method = replace(method, max_steps=method.n_steps(len(windows)))
    warmup_steps, period_steps = split_steps(method.max_steps or 0, n_periods, warmup, rest)
    groups = discover(model)
    prunable = groups.without(_protected(groups, protect))
    wanted = units_for(prunable, pruning_ratio)
    names = {group.name for group in prunable.of_kind(*wanted) if group.exact}
    changed = copy.deepcopy(model)
    with seeded(method.seed), flags_kept(changed):
        adapted = attach(changed, method)
        ours = [group for group in discover(adapted) if group.name.removeprefix(PREFIX) in names]
        optimizer = LHSPG(
            adapted, ours, wanted, lr=method.learning_rate, n_periods=n_periods, saliency=saliency,
            warmup_steps=warmup_steps, period_steps=period_steps,
        )  # fmt: skip
        run = [repr(method), wanted, sorted(names), n_periods, [warmup_steps, period_steps]]
        digest = digest_of_run(model, windows, run)
        resume = None if folder is None else open_run(Path(folder), period_steps, digest)
        log = _train(adapted, windows, method, optimizer, resume)
        small: Any = detach(adapted, merge=True)
    small.eval().recovery_log = log
    set_aside(small)
    renew_report(small, TRAINED)
    chosen = optimizer.plan(groups, {"pruning_ratio": pruning_ratio, "of": "parameters", "n_periods": n_periods})
    history = optimizer.history().assign(group=lambda table: table["group"].str.removeprefix(PREFIX))
    return Progressed(small, chosen, log, history)


def _protected(groups: Groups, protect: Iterable[str]) -> list[str]:
    """Names of groups that would lose units."""
    names = [*protect]
    for name in names:
        if groups[name].kind not in DEFAULT_KINDS:
            raise PrunekitError(
                f"protect: {name!r} is of kind {groups[name].kind!r}, and only groups of kind "
                f"{' and '.join(DEFAULT_KINDS)} lose units here; give names of those"
            )
    return names


def _train(
    adapted: Any, windows: TrainingWindows, method: LoRA, optimizer: LHSPG, resume: Resume | None
) -> RecoveryLog:
    try:
        log = train(adapted, windows, method, optimizer=optimizer, resume=resume)
    except PrunekitError as error:
        kept = newest_checkpoint(resume.folder) if resume else None
        left = f"the last good state is in {kept}" if kept else "no checkpoint was kept; give folder=… to have some"
        raise PrunekitError(f"{error}; {left}") from None
    if not optimizer.finished:  # as where a scaler of gradients passes steps over
        raise PrunekitError(
            f"training ended after {optimizer.n_steps} of the {optimizer.pruning_steps} steps that pruning takes, so "
            "that not all units are zero; train in float32 or bfloat16, or for longer"
        )
    return log


def units_for(groups: Groups, pruning_ratio: float) -> dict[str, int]:
    """Number of units to remove of each kind, so that all kinds lose the same share and the budget is met.

    Args:
        groups: those that may lose units.
        pruning_ratio: fraction of all the model's parameters, in [0, 1).

    Raises:
        PrunekitError: what `plan` raises.
    """
    alike = {group.name: torch.arange(group.n_units, dtype=torch.float64) for group in groups}
    chosen = plan(groups, alike, pruning_ratio)
    for kind in {groups[name].kind for name in chosen.keep}:
        sizes = {parameters_per_unit(groups, groups[name]) for name in chosen.keep if groups[name].kind == kind}
        if len(sizes) > 1:
            raise PrunekitError(
                f"units of kind {kind!r} have {min(sizes):,} to {max(sizes):,} parameters in this model, so that no "
                "number of them meets a budget; protect the groups that differ, or give LHSPG numbers of units"
            )
    return {str(kind): int(row["before"] - row["after"]) for kind, row in chosen.summary().iterrows()}


def split_steps(n_steps: int, n_periods: int, warmup: float, rest: float) -> tuple[int, int]:
    """Steps of the warm-up, and of each period, of the training's; the remainder goes to the warm-up.

    Raises:
        PrunekitError: more periods than steps.
    """
    before = round(warmup * n_steps)
    period = (n_steps - before - round(rest * n_steps)) // n_periods
    if period < 1:
        raise PrunekitError(
            f"n_periods={n_periods} do not fit into {n_steps} steps of which {warmup:.0%} warm up and {rest:.0%} come "
            "after; give fewer periods, or a method with more max_steps or epochs"
        )
    return n_steps - round(rest * n_steps) - n_periods * period, period
