"""`prunekit prune`: a checkpoint becomes a smaller one, in memory or streamed."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
from torch import Tensor
from transformers import AutoConfig

import prunekit as pk
from prunekit.account import LossChange
from prunekit.checkpoint.cards import LISTED, RENUMBERED
from prunekit.checkpoint.folders import read_config
from prunekit.checkpoint.loading import load_tokenizer
from prunekit.checkpoint.mapped_weights import local_folder, n_bytes
from prunekit.checkpoint.origins import resolve
from prunekit.checkpoint.saving import not_plain
from prunekit.checkpoint.streaming import candidates, check_streamable, default_streamed
from prunekit.cli.console import Answer, Of, flag, say, text_table
from prunekit.cli.inputs import (
    Loading,
    Writing,
    check_drawing,
    drawn,
    held_out_windows,
    measured_loss,
    text_for,
)
from prunekit.errors import PrunekitError
from prunekit.importance import IMPORTANCES, Importance, default_importance, importance_from_name
from prunekit.models import count_parameters
from prunekit.pruning.cuts import tokens_went
from prunekit.pruning.plan_options import check_options

WINDOWS = {"n_samples": 64, "seq_len": 128}  # default size of the calibration set
UNMEASURED = "weights stay on disk, so the loss before and after is not measured; afterwards see prunekit evaluate"
NO_CURVATURE = "curvature cannot score each of these groups: scored by taylor"
NO_TEXT = ", or take an importance that reads none: l1, l2 or random"
Planning = Of(pk.plan, "pruning_ratio", "of", "ranking", "kinds", "protect_layers", "round_to")


@dataclass(frozen=True)
class _Order:
    """Options of a run.

    Attributes:
        model: where it lies.
        out: folder to write.
        plan: to cut by; None where one is made.
        planning: options of `plan`, the ratio too.
        method: importance; None is the default one.
        normalize: of `score`.
        steps: in which units go; None is at once.
        calibration: text that was given.
        drawing: how its windows are drawn, as far as it was said.
        fit: what is re-fitted, "none" for nothing; None where it was not said.
        gaps: how removed layers are made up for; None where it was not said.
        writing: options of `save`.
        loading: options of `load`.
    """

    model: str
    out: str
    plan: pk.PruningPlan | None
    planning: dict[str, Any]
    method: Importance | None
    normalize: str | None
    steps: int | None
    calibration: str | None
    drawing: dict[str, Any]
    fit: str | None
    gaps: Literal["map", "magnitude"] | None
    writing: dict[str, Any]
    loading: dict[str, Any]

    @property
    def in_memory(self) -> dict[str, Any]:
        """Options that need the whole model, where they are given."""
        fit = None if self.fit == "none" else self.fit
        given = {"compensate": fit, "normalize": self.normalize, "steps": self.steps}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def reader(self) -> str | None:
        """The option that needs calibration text; None if no option does."""
        named = next((f"--{name}" for name in self.in_memory if name != "steps"), None)
        scored = self.plan is None and (self.method is None or self.method.needs_calibration)
        return named or (f"importance {self.method.label if self.method else 'curvature'!r}" if scored else None)

    @property
    def text(self) -> Any:
        """Calibration text; None where none was given and nothing reads one."""
        return text_for(self.model, self.calibration, self.reader, NO_TEXT)


def prune(
    model: str,
    *,
    out: str,
    plan: str | None = None,
    planning: Annotated[dict[str, Any], Planning],
    importance: Annotated[str | None, {"choices": tuple(IMPORTANCES)}] = None,
    granularity: str | None = None,
    normalize: Literal["loss"] | None = None,
    steps: int | None = None,
    calibration: str | None = None,
    drawing: Annotated[dict[str, Any], Of(pk.calibration_set, "seed", **WINDOWS)],
    compensate: Annotated[Literal["weights", "bias", "both", "none"] | None, {"nargs": "?", "const": "weights"}] = None,
    gaps: Literal["map", "magnitude"] | None = None,
    streaming: bool | None = None,
    writing: Writing,
    loading: Loading,
) -> Answer:
    r"""Remove the least important units of a model.

    Scores every unit (attention heads, channels of the feed-forward layers), removes
    the least important ones, and saves what is left to OUT, with the plan in
    plan.json and a model card in README.md. OUT is complete or not written.

    A checkpoint that is bigger than the free memory is streamed: its weights stay on
    disk, and what is finished stays in .OUT.partial, so that the same command goes on
    after an interrupt. Gradients are computed layer by layer, and nothing is re-fitted.

    The default, curvature with a re-fit, was chosen on two real models; it takes two to
    four minutes for one of 135M parameters on two cores.

    Example:
        prunekit prune world --pruning-ratio 0.25 --out small/
        prunekit prune path/to/checkpoint --pruning-ratio 0.2 --calibration text.txt --out small/
        prunekit prune path/to/checkpoint --pruning-ratio 0.2 --importance taylor \
            --calibration text.txt --compensate none --out small/
        prunekit prune path/to/checkpoint --plan plan.json --out small/
        prunekit prune path/to/large --pruning-ratio 0.2 --calibration text.txt --streaming --out small/

    Args:
        model: a checkpoint folder, a .gguf file, a hub id, "world" or "smollm2".
        out: folder to write; it may not exist yet.
        plan: file of a plan to cut by; nothing is scored.
        planning: options of `plan`.
        importance: by default curvature, and taylor for groups that it cannot score.
        granularity: of taylor, "element" or "vector".
        normalize: scores are scaled to the measured loss, so that groups compete; for --ranking global.
        steps: cut in so many steps, scored anew after each.
        calibration: text file for all importances but l1, l2 and random, or "world" (the default where MODEL is world);
            held-out windows of it measure the change of the loss.
        drawing: options of `calibration_set`.
        compensate: re-fit the layers that consume pruned units on the calibration text: their weights (the default of
            the option, and without it where curvature is the importance by default), their biases, both, or none.
        gaps: with --compensate, what makes up for whole layers that go: a linear map (the default), or one factor.
        streaming: leave the weights on disk (by default where they take more than the free memory).
        writing: options of `save`.
        loading: options of `load`.
    """
    scoring = {"importance": importance, "granularity": granularity, "normalize": normalize, "steps": steps}
    _check(plan, {**planning, **scoring, **({} if calibration else drawing)})
    if plan is None:
        check_options(**planning)
    if gaps is not None and compensate in (None, "none"):
        raise PrunekitError("--gaps makes up for whole layers that go, by --compensate: give that too, or leave it out")
    if planning.get("pruning_ratio") == 0:
        raise PrunekitError("--pruning-ratio 0 removes nothing; give a fraction above 0, such as 0.2")
    by, method = pk.PruningPlan.load(plan) if plan else None, _named(importance, granularity, drawing)
    if by is not None and not by.gone:
        raise PrunekitError(f"{plan} is a plan that removes nothing; give another, or --pruning-ratio")
    order = _Order(
        model, out, by, planning, method, normalize, steps, calibration, drawing, compensate, gaps, writing,
        loading,
    )  # fmt: skip
    if _is_too_large(model) if streaming is None else streaming:
        return _answer(order, _cut_streamed(order))
    return _answer(order, _cut(order))


def _check(plan: str | None, making: dict[str, Any]) -> None:
    """Raise an error for a plan together with what makes one, and neither of both, before anything heavy.

    Raises:
        PrunekitError: names the first option too many, or the two of which one is needed.
    """
    given = [name for name, value in making.items() if value is not None]
    if plan is not None and given:
        raise PrunekitError(f"--plan gives the removed units already; leave out {flag(given[0])}, or leave out --plan")
    if plan is None and "pruning_ratio" not in given:
        raise PrunekitError("how much is to go? give --pruning-ratio, such as 0.2, or --plan PLAN.json")


def _named(importance: str | None, granularity: str | None, drawing: dict[str, Any]) -> Importance | None:
    """The importance that the options name; None is the default one."""
    if importance is None and granularity is None:
        return None
    options: dict[str, Any] = {} if granularity is None else {"granularity": granularity}
    if importance == "random" and "seed" in drawing:
        options["seed"] = drawing["seed"]
    return importance_from_name(importance or "taylor", **options)


def _cut(order: _Order) -> pk.PruningPlan:
    """Load, discover, score, plan, prune, save: everything from the model to the saved smaller one."""
    text = order.text
    check_drawing(text, order.drawing.keys() - ({"seed"} if isinstance(order.method, pk.Random) else set()))
    if order.normalize and order.planning.get("ranking") != "global":
        raise PrunekitError("--normalize lets groups compete, which they do with --ranking global alone; give that too")
    dense, tokenizer = pk.load(order.model, **order.loading)
    drawing, before = drawn(order.drawing, dense.config, **WINDOWS), count_parameters(dense)
    calib = pk.calibration_set(text, tokenizer, **drawing) if order.reader is not None else None
    plan, fit = (order.plan, order.fit) if order.plan else _plan(order, dense, calib)
    held_out = held_out_windows(text, tokenizer, drawing, seen=calib is not None)
    fitted = fit not in (None, "none")
    how: dict[str, Any] = {"compensate": calib, "fit": fit} if fitted else {"inplace": True}
    small: Any = pk.prune(dense, plan, held_out=held_out, gaps=order.gaps, **how)
    notes = _notes(order, fit if fitted else None, drawing if calib is not None else None, small.loss_change)
    notes |= {"gaps": order.gaps or "map"} if fitted and plan.removed_layers else {}
    # Counted anew, since a plan may be written by hand.
    plan = replace(plan, n_parameters=before, n_parameters_kept=count_parameters(small), notes={**plan.notes, **notes})
    pk.save(small, order.out, tokenizer=None if tokens_went(small) else tokenizer, plan=plan, **order.writing)
    measured_loss(small.loss_change)
    return plan


def _plan(order: _Order, dense: Any, calib: Tensor | None) -> tuple[pk.PruningPlan, str | None]:
    """A plan, and what is re-fitted after it: by default the weights, where the importance is the default one."""
    groups = pk.discover(dense)
    units = candidates(groups, order.planning.get("kinds"))
    method = order.method or default_importance(dense, units)
    if order.method is None and not isinstance(method, pk.Curvature):
        say(NO_CURVATURE)
    if order.steps is not None:
        options = {**order.planning, "n_steps": order.steps, "normalize": order.normalize, "groups": groups}
        made = pk.plan_in_steps(dense, method, calib=calib, **options)
    else:
        scores = pk.score(dense, units, method, calib, normalize=order.normalize)
        made = pk.plan(groups, scores, **order.planning)
    by_default = order.method is None and isinstance(method, pk.Curvature) and not order.normalize
    return made, "weights" if by_default and order.fit is None else order.fit


def _is_too_large(model: str) -> bool:
    """Whether a checkpoint takes more than the free memory; says so."""
    source = Path(resolve(model))
    size, free = n_bytes(source) if source.is_dir() else 0, psutil.virtual_memory().available
    if size > free:
        sizes = f"{size / 1e9:.1f} GB of weights, {free / 1e9:.1f} GB of free memory"
        say(f"{sizes}: streaming; --no-streaming loads them all the same")
    return size > free


def _cut_streamed(order: _Order) -> pk.PruningPlan:
    """Prune with the weights on disk.

    Raises:
        PrunekitError: as `prune_checkpoint`, or an option that needs the model in memory.
        KeyboardInterrupt: says where the finished part lies.
    """
    for name in {**order.in_memory, **order.loading}:
        raise PrunekitError(f"{flag(name)} needs the whole model in memory; leave it out, or give --no-streaming")
    folder = local_folder(order.model)
    how = order.plan or order.method or default_streamed(folder, order.planning.get("kinds"))
    if not (order.plan or order.method or isinstance(how, pk.Curvature)):
        say(NO_CURVATURE)
    calib = drawing = None
    if order.calibration and not (isinstance(how, Importance) and how.needs_calibration):
        say("--calibration is not read: nothing is scored on it, and no loss is measured while weights stay on disk")
    if isinstance(how, Importance):
        check_streamable(how)
        if how.needs_calibration:
            drawing = drawn(order.drawing, AutoConfig.from_pretrained(folder, trust_remote_code=False), **WINDOWS)
            calib = pk.calibration_set(order.text, load_tokenizer(str(folder), False), **drawing)
    options = {**order.planning, **order.writing, "notes": _notes(order, None, drawing)}
    plan = pk.prune_checkpoint(order.model, order.out, how, calib=calib, **options)
    say(f"{UNMEASURED} {order.out}")
    return plan


def _notes(
    order: _Order, fit: str | None, drawing: dict[str, Any] | None, change: LossChange | None = None
) -> dict[str, Any]:
    """Sources of the model and its scores, for the plan and the model card."""
    noted: dict[str, Any] = {"made from": order.model}
    if fit is not None:
        noted["compensate"] = f"{fit}, where a linear layer lost inputs"
    if drawing is not None:
        noted["calibration"] = "{n_samples} windows of {seq_len} tokens, seed {seed}".format(**drawing)
    if change is not None and change.is_measured:
        noted["loss"] = change.to_dict()
    return noted


def _answer(order: _Order, plan: pk.PruningPlan) -> Answer:
    """The answer after a cut."""
    names = ("n_parameters", "n_parameters_kept", "pruning_ratio", "notes")
    values = {name: getattr(plan, name) for name in names} | {"kinds": plan.summary().to_dict("index")}
    went = f"{plan.pruning_ratio:.2%} of the parameters went"
    told = [repr(LossChange.from_dict(plan.notes["loss"]))] if "loss" in plan.notes else []
    text = "\n".join([text_table(plan.summary_rows()), "", went, *told, *_remarks(order, plan)])
    return Answer({"model": order.model, "out": order.out, **values}, text)


def _remarks(order: _Order, plan: pk.PruningPlan) -> list[str]:
    """Remarks on the folder: tokens with new ids, or a format that is not plain."""
    told = [f"nothing goes of {plan.notes['whole']}"] if "whole" in plan.notes else []
    told += [f"{RENUMBERED} ({LISTED}): no tokenizer is saved"] if plan.takes_tokens else []
    if not (widths := not_plain(read_config(Path(order.out)))):
        return told
    asked = order.plan or order.planning.get("of") == "units" or order.planning.get("ranking") == "global"
    uneven = not asked and bool((plan.table().groupby("kind")["kept"].nunique() > 1).any())
    advice = f"; {'--of units keeps layers even, ' if uneven else ''}prunekit export --layout padded fills them up"
    biased = any(width.startswith("bias:") for width in widths)  # which zeros cannot fill up
    return [*told, f"not a plain checkpoint ({'; '.join(widths)}): loads with prunekit{'' if biased else advice}"]
