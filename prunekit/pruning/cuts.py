"""Sums up all cuts of a model, and finds the configuration fields of the widths by trials."""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from prunekit.discovery import KINDS, CoupledGroup, Groups, discover
from prunekit.discovery.groups import kind_in
from prunekit.errors import PrunekitError, reason
from prunekit.models import Shapes, empty_model, shapes_of
from prunekit.pruning.configurations import RECORD, Stages, configurations, recorded, renumber
from prunekit.pruning.plans import PruningPlan
from prunekit.pruning.removal import layer_lists

HEADS = ("kv_head", "query_head")  # whose counts have standard names
HEAD_SIZE = "head_dim"
Fields = dict[str, int]  # field of a configuration → its value a unit


@dataclass(frozen=True, eq=False)
class Cuts:
    """All cuts of a model since it was whole.

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
    def of(cls, model: Any, *, all_layers: bool = False, groups: Groups | None = None) -> "Cuts":
        """All cuts of a model, read from the record in its configuration.

        Args:
            model: as returned by `prune`.
            all_layers: True: the uncut model includes the removed layers, and their removal is the last stage. False:
                the uncut model is described as if those layers had never existed.
            groups: groups of the uncut model, if already discovered; used only after a single cut without layers.

        Raises:
            PrunekitError: the uncut model cannot be built from its configuration.
        """
        try:
            config, done = uncut_widths(model.config), recorded(model.config)["stages"]
            stages = on_all_layers(config, done) if all_layers else without_layers(done)
            if {kind_in(name) for stage in done for name in stage} & {*HEADS, "hidden"}:
                config = _with_head_size(config)  # where it is computed: hidden size by number of heads
            if groups is None or len(done) > 1 or drops_layers(done):
                groups = discover(empty_model(config))
            return cls(config, groups, stages, _added_biases(model, groups))
        except Exception as error:  # code that came with a checkpoint, a record or a configuration that makes no sense
            raise PrunekitError(
                f"cannot save this cut model: it cannot be built anew from its cuts ({reason(error)})"
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
        """Number of remaining units of a group."""
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
        """Role → configuration fields of its width; empty if the family has none."""
        return {role: self._fields(groups) for role, groups in self.roles.items()}

    def _fields(self, groups: list[CoupledGroup]) -> Fields:
        """Fields with which the family builds the shapes of the cut, tried on its first layers."""
        shallow = copy.deepcopy(self.config)
        if groups[0].layer is not None:
            shallow.get_text_config().num_hidden_layers = groups[0].layer + 1
        width = min(self.n_left(group) for group in groups)
        expected = _cut_shapes(_shapes(shallow, {}, width), groups, width)
        tried = _candidates(self.config.get_text_config(), groups[0])
        return next((fields for fields in tried if _shapes(shallow, fields, width) == expected), {})


def role(name: str) -> str:
    """A group's or parameter's name without the number of its layer."""
    return re.sub(r"(?<=\.)\d+(?=[.:])", "*", name)


def _added_biases(model: Any, groups: Groups) -> tuple[str, ...]:
    known = set(map(role, groups.shapes))
    return tuple(n for n, _ in model.named_parameters() if n.endswith(".bias") and role(n) not in known)


def uncut_widths(config: Any) -> Any:
    """A copy of a cut model's configuration with the uncut widths and no record of the cut.

    Layers that went stay away, and special tokens keep their new numbers, which the uncut vocabulary has too.
    """
    whole = copy.deepcopy(config)
    before = vars(whole).pop(RECORD).get("before", {})
    for part in configurations(whole):
        for field, value in before.items():
            if vars(part).get(field) == getattr(config.get_text_config(), field):
                setattr(part, field, value)
    return whole


def _with_head_size(config: Any) -> Any:
    """The configuration, with the head size that follows from other fields written into it, if the family reads one."""
    text = config.get_text_config()
    hidden, heads = (getattr(text, name, None) for name in ("hidden_size", "num_attention_heads"))
    if getattr(text, HEAD_SIZE, None) is not None or not hidden or not heads:
        return config
    plain, same, other = (
        _shapes(with_fields(config, {"num_hidden_layers": 1, **more}), {}, 0)
        for more in ({}, {HEAD_SIZE: hidden // heads}, {HEAD_SIZE: 2 * hidden // heads})
    )
    return with_fields(config, {HEAD_SIZE: hidden // heads}) if same == plain and None is not other != plain else config


def tokens_left(stages: Stages) -> list[int] | None:
    """Token ids left after all stages, as the uncut model numbers them; None where none went."""
    of_tokens = [{name: units for name, units in stage.items() if kind_in(name) == "vocabulary"} for stage in stages]
    return next(iter(units_left(of_tokens).values()), None)


def tokens_went(model: Any, plan: PruningPlan | None = None) -> bool:
    """Whether tokens have new numbers, by a model's own record or by the plan that it was cut by."""
    return tokens_left(recorded(model.config).get("stages", [])) is not None or (plan is not None and plan.takes_tokens)


