"""The widths of each layer as config.json of an uneven checkpoint says them, in the form of `transformers`."""

from typing import Any

from prunekit.discovery import Groups
from prunekit.errors import PrunekitError
from prunekit.pruning.cuts import HEADS, Cuts, head_fields, units_left


def layer_widths(cuts: Cuts) -> dict[str, Any]:
    """Width fields of config.json: the uncut values, and `per_layer_config` for the layers that differ.

    The form is that of `transformers`' own `PreTrainedConfig(per_layer_config=…)`.
    """
    text = cuts.config.get_text_config()
    whole: dict[str, Any] = {"num_hidden_layers": text.num_hidden_layers}
    layers: dict[str, dict[str, Any]] = {}
    for name, groups in cuts.roles.items():
        fields = cuts.fields[name] or (head_fields(text, groups[0]) if groups[0].kind in HEADS else {})
        for group in groups:
            said = {field: cuts.n_left(group) * per_unit for field, per_unit in fields.items()}
            if group.layer is None:
                whole |= said
            elif said and group.name in cuts.left:
                whole |= {field: getattr(text, field) for field in fields}
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
