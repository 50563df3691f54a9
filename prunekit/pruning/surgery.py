"""`prune`: makes a smaller model from a plan, and checks it."""

from contextlib import suppress
from dataclasses import replace
from typing import Literal, NamedTuple

from torch import Tensor, nn

from prunekit.account import check_measure, closed, opened
from prunekit.calibration import check_tokens
from prunekit.checks import Network, check_choice, checked
from prunekit.discovery import Groups
from prunekit.discovery.labelling import Trace
from prunekit.discovery.partition import find_groups
from prunekit.discovery.tracing import trace, uncollected
from prunekit.errors import PrunekitError
from prunekit.models import check_all_or_none
from prunekit.pruning.compensation import FITS
from prunekit.pruning.compensation import compensate as refit
from prunekit.pruning.configurations import own_configurations, record, usable
from prunekit.pruning.consequences import Consequences, apply_to, consequences_of
from prunekit.pruning.describing import describe
from prunekit.pruning.gap_factors import rescale
from prunekit.pruning.gaps import bridge
from prunekit.pruning.plans import PruningPlan
from prunekit.pruning.proving import Change, check_scales, try_without, verify
from prunekit.pruning.removal import copied, drop, fill, renamed, replace_parameters, without_weights


class _Proof(NamedTuple):
    """A cut that was tried and checked on a copy without weights.

    Attributes:
        groups: of the uncut model.
        plan: which units stay.
        cut: everything that changes.
        skeleton: the copy.
        moved: list elements that stand elsewhere in it, path before → path after.
    """

    groups: Groups
    plan: PruningPlan
    cut: Consequences
    skeleton: nn.Module
    moved: dict[str, str]


class _Pruned(NamedTuple):
    """A smaller model, with the data for a re-fit.

    Attributes:
        small: the model.
        dense: what it was cut from; where whole parts went, the model without them.
        plan: by which it was cut from that, with the groups of that.
    """

    small: nn.Module
    dense: nn.Module
    plan: PruningPlan


@checked
def prune(
    model: Network,
    plan: PruningPlan,
    *,
    inplace: bool = False,
    compensate: Tensor | None = None,
    fit: str = "weights",
    gaps: Literal["map", "magnitude"] | None = None,
    held_out: Tensor | None = None,
    measure: bool = True,
) -> nn.Module:
    """Returns a smaller model that computes the same as `model` with the removed units at zero.

    The cut is first made on a copy without weights, which is traced again and must have the partition of
    the full model restricted to the survivors; only then are weights sliced.

    Args:
        model: the model the plan was made for.
        plan: which units stay.
        inplace: cut `model` itself and return it. Otherwise new, smaller parameters are built and `model`
            is left alone.
        compensate: integers (n_samples, seq_len), on which what reads the pruned units is re-fitted, as
            `prunekit.compensate` does; None to leave it as it is. Not with `inplace`. Where whole layers or blocks
            go too, the target of the re-fit is the model without them. What removed layers added to the residual stream
            is then made up for, as `gaps` says.
        fit: what of it, as in `prunekit.compensate`: `"weights"`, `"bias"` or `"both"`.
        gaps: `"map"` (the default) lets the last layer in front of removed ones take over what they added
            (`prunekit.pruning.gaps.bridge`); `"magnitude"` makes up for its size alone, by one factor a gap
            (`prunekit.pruning.gap_factors.rescale`).
        held_out: integers (n, seq_len) on which the loss is measured before and after, about 1,024 of these tokens;
            `calibration_set(..., held_out=True)` draws some. None takes windows that the plan's scores (or else the
            re-fit) were computed from; without them nothing is measured.
        measure: whether to measure the loss; without it there is no warning of damage.

    Returns:
        The smaller model. Its configuration says the widths left, where they are alike in all layers and the family has
        fields for them, so that `transformers` can save it; where not, its `save_pretrained` refuses and
        `prunekit.save` writes it. What was cut stands in `config.prunekit`, cut after cut. Its `loss_change` is a
        `LossChange`: what the cut did to the loss. `DamageWarning` says where that is much. What earlier steps did
        stands in `earlier_changes`.

    Raises:
        PrunekitError: the plan is for another model, cuts what is locked, or cannot be carried through; some weights
            are not in memory (offloaded, or on the meta device); or what `compensate` raises. Nothing was changed then.
    """
    if compensate is not None:
        if inplace:
            raise PrunekitError("compensate= reads the dense model beside the cut one; leave out inplace=True")
        if plan.cut_kinds == {"block"}:
            raise PrunekitError(
                "compensate= re-fits what reads pruned units, and makes up for whole layers; this plan takes whole "
                "attention or FFN blocks alone, so leave it out"
            )
        check_tokens(compensate, model)
    check_choice("fit", fit, FITS)
    if compensate is None and fit != "weights":
        raise PrunekitError(
            f"fit={fit!r} says what is re-fitted on the tokens of compensate=; give these, or leave it out"
        )
    if gaps is not None and (compensate is None or not plan.removed_layers):
        raise PrunekitError(
            f"gaps={gaps!r} makes up for whole layers that go, on the tokens of compensate=; give both, or leave it out"
        )
    check_measure(measure, held_out)
    seen = {"the scores": plan.tokens, "the re-fit": compensate}
    renumbered = "tokens went, and those that are left have new numbers" if plan.takes_tokens else None
    opening = opened("prune", model, held_out, seen, renumbered) if measure else None
    pruned = _prune(model, plan, inplace)
    if compensate is not None and pruned.plan.keep:
        refit(*pruned, compensate, fit=fit)
    if compensate is not None and plan.removed_layers:
        (rescale if gaps == "magnitude" else bridge)(pruned.small, model, plan, compensate)
    describe(pruned.small, pruned.plan.groups)
    if opening is not None:
        closed(opening, pruned.small)
    return pruned.small