def units_left(stages: Stages) -> dict[str, list[int]]:
    """Group name → units left after all stages, as the uncut model numbers them."""
    left: dict[str, list[int]] = {}
    for stage in stages:
        for name, units in stage.items():
            left[name] = [left[name][unit] for unit in units] if name in left else list(units)
    return left


def with_width(config: Any, fields: Fields, width: int) -> Any:
    """A copy of a configuration with this many units."""
    return with_fields(config, {field: width * per_unit for field, per_unit in fields.items()})


def with_fields(config: Any, values: Fields) -> Any:
    """A copy of a configuration with these values, in the part that says what the language model is."""
    changed = copy.deepcopy(config)
    for field, value in values.items():
        setattr(changed.get_text_config(), field, value)
    return changed


def _candidates(config: Any, group: CoupledGroup) -> Iterator[Fields]:
    if group.kind in HEADS:
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


def without_layers(stages: Stages) -> Stages:
    """The record for a model without the removed layers."""
    done: Stages = []
    for stage in stages:
        gone = _gone(stage)
        done = [_moved_up(earlier, gone) for earlier in [*done, stage]]
    return [stage for stage in done if stage]


def _moved_up(stage: dict[str, list[int]], gone: set[str]) -> dict[str, list[int]]:
    """A stage's groups under the names they have once these layers are out."""
    moved, lists = {}, {layer.rpartition(".")[0] for layer in gone}
    for name, units in stage.items():
        numbers = re.finditer(r"\.(\d+)(?=[.:])", name)
        found = next((match for match in numbers if name[: match.start()] in lists), None)
        if found is None:
            moved[name] = units
        elif name[: found.end()] not in gone:
            before = sum(f"{name[: found.start()]}.{i}" in gone for i in range(int(found[1])))
            moved[f"{name[: found.start()]}.{int(found[1]) - before}{name[found.end() :]}"] = units
    return moved


def drops_layers(stages: Stages) -> bool:
    """Whether whole layers were removed."""
    return any(_gone(stage) for stage in stages)


def _gone(stage: dict[str, list[int]]) -> set[str]:
    """Paths of the layers removed in a stage."""
    return {name.removesuffix(":layer") for name, units in stage.items() if name.endswith(":layer") and not units}


def on_all_layers(config: Any, stages: Stages) -> Stages:
    """The record with the names of the full model; removed layers are removed last.

    Args:
        config: of the cut model; it is given its layers back.
        stages: group name → units kept, cut after cut.
    """
    n_gone = sum(len(_gone(stage)) for stage in stages)
    config = config.get_text_config()
    here = list(range(config.num_hidden_layers + n_gone))  # numbers of the layers that are there at a stage
    (path,) = {layer.rpartition(".")[0] for stage in stages for layer in _gone(stage)}
    done: Stages = []
    for stage in stages:
        done.append({_numbered(name, path, here): units for name, units in stage.items()})
        here = [number for number in here if f"{path}.{number}" not in _gone(done[-1])]
    gone = sorted(set(range(config.num_hidden_layers + n_gone)) - set(here))
    _lengthen(config, gone)
    inside = re.compile(rf"{re.escape(path)}\.({'|'.join(map(str, gone))})[.:]")
    cuts = [{name: units for name, units in stage.items() if not inside.match(name)} for stage in done]
    return [*filter(None, cuts), {f"{path}.{number}:layer": [] for number in gone}]


def _numbered(name: str, path: str, here: list[int]) -> str:
    """A group's name with the layer number of the full model."""
    return re.sub(rf"^({re.escape(path)}\.)(\d+)(?=[.:])", lambda match: f"{match[1]}{here[int(match[2])]}", name)


def _lengthen(config: Any, gone: list[int]) -> None:
    """Restore the removed layers of a configuration.

    What it lists layer by layer says nothing of those that went; they take after a neighbour, and go again.
    """
    for name, value in list(layer_lists(config, config.num_hidden_layers)):
        longer = list(value)
        for number in gone:
            longer.insert(number, longer[min(number, len(longer) - 1)])
        vars(config)[name] = type(value)(longer)
    config.num_hidden_layers += len(gone)
