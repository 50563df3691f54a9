"""The parts of one layer that one unit of each group owns, as a table and as lanes of the diagram."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby

import pandas as pd

from prunekit.discovery.groups import KINDS, CoupledGroup, Groups, Member, layer_in
from prunekit.errors import PrunekitError
from prunekit.pruning.budgets import WHOLE_KINDS

PLURALS = {"entry": "entries", "row": "rows", "column": "columns", "matrix": "matrices", "tensor": "tensors"}


@dataclass(frozen=True)
class Part:
    """The slice that one unit owns of a parameter, or of a weight with its bias.

    Attributes:
        name: shortest unique name.
        shape: of the parameter; () for a whole module.
        dim: dimension that is cut.
        owned: the indices along `dim` of one unit; of a whole module, one a tensor.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    owned: tuple[int, ...]

    @property
    def takes(self) -> str:
        """The slice in words, such as `"16 rows"`."""
        from_last = self.dim - len(self.shape)
        word = "entry" if len(self.shape) == 1 else {-1: "column", -2: "row"}.get(from_last, "matrix")
        word, n = ("tensor" if not self.shape else word), len(self.owned)
        return f"{n} {word if n == 1 else PLURALS[word]}"


@dataclass(frozen=True)
class Lane:
    """Groups of one kind and one size.

    Attributes:
        name: the kind, and such as `"#2"` where lanes of the same kind are numbered.
        kind: of the groups.
        n_units: of each.
        exact: whether they are.
        where: place of a group that belongs to no single layer.
        groups: the parts of each.
    """

    name: str
    kind: str
    n_units: int
    exact: bool
    where: str
    groups: tuple[tuple[Part, ...], ...]

    @property
    def size(self) -> str:
        """The size in words, such as `"4 units, exact"`."""
        each = f"{len(self.groups)} × " if len(self.groups) > 1 else ""
        units = "1 unit" if self.n_units == 1 else f"{self.n_units:,} units"
        return f"{each}{units}, {'exact' if self.exact else 'inexact'}"


def layer_table(groups: Groups, *, layer: int | None = None, kinds: Sequence[str] = KINDS) -> pd.DataFrame:
    """The diagram of `plot_groups` as a table.

    Args:
        groups: of the model, from `discover`.
        layer: number of the layer; None is the first that has groups.
        kinds: kinds of group to list, where the layer has them.

    Returns:
        One row per kind and size of group: kind (with the number in the group's name, where there is one), groups,
        units (of each), exact, one unit takes.

    Raises:
        PrunekitError: there are no groups, or none of these kinds in that layer.
    """
    lanes = layer_lanes(groups, first_layer(groups) if layer is None else layer, kinds)
    rows = [
        (lane.name, len(lane.groups), lane.n_units, lane.exact, "; ".join(map(told, lane.groups))) for lane in lanes
    ]
    return pd.DataFrame(rows, columns=["kind", "groups", "units", "exact", "one unit takes"]).set_index("kind")


def told(parts: Iterable[Part]) -> str:
    """The parts in words, such as `"16 rows of q_proj, 8 rows of k_proj, v_proj"`."""
    alike = groupby(parts, lambda part: part.takes)
    return ", ".join(f"{takes} of {', '.join(part.name for part in same)}" for takes, same in alike)


def first_layer(groups: Groups) -> int:
    """The lowest number of a layer with groups.

    Raises:
        PrunekitError: no layer has groups.
    """
    if not groups.layers:
        raise PrunekitError(f"{groups!r} has no groups in numbered layers; groups.locked says why")
    return groups.layers[0]


def layer_lanes(groups: Groups, layer: int, kinds: Sequence[str]) -> list[Lane]:
    """Lanes of a layer: groups of one kind and size together, then groups across all layers.

    Raises:
        PrunekitError: the layer has none of these kinds.
    """
    if layer not in groups.layers:
        raise PrunekitError(f"layer {layer} has no groups; layers {groups.layers} have")
    chosen: dict[tuple[str, int, bool, str], list[CoupledGroup]] = {}
    for group in sorted(groups, key=lambda group: (group.layer is None, group.kind in WHOLE_KINDS)):
        if group.layer in (layer, None) and group.kind in kinds:
            key = (group.kind, group.n_units, group.exact, where(group))
            chosen.setdefault(key, []).append(group)
    if not chosen:
        there = dict.fromkeys(group.kind for group in groups if group.layer in (layer, None))
        raise PrunekitError(f"layer {layer} has no group of kind {', '.join(kinds)}; it has {', '.join(there)}")
    names = short_names({module_of(name) for name in groups.shapes if layer_in(name) in (layer, None)})
    parts = {key: [parts_of(group, groups, layer, names) for group in same] for key, same in chosen.items()}
    own = {key: same[0].name.rpartition(":")[2] for key, same in chosen.items()}
    return [Lane(own[key], *key, tuple(filter(None, found))) for key, found in parts.items() if any(found)]


def where(group: CoupledGroup) -> str:
    """The place of a group that belongs to no single layer."""
    if group.layer is not None:
        return ""
    inside = any(layer_in(member.parameter) is not None for member in group.members)
    return "through all layers" if inside else "outside the layers"


def parts_of(group: CoupledGroup, groups: Groups, layer: int, names: dict[str, str]) -> tuple[Part, ...]:
    """Parts of a group in a layer, or outside all layers if it has none there."""
    if group.kind in WHOLE_KINDS:
        path = group.name.rpartition(":")[0].rpartition(".")[2]
        name = f"layer {path}" if path.isdigit() else path
        return (Part(name, (), 0, tuple(range(len({m.parameter for m in group.members})))),)
    here = [m for m in group.members if layer_in(m.parameter) == layer]
    drawn = here or [m for m in group.members if layer_in(m.parameter) is None]
    return merged([(names[module_of(m.parameter)], m) for m in drawn], groups, group.n_units // 4)


def merged(named: Sequence[tuple[str, Member]], groups: Groups, unit: int) -> tuple[Part, ...]:
    """Members as parts; a bias with the same indices is joined to its weight."""
    parts: dict[str, Part] = {}
    for name, member in named:
        owned, weight = tuple(member.index[unit].tolist()), parts.get(name)
        if member.parameter.endswith(".bias") and weight is not None and weight.owned == owned:
            parts[name] = Part(f"{name} + bias", weight.shape, weight.dim, owned)
        else:
            own = f"{name} (dim {member.dim})" if name in parts else name
            parts[own] = Part(own, groups.shapes[member.parameter], member.dim, owned)
    return tuple(parts.values())


def module_of(parameter: str) -> str:
    """A parameter's name without ".weight"."""
    return parameter.removesuffix(".weight").removesuffix(".bias")


def short_names(names: Iterable[str]) -> dict[str, str]:
    """The shortest unique name of each path, preferring later words."""
    split = {name: name.split(".") for name in names}

    def own(words: tuple[str, ...], name: str) -> bool:
        return not any(within(words, others) for other, others in split.items() if other != name)

    def shortest(name: str) -> str:
        tries = (try_ for n in range(1, len(split[name]) + 1) for try_ in [*combinations(split[name], n)][::-1])
        return ".".join(next((words for words in tries if own(words, name)), split[name]))

    return {name: shortest(name) for name in split}


def within(words: Sequence[str], path: Sequence[str]) -> bool:
    """Whether a path has these words in this order."""
    left = iter(path)
    return all(word in left for word in words)
