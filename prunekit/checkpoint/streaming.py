"""Prunes a checkpoint that is larger than memory.

The weights stay on disk: the model's parameters are views of the mapped shards, so that discovery, scoring and planning
are those of a model in memory, and what they read is cache. Only the slices that stay are made, one shard at a time.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from prunekit.calibration import check_tokens
from prunekit.checkpoint.mapped_weights import (
    convert,
    cut_without_weights,
    local_folder,
    map_checkpoint,
    to_convert,
    write_shards,
    write_the_rest,
)
from prunekit.checkpoint.saving import check_shard_size
from prunekit.checkpoint.stream_work import Facts, Work, facts_of_files, fingerprint
from prunekit.checks import FilePath, checked
from prunekit.digests import record, recorded
from prunekit.discovery import CoupledGroup, Groups, discover
from prunekit.errors import DiskError, PrunekitError
from prunekit.files import check_new_folder
from prunekit.importance import Ablation, Importance, Random, Scores, default_importance
from prunekit.importance.by_layer import OF_GRADIENTS, layers_of, scores_by_layer
from prunekit.importance.scoring import AnyImportance
from prunekit.models import count_parameters, name_model
from prunekit.pruning import PruningPlan
from prunekit.pruning import plan as make_plan
from prunekit.pruning.plan_options import Ratio, default_units
from prunekit.pruning.surgery import cut

MAX_SHARD_SIZE = "1GB"


@dataclass(frozen=True)
class _Order:
    """Arguments of a run."""

    folder: Path
    how: Importance | PruningPlan
    ratio: Any
    calib: Tensor | None
    options: dict[str, Any]
    max_shard_size: str | int

    def facts(self) -> dict[str, Facts]:
        """Arguments that the scores depend on, and further ones that the files depend on."""
        scoring = {
            "source": str(self.folder.resolve()),
            "files": facts_of_files(self.folder),
            "importance": self.how.to_json() if isinstance(self.how, PruningPlan) else repr(self.how),
            "calibration set": fingerprint(self.calib),
            "kinds": self.options.get("kinds"),
        }
        cutting = {"pruning_ratio": self.ratio, "options": self.options, "max_shard_size": self.max_shard_size}
        return {"scoring": scoring, "cutting": cutting}


@checked
def prune_checkpoint(
    source: FilePath,
    out: FilePath,
    how: AnyImportance | PruningPlan,
    pruning_ratio: Ratio | None = None,
    calib: Tensor | None = None,
    *,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    notes: Mapping[str, Any] | None = None,
    **options: Any,
) -> PruningPlan:
    """Prunes a checkpoint folder into another, with memory for one shard and a few parameters.

    The result is what `load`, `score`, `plan`, `prune` and `save` give, weight by weight. Where `transformers` puts the
    stored tensors together while it loads them, as it does with experts that are stored one by one, they are first
    written anew in that form, which takes as much room on the disk again. What is finished (that copy, the scores
    of a group, the plan, a shard) stays in `.OUT.partial` beside `out`, and the same call goes on from there, however
    the first one ended. Forward passes over the calibration set count as one step.

    Args:
        source: a folder with config.json and safetensors, or GGUF as `load` takes it.
        out: a folder that does not exist yet. It is complete or not written.
        how: an importance other than `Ablation`, or a plan. Where it needs gradients, layers run forward three
            times and what they read waits beside `out`: n_samples × seq_len × d_model numbers a layer.
        pruning_ratio: as in `plan`; None with a plan.
        calib: integers (n_samples, seq_len) for an importance that reads data.
        max_shard_size: of the shards written, such as `"1GB"`.
        notes: additions to the plan's notes, which the model card includes.
        options: further arguments of `plan`, such as `kinds` or `round_to`.

    Returns:
        The plan, as in plan.json of the folder.

    Raises:
        PrunekitError: bad arguments, an importance that cannot be computed from disk, a checkpoint that cannot be
            mapped, or a `.OUT.partial` of another run.
        KeyboardInterrupt: says where the finished part lies.
    """
    out, work = check_new_folder(out), Work(Path(out))
    check_shard_size(max_shard_size)
    _check_arguments(how, {"pruning_ratio": pruning_ratio, "calib": calib, **options})
    order = _Order(local_folder(source), how, _plain(pruning_ratio), calib, _plain(options), max_shard_size)
    work.check(order.facts())
    with work.alone(), work.kept_if_stopped():
        plan = _fill(work, order, notes or {})
        work.finish(out)
    return plan


def check_streamable(importance: Importance) -> None:
    """Raise an error for an importance that cannot be computed with the weights on disk.

    Raises:
        PrunekitError: names those that can.
    """
    if isinstance(importance, Ablation):
        raise PrunekitError(
            f"{importance!r} ablates units in memory, one after the other; to stream a checkpoint, take Curvature(), "
            "Taylor(), Activation() or Magnitude(): curvature, taylor, activation or l2 by name"
        )


def default_streamed(folder: Path, kinds: Iterable[str] | None) -> Importance:
    """The default importance for a checkpoint whose weights stay on disk, as `default_importance` in memory."""
    model = to_convert(folder) or map_checkpoint(folder)[0]
    return default_importance(model, candidates(discover(model), kinds))


def _check_arguments(how: Importance | PruningPlan, given: Mapping[str, Any]) -> None:
    if isinstance(how, PruningPlan):
        for name in (name for name, value in given.items() if value is not None):
            raise PrunekitError(f"the plan gives the removed units already; leave out {name}={str(given[name])[:40]}")
        return
    check_streamable(how)
    if given["pruning_ratio"] is None:
        raise PrunekitError("how much is to go? give pruning_ratio, such as 0.2")
    if how.needs_calibration and given["calib"] is None:
        raise PrunekitError(f"{how!r} needs a calibration set: prune_checkpoint(source, out, importance, ratio, calib)")


def _plain(value: Any) -> Any:
    """As JSON can say it: ranges, sets and tuples become lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    return sorted(value) if isinstance(value, Iterable) and not isinstance(value, str) else value


