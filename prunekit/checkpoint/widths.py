"""Under which fields a family's configuration says its widths, found by trying, not by a table of names."""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from prunekit.checkpoint.building import Shapes, Stages, empty_model, shapes_of
from prunekit.checkpoint.layers import on_all_layers, without_layers
from prunekit.discovery import KINDS, CoupledGroup, Groups, discover
from prunekit.errors import PrunekitError
from prunekit.pruning.plans import PruningPlan
from prunekit.pruning.vocabulary import configurations, renumber

HEADS = ("kv_head", "query_head")  # whose counts have standard names
Fields = dict[str, int]  # field of a configuration → its value a unit


@dataclass(frozen=True, eq=False)
class Cuts:
    """What was cut from a model since it was whole.

    Attributes:
        config: of the uncut model.
        groups: of the uncut model.
        stages: group name → units kept, cut after cut.
        biases: parameters that the uncut model has nothing like, such as `compensate(fit="bias")` adds.
    """

    config: Any
    groups: Groups
    stages: Stages
    biases: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: Any, *, all_layers: bool = False) -> "Cuts":
        """From a model's record.

        Args:
            model: as returned by `prune`.
            all_layers: the uncut model has the layers that went, and they go last; otherwise it never had them.

        Raises:
            PrunekitError: the uncut model cannot be built from its configuration.
        """
        config = copy.deepcopy(model.config)
        del config.prunekit
        record = model.config.prunekit
        try:
            on_all_tokens(config, record)
            stages = on_all_layers(config, record["stages"]) if all_layers else without_layers(record["stages"])
            groups = discover(empty_model(config))
            return cls(config, groups, stages, _added_biases(model, groups))
        except Exception as error:  # code that came with a checkpoint, a record or a configuration that makes no sense
            raise PrunekitError(
                f"this cut model cannot be rebuilt from its record, so it is not saved: {error}"
            ) from error

    @cached_property
    def left(self) -> dict[str, list[int]]:
        """Group name → the units left, as the uncut model numbers them."""
        return units_left(self.stages)

    def described(self) -> dict[str, Any]:
        """The uncut configuration, in which special tokens have their old numbers."""
        config, kept = copy.deepcopy(self.config), tokens_left(self.stages) or []
        for part in configurations(config) if kept else ():
            renumber(part, dict(enumerate(kept)), kept[-1] + 1, kept[-1] + 1)
        return config.to_dict()

    def n_left(self, group: CoupledGroup) -> int:
        """Units left of a group."""
        return len(self.left.get(group.name, range(group.n_units)))

    @cached_property
    def roles(self) -> dict[str, list[CoupledGroup]]:
        """The groups that play one part in every layer, for each part that was cut anywhere; KV heads first."""
        cut = {role(name) for name, units in self.left.items() if units}  # blocks that went have no width
        found: dict[str, list[CoupledGroup]] = {}
        for group in sorted(self.groups, key=lambda g: KINDS.index(g.kind)):
            if role(group.name) in cut:
                found.setdefault(role(group.name), []).append(group)
        return found

    @cached_property
    def fields(self) -> dict[str, Fields]:
        """Role → the fields that say its width; none where the family has none."""
        return {role: self._fields(groups) for role, groups in self.roles.items()}

    def _fields(self, groups: list[CoupledGroup]) -> Fields:
        """The fields with which the family builds just the shapes that the cut leaves, tried on its first layers."""
        shallow = copy.deepcopy(self.config)
        if groups[0].layer is not None:
            shallow.num_hidden_layers = groups[0].layer + 1
        width = min(self.n_left(group) for group in groups)
        expected = _cut_shapes(_shapes(shallow, {}, width), groups, width)
        tried = _candidates(self.config, groups[0])
        return next((fields for fields in tried if _shapes(shallow, fields, width) == expected), {})


def role(name: str) -> str:
    """A group's or parameter's name without the number of its layer."""
    return re.sub(r"(?<=\.)\d+(?=[.:])", "*", name)


def _added_biases(model: Any, groups: Groups) -> tuple[str, ...]:
    known = set(map(role, groups.shapes))
    return tuple(n for n, _ in model.named_parameters() if n.endswith(".bias") and role(n) not in known)


def on_all_tokens(config: Any, record: dict[str, Any]) -> None:
    """Gives a configuration the size of the uncut vocabulary; special tokens keep their new numbers, which it has too.

    Args:
        config: of the cut model.
        record: what it says of its cuts.
    """
    n_left = len(tokens_left(record["stages"]) or ())
    for part in configurations(config) if n_left else ():
        if getattr(part, "vocab_size", None) == n_left:
            part.vocab_size = record["n_tokens"]


def tokens_left(stages: Stages) -> list[int] | None:
    """Token ids left after all stages, as the uncut model numbers them; None where none went."""
    of_tokens = [{name: units for name, units in stage.items() if _is_vocabulary(name)} for stage in stages]
    return next(iter(units_left(of_tokens).values()), None)


def tokens_went(model: Any, plan: PruningPlan | None = None) -> bool:
    """Whether tokens have new numbers, by a model's own record or by the plan that it was cut by."""
    recorded = (getattr(model.config, "prunekit", None) or {}).get("stages", [])
    return tokens_left(recorded) is not None or (plan is not None and takes_tokens(plan))


