"""Scores groups with an importance."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Annotated, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from prunekit.account import few
from prunekit.annotations import Rule
from prunekit.calibration import check_finite, check_tokens
from prunekit.checks import Network, check_choice, checked
from prunekit.discovery.groups import CoupledGroup, Groups
from prunekit.errors import PrunekitError, similar
from prunekit.gradients import Gradients
from prunekit.importance.ablation import Ablation, check_scalable, scaled_to_loss
from prunekit.importance.activation import Activation, BlockInfluence, Fluctuation
from prunekit.importance.curvature import Curvature, applies
from prunekit.importance.fusion import HyWIA
from prunekit.importance.reconstruction import Reconstruction
from prunekit.importance.routing import REAP, RouterFrequency
from prunekit.importance.scores import Calibration, Scores, SomeGroups
from prunekit.importance.taylor import Magnitude, Random, Taylor
from prunekit.models import shapes_of


@runtime_checkable
class Importance(Protocol):
    """Interface of an importance: a frozen value with these three members."""

    @property
    def needs_calibration(self) -> bool:
        """Whether a calibration set is needed."""

    @property
    def label(self) -> str:
        """Short name for tables and legends."""

    def unit_scores(self, model: nn.Module, groups: SomeGroups, calib: Calibration) -> dict[str, Tensor]:
        """Group name → float (n_units,), higher means keep."""


AnyImportance = Annotated[
    Importance,
    Rule(
        lambda value: isinstance(value, Importance) and not isinstance(value, type),
        "an importance (needs_calibration, label, unit_scores), such as Taylor(), Activation() or Magnitude()",
    ),
]

IMPORTANCES: dict[str, Callable[..., Importance]] = {
    "curvature": Curvature,
    "taylor": Taylor,
    "taylor-vector": partial(Taylor, granularity="vector"),
    "taylor-second": partial(Taylor, order="second"),
    "taylor-mixed": partial(Taylor, order="mixed"),
    "hywia": HyWIA,
    "ablation": Ablation,
    "activation": Activation,
    "block-influence": BlockInfluence,
    "fluctuation": Fluctuation,
    "reap": REAP,
    "reconstruction": Reconstruction,
    "router-frequency": RouterFrequency,
    "l1": partial(Magnitude, p=1),
    "l2": partial(Magnitude, p=2),
    "random": Random,
}
CURVED_KINDS = {"kv_head", "query_head", "ffn_channel"}  # the ones on which curvature was tested


def importance_from_name(name: str, **options: Any) -> Importance:
    """The importance for a name, as on the command line.

    Args:
        name: a key of `IMPORTANCES`.
        options: fields of the importance to set, such as `reduction="max"`.

    Returns:
        The importance.

    Raises:
        PrunekitError: an unknown name or field.
    """
    if name not in IMPORTANCES:
        raise PrunekitError(
            f"importance {name!r} is unknown; allowed: {', '.join(IMPORTANCES)}{similar(name, IMPORTANCES)}"
        )
    try:
        return IMPORTANCES[name](**options)
    except TypeError as error:
        raise PrunekitError(
            f"importance {name!r} does not take {', '.join(options)}; leave it out, or choose taylor"
        ) from error


def default_importance(model: nn.Module, groups: Iterable[CoupledGroup]) -> Importance:
    """The default importance: `Curvature()` if it can score every group, else `Taylor()`.

    Args:
        model: the causal LM that the groups were discovered in.
        groups: the groups to score.
    """
    chosen = tuple(groups)
    curved = {group.kind for group in chosen} <= CURVED_KINDS and applies(model, chosen)
    return Curvature() if curved else Taylor()


@checked
def score(
    model: Network,
    groups: Groups | Iterable[CoupledGroup],
    importance: AnyImportance,
    calib: Calibration = None,
    *,
    normalize: str | None = None,
) -> Scores:
    """Scores the importance of each unit of each group; higher means keep.

    Args:
        model: the causal LM that the groups were discovered in; unchanged afterwards.
        groups: all groups, or some of them, such as `groups.of_kind("ffn_channel")`.
        importance: `Taylor(...)`, `Activation()`, `Magnitude(...)`, `Random(...)` or anything else with the three
            members of `Importance`.
        calib: integers (n_samples, seq_len), or what `gather_gradients` gathered over them (so that several
            importances share one pass); None where the importance reads no data.
        normalize: `"loss"` multiplies each group's scores by one factor, so that they sum to the measured
            rise of the loss when the group is ablated (one pass per group). Then units of all groups and kinds are
            comparable under `plan(ranking="global")`; the order inside a group stays.
            None leaves scores as they are.

    Returns:
        Group name → detached float CPU tensor (n_units,): float32, or float64 for a float64 model and losses.

    Raises:
        PrunekitError: no groups, groups of another model, no calibration set where one is needed, weights
            that are NaN or infinite, an unknown `normalize`, or an error of the importance.
    """
    check_choice("normalize", normalize, (None, "loss"))
    if importance.needs_calibration and calib is None:
        raise PrunekitError(f"{importance!r} needs a calibration set: score(model, groups, importance, calib)")
    chosen = groups_of_model(model, groups, "score")
    if normalize is not None:
        check_scalable(importance, chosen)
    check_finite(model)
    if isinstance(calib, Tensor) and hasattr(model, "get_input_embeddings"):
        check_tokens(calib, model)  # also where nothing reads them
    with torch.no_grad():
        values = importance.unit_scores(model, chosen, calib)
    _check_returned(importance, chosen, values)
    plain = {name: value.detach().cpu() for name, value in values.items()}
    kinds = {group.name: group.kind for group in chosen}
    found = values if isinstance(values, Scores) else Scores(plain, label=importance.label, kinds=kinds)
    found.update(plain)  # keep the class and fields of Scores
    read = calib.tokens if isinstance(calib, Gradients) else calib
    found.tokens = few(read) if read is not None and importance.needs_calibration else None
    return scaled_to_loss(model, chosen, found, calib) if normalize == "loss" else found


def _check_returned(importance: Importance, groups: SomeGroups, values: Any) -> None:
    """Raise an error for an importance that does not give each group one finite number a unit."""
    wanted = {group.name: (group.n_units,) for group in groups}
    if not isinstance(values, Mapping) or values.keys() != wanted.keys():
        given = sorted(values.keys() ^ wanted.keys())[:2] if isinstance(values, Mapping) else type(values).__name__
        raise PrunekitError(f"{importance!r} must return a dictionary, group name → scores; it differs in {given}")
    for name, shape in wanted.items():
        value = values[name]
        if not isinstance(value, Tensor) or tuple(value.shape) != shape or not bool(value.isfinite().all()):
            got = f"{tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise PrunekitError(f"{importance!r} must give {name!r} a tensor {shape} of finite scores; it gave {got}")


def groups_of_model(model: nn.Module, groups: Iterable[Any], task: str) -> tuple[CoupledGroup, ...]:
    """The groups, checked to be of this model.

    Args:
        model: the model at hand.
        groups: what was given as its groups.
        task: what they are for, such as `"score"`, for the message.

    Raises:
        PrunekitError: there are none, something else than a group, or groups of parameters that the model does not have
            in that shape.
    """
    chosen = tuple(groups)
    for group in chosen:
        if not isinstance(group, CoupledGroup):
            raise PrunekitError(f"{group!r:.60} is not a group; give discover(model), or a list of its groups")
    if not chosen:
        raise PrunekitError(
            f"there are no groups to {task}; discover(model) finds them, and its .locked lists the reasons where it "
            "finds none"
        )
    shapes = shapes_of(model)
    expected = groups.shapes if isinstance(groups, Groups) else {}
    for name, member in ((group.name, member) for group in chosen for member in group.members):
        shape, last = shapes.get(member.parameter), int(member.index.max())
        fits = shape is not None and member.dim < len(shape) and last < shape[member.dim]
        if not fits or expected.get(member.parameter, shape) != shape:
            was = expected.get(member.parameter, f"over {last} long in dimension {member.dim}")
            raise PrunekitError(
                f"group {name!r} is not of this model: {member.parameter} is {shape or 'missing'} here and was {was} "
                "where the group was found; call discover(model) on this model"
            )
    return chosen