def _fill(work: Work, order: _Order, notes: Mapping[str, Any]) -> PruningPlan:
    """Run all steps from the mapped model to a complete folder that are not finished yet."""
    work.check_written()
    model, _ = map_checkpoint(_mappable(work, order))
    name_model(model, str(order.folder))
    if order.calib is not None:
        check_tokens(order.calib, model)
    plan = order.how if isinstance(order.how, PruningPlan) else _plan(model, order, work)
    small, postponed = cut_without_weights(model, plan)
    before, after = map(count_parameters, (model, small))
    # Counted anew, since a plan may be written by hand.
    plan = replace(plan, n_parameters=before, n_parameters_kept=after, notes={**plan.notes, **notes})
    work.claim(order.facts())
    plan.save(work.plan)
    record([work.plan], work.written)
    write_shards(small, postponed, work.checkpoint, order.max_shard_size, work.written)
    write_the_rest(small, work.checkpoint, plan)
    return plan


def _mappable(work: Work, order: _Order) -> Path:
    """The folder whose tensors are the model's parameters: the source, or a converted copy in the work folder."""
    structure = to_convert(order.folder)
    if structure is None:
        return order.folder
    if not work.source.is_dir():
        if isinstance(order.how, PruningPlan):
            cut(structure, order.how)
        else:
            _check_order(discover(structure), structure, order)
        work.claim({"scoring": order.facts()["scoring"]})
        convert(order.folder, work.source, order.max_shard_size)
    return work.source


def _check_order(groups: Groups, model: nn.Module, order: _Order) -> tuple[CoupledGroup, ...]:
    """The groups to score, where they can be; a plan from chance refuses early what cannot be met."""
    chosen = candidates(groups, order.options.get("kinds"))
    if isinstance(order.how, OF_GRADIENTS):
        layers_of(model, chosen, order.how)
    make_plan(groups, Random().unit_scores(model, chosen, None), order.ratio, **order.options)
    return chosen


def candidates(groups: Groups, kinds: Iterable[str] | None) -> tuple[CoupledGroup, ...]:
    """The groups that are worth scoring, since `plan` may cut them.

    Raises:
        PrunekitError: a kind that the model does not have.
    """
    groups.check_kinds(kinds or ())
    return default_units(groups) if kinds is None else groups.of_kind(*kinds)


def _plan(model: nn.Module, order: _Order, work: Work) -> PruningPlan:
    """The plan in the work folder, or a new one. One from chance comes first: it refuses early what cannot be met."""
    if work.plan.name in recorded(work.written):
        return PruningPlan.load(work.plan)
    groups = discover(model)
    chosen = _check_order(groups, model, order)
    work.claim({"scoring": order.facts()["scoring"]})
    try:
        scores = _scores(model, chosen, order, work.scores)
    except DiskError:
        raise
    except PrunekitError:  # another importance may be taken then
        work.disclaim()
        raise
    return make_plan(groups, scores, order.ratio, **order.options)


def _scores(model: nn.Module, groups: tuple[CoupledGroup, ...], order: _Order, path: Path) -> Scores:
    """Scores: those in the file at `path`, and the missing ones, saved step by step."""
    importance: Any = order.how
    done = _done(path) if path.is_file() else Scores({}, label=importance.label, kinds={})
    left = tuple(group for group in groups if group.name not in done)
    for found in _steps(model, left, importance, order.calib, path.parent) if left else ():
        done.update({name: values.detach().cpu() for name, values in found.items()})
        done.kinds.update({group.name: group.kind for group in groups if group.name in found})
        done.ranking = getattr(found, "ranking", done.ranking)
        done.save(path)
    return done


def _steps(
    model: nn.Module, groups: tuple[CoupledGroup, ...], importance: Any, calib: Any, folder: Path
) -> Iterator[Mapping[str, Tensor]]:
    """Scores of some groups at a time: of a layer by gradients, of all by forward passes, of one by its weights."""
    if isinstance(importance, OF_GRADIENTS):
        place = folder / "hidden"
        shutil.rmtree(place, ignore_errors=True)  # what a killed run left
        place.mkdir()
        try:
            yield from scores_by_layer(model, groups, importance, calib, place)
        finally:
            shutil.rmtree(place)
        return
    steps = [groups] if importance.needs_calibration else [(group,) for group in groups]
    for step in tqdm(steps, desc="scoring", unit="group", leave=False, delay=1):
        yield importance.unit_scores(model, step, calib)


def _done(path: Path) -> Scores:
    try:
        return Scores.load(path)
    except PrunekitError as error:
        raise PrunekitError(f"{error}, or delete it to score again") from None