def cut(model: nn.Module, plan: PruningPlan, *, inplace: bool = True) -> nn.Module:
    """The model cut by a plan, for models that are not kept: no loss is measured, no configuration written."""
    return _prune(model, plan, inplace).small


@uncollected()
def _prune(model: nn.Module, plan: PruningPlan, inplace: bool) -> _Pruned:
    check_all_or_none(model)
    if plan.groups is not None and plan.groups.traced is not None and plan.groups.traced.is_of(model):
        with suppress(PrunekitError):  # where a module's code was changed since, the proof fails: trace it anew
            return _prune_traced(model, plan.groups.traced.trace, plan.groups, plan, inplace)
    before = trace(model)
    return _prune_traced(model, before, find_groups(before), plan, inplace)


def _prune_traced(model: nn.Module, before: Trace, groups: Groups, plan: PruningPlan, inplace: bool) -> _Pruned:
    _check_plan(groups, plan)
    if plan.removed_parts:
        return _without_parts(model, before, groups, plan, inplace)
    small = _carry_out(model, _prove(model, before, groups, plan), inplace)
    return _Pruned(small, model, replace(plan, groups=groups))


def _prove(model: nn.Module, before: Trace, groups: Groups, plan: PruningPlan) -> _Proof:
    """Make the cut on a copy without weights, and trace that."""
    cut = consequences_of(model, before, groups, plan)
    skeleton = without_weights(model, cut.keep)
    moved = apply_to(skeleton, cut)
    exact = all(groups[name].exact for name in plan.keep)
    verify(before, skeleton, Change(cut.dead, before.parameters_in(cut.gone), moved), exact=exact)
    if exact and any(groups[name].kind == "head_dim" for name in plan.keep):
        check_scales(model, skeleton)
    return _Proof(groups, plan, cut, skeleton, moved)


def _carry_out(model: nn.Module, proof: _Proof, inplace: bool) -> nn.Module:
    if inplace:
        own_configurations(model)
        replace_parameters(model, proof.cut.keep)
        apply_to(model, proof.cut)
    small = model if inplace else fill(proof.skeleton, model, proof.cut.keep, proof.moved)
    record(small, proof.groups, proof.plan)
    return usable(small)


def _without_parts(model: nn.Module, before: Trace, groups: Groups, plan: PruningPlan, inplace: bool) -> _Pruned:
    """Remove whole layers and blocks first; then cut the rest of the plan.

    All of it is tried on a copy that shares the weights, so that nothing is changed where a proof fails.
    """
    parts = [before.parts[path] for path in sorted(plan.removed_parts)]
    whole = replace(plan, keep={name: units for name, units in plan.keep.items() if not units})
    trial = try_without(model, before, parts)
    record(trial.model, groups, whole)
    rest = _what_is_left(plan, trial.moved)
    proof = _prove_anew(trial.model, rest) if rest.keep else None
    if inplace:
        own_configurations(model)
        drop(model, parts, trial.writers)
        record(model, groups, whole)
    left = model if inplace else trial.model
    if proof is None:
        return _Pruned(model if inplace else copied(left, {}), left, rest)
    return _Pruned(_carry_out(left, proof, inplace), left, replace(rest, groups=proof.groups))


def _what_is_left(plan: PruningPlan, moved: dict[str, str]) -> PruningPlan:
    """The partly cut groups, under their new names."""
    cut = {name: units for name, units in plan.keep.items() if 0 < len(units) < plan.n_units[name]}
    n_units = {renamed(name, moved): plan.n_units[name] for name in cut}
    return replace(plan, keep={renamed(name, moved): units for name, units in cut.items()}, n_units=n_units)


def _prove_anew(model: nn.Module, plan: PruningPlan) -> _Proof:
    before = trace(model)
    groups = find_groups(before)
    _check_plan(groups, plan)
    return _prove(model, before, groups, plan)


def _check_plan(groups: Groups, plan: PruningPlan) -> None:
    known = {g.name: g.n_units for g in groups}
    for name, n in plan.n_units.items():
        if known.get(name) != n:
            raise PrunekitError(
                f"the plan is for another model: it has {n} units in {name!r}, "
                f"this model has {known.get(name, 'no such group')}; make a plan from discover(model) of this model"
            )
    for name, units in plan.keep.items():
        if not units and groups[name].kind not in ("block", "layer"):
            raise PrunekitError(f"the plan leaves nothing of {name!r}; keep at least one of its {known[name]} units")
        if 0 < len(units) < min(groups[name].min_units, known[name]):
            raise PrunekitError(
                f"the plan leaves {len(units)} units of {name!r}, and {groups[name].min_units} are chosen for each "
                "token (num_experts_per_tok of most configurations); keep as many"
            )
    within = tuple(f"{path}{mark}" for path in plan.removed_parts for mark in ".:")
    for name, units in plan.keep.items():
        if units and len(units) < known[name] and name.startswith(within):
            raise PrunekitError(f"the plan both cuts and removes {name!r}; leave one of the two out of the plan")