def takes_tokens(plan: PruningPlan) -> bool:
    """Whether tokens go by a plan."""
    return plan.takes_tokens


def _is_vocabulary(name: str) -> bool:
    return name.rpartition(":")[2] == "vocabulary"


def units_left(stages: Stages) -> dict[str, list[int]]:
    """Group name → units left after all stages, as the uncut model numbers them."""
    left: dict[str, list[int]] = {}
    for stage in stages:
        for name, units in stage.items():
            left[name] = [left[name][unit] for unit in units] if name in left else list(units)
    return left


def with_width(config: Any, fields: Fields, width: int) -> Any:
    """A copy of a configuration that says this many units."""
    changed = copy.deepcopy(config)
    for field, per_unit in fields.items():
        setattr(changed, field, width * per_unit)
    return changed


def _candidates(config: Any, group: CoupledGroup) -> Iterator[Fields]:
    if group.kind == "kv_head":
        yield head_fields(config, group)
    for name, value in config.to_dict().items():
        if value is None or (type(value) is int and value == group.n_units):
            yield {name: 1}


def head_fields(config: Any, group: CoupledGroup) -> Fields:
    """Head counts by their standard names, in the family's own spelling."""
    own = {name: config.attribute_map.get(name, name) for name in ("num_attention_heads", "num_key_value_heads")}
    counts = {field: getattr(config, field, None) or 0 for field in own.values()}
    return {field: count // group.n_units for field, count in counts.items() if count >= group.n_units}


def _shapes(config: Any, fields: Fields, width: int) -> Shapes | None:
    try:
        return shapes_of(empty_model(with_width(config, fields, width)))
    except Exception:  # a value the family refuses: any exception of any validator
        return None


def _cut_shapes(shapes: Shapes | None, groups: list[CoupledGroup], width: int) -> Shapes:
    """The shapes of a model with `width` units left of each of these groups, as far as it has them."""
    sizes = {name: list(shape) for name, shape in (shapes or {}).items()}
    for group in groups:
        for member in group.members:
            if member.parameter in sizes:
                sizes[member.parameter][member.dim] -= (group.n_units - width) * member.width
    return {name: tuple(shape) for name, shape in sizes.items()}


def layer_widths(cuts: Cuts) -> dict[str, Any]:
    """What config.json says of the widths: the uncut values, and `per_layer_config` for the layers that differ.

    The form is that of `transformers`' own `PreTrainedConfig(per_layer_config=…)`.
    """
    whole: dict[str, Any] = {"num_hidden_layers": cuts.config.num_hidden_layers}
    layers: dict[str, dict[str, Any]] = {}
    for name, groups in cuts.roles.items():
        fields = cuts.fields[name] or (head_fields(cuts.config, groups[0]) if groups[0].kind in HEADS else {})
        for group in groups:
            said = {field: cuts.n_left(group) * per_unit for field, per_unit in fields.items()}
            if group.layer is None:
                whole |= said
            elif said and group.name in cuts.left:
                whole |= {field: getattr(cuts.config, field) for field in fields}
                layers.setdefault(str(group.layer), {}).update(said)
    for group in cuts.groups:
        if group.layer is not None and _skipped(cuts.left, group.layer):
            layers.setdefault(str(group.layer), {})["skip"] = _skipped(cuts.left, group.layer)
    return {**whole, "per_layer_config": dict(sorted(layers.items(), key=lambda item: int(item[0])))}


def _skipped(left: dict[str, list[int]], layer: int) -> list[str]:
    """The blocks of a layer that went, by their own names."""
    gone = [name.partition(":") for name, units in left.items() if not units]
    return sorted(
        kind if kind == "layer" else path.rpartition(".")[2] for path, _, kind in gone if _layer(path) == layer
    )


def _layer(path: str) -> int | None:
    """The number in a path, as in `CoupledGroup.layer`."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def check_widths(saved: dict[str, Any], groups: Groups) -> None:
    """Holds the widths that a cut checkpoint's config.json says of its layers against its record.

    A field is right where it stands to its uncut value as the units left of some group in that layer to all.

    Args:
        saved: config.json; older ones say no widths.
        groups: of the uncut model.

    Raises:
        PrunekitError: one is not.
    """
    left = units_left(saved["stages"])
    for layer, fields in saved.get("per_layer_config", {}).items():
        there = [(g.n_units, len(left[g.name])) for g in groups if str(g.layer) == layer and g.name in left]
        for field, value in fields.items():
            right = _skipped(left, int(layer)) == value if field == "skip" else _stands(value, saved.get(field), there)
            if not right:
                raise PrunekitError(
                    f"per_layer_config says {field}={value!r} for layer {layer}, its stages do not; restore config.json"
                )


def _stands(value: Any, whole: int | None, there: list[tuple[int, int]]) -> bool:
    """Whether a field is what some group leaves of it, a group of just its size where there is one."""
    if whole is None:
        return any(value == kept for _, kept in there)
    same = [(n, kept) for n, kept in there if n == whole] or there
    return any(value * n == whole * kept for n, kept in same)
