"""Plot of coupled structures: the rows and columns of one layer that are removed together."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from prunekit.discovery.groups import CoupledGroup, Groups, Member
from prunekit.errors import PrunekitError
from prunekit.plot_style import axes_or_new, projected

UNIT_COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7")
PAPER, INK = "#ECECEC", "#666666"
GAP = 0.16  # of the largest matrix, between two matrices


@dataclass(frozen=True)
class Place:
    """Where one parameter is drawn: its lower-left-most corner's x, its top's y, and its size, in indices."""

    parameter: str
    x: float
    y: float
    rows: int
    columns: int
    n_dims: int


@projected
def plot_coupled_group(
    groups: Groups,
    layer: int,
    *,
    kinds: Sequence[str] = ("kv_head", "ffn_channel"),
    units: Sequence[int] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plots one layer's parameters to scale, with the slices of some units in one colour each.

    Every coupled group is a row of matrices; dimension 0 of a parameter runs down, dimension 1 across, as stored.
    A parameter of one dimension is a narrow column; of three, its last two dimensions are drawn.

    Args:
        groups: of the model, from `discover`.
        layer: number of the layer.
        kinds: kinds of group to draw, where the layer has them.
        units: which units of every group to colour, at most 4; one colour each, the same in every matrix. None is
            two of each group, far enough apart to distinguish them.
        ax: where to draw; None is a new figure.

    Returns:
        The axes, without ticks: sizes stand at the matrices.

    Raises:
        PrunekitError: the layer has no such group, or a unit does not exist.
    """
    chosen = [group for group in groups if group.layer == layer and group.kind in kinds]
    check_units(groups, chosen, layer, kinds, units)
    shown = {group.name: list(units) if units is not None else two_units(group) for group in chosen}
    ax = axes_or_new(ax)
    top = 0.0
    largest = max(max(matrix_shape(groups.shapes[m.parameter])) for group in chosen for m in group.members)
    for group in chosen:
        places = place_row(group, groups.shapes, top, GAP * largest)
        draw_row(ax, group, places, shown[group.name], largest)
        top += max(place.rows for place in places.values()) + 2.4 * GAP * largest
    n_colors = max(map(len, shown.values()))
    labels = ["one unit", "another", "a third", "a fourth"][:n_colors]
    ax.legend(
        handles=[Patch(color=color, label=label) for color, label in zip(UNIT_COLORS, labels, strict=False)],
        loc="lower center",
        bbox_to_anchor=(0.5, -0.09),
        ncols=n_colors,
        frameon=False,
    )
    ax.set_title(f"Layer {layer}: one colour is one unit, and goes as a whole", pad=22)
    ax.set(aspect="equal", ylim=(top - GAP * largest, -1.3 * GAP * largest))
    ax.autoscale(axis="x")
    ax.axis("off")
    return ax


def check_units(
    groups: Groups, chosen: Sequence[CoupledGroup], layer: int, kinds: Sequence[str], units: Sequence[int] | None
) -> None:
    """Raises an error for a layer without such groups, or unknown units."""
    if not chosen:
        layers = sorted({group.layer for group in groups if group.layer is not None and group.kind in kinds})
        raise PrunekitError(f"layer {layer} has no group of kind {', '.join(kinds)}; give one of the layers {layers}")
    smallest = min(chosen, key=lambda group: group.n_units)
    if units is None:
        return
    if not 1 <= len(units) <= len(UNIT_COLORS) or not all(0 <= unit < smallest.n_units for unit in units):
        raise PrunekitError(
            f"units={list(units)}; give 1 to {len(UNIT_COLORS)} numbers from 0 to {smallest.n_units - 1}, "
            f"which {smallest.name} has too"
        )


def two_units(group: CoupledGroup) -> list[int]:
    """A unit in the first half of a group and one in the second, where it has two."""
    return sorted({group.n_units // 4, group.n_units * 5 // 8})


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns as drawn: a vector is one column; a 3-D parameter is drawn by its last two dimensions."""
    return (shape[0], 1) if len(shape) == 1 else (shape[-2], shape[-1])


def place_row(group: CoupledGroup, shapes: dict[str, tuple[int, ...]], top: float, gap: float) -> dict[str, Place]:
    """Places a group's parameters from left to right, each once, vectors as wide as can be seen."""
    places: dict[str, Place] = {}
    x = 0.0
    for member in group.members:
        if member.parameter in places:
            continue
        rows, columns = matrix_shape(shapes[member.parameter])
        columns = max(columns, round(gap / 4)) if len(shapes[member.parameter]) == 1 else columns
        places[member.parameter] = Place(member.parameter, x, top, rows, columns, len(shapes[member.parameter]))
        x += columns + gap
    return places


def draw_row(ax: Axes, group: CoupledGroup, places: dict[str, Place], units: Sequence[int], largest: int) -> None:
    """Draws a group's parameters with their names and sizes, then what each unit owns."""
    for place in places.values():
        ax.add_patch(Rectangle((place.x, place.y), place.columns, place.rows, facecolor=PAPER, edgecolor=INK, lw=1))
        name, _, kind = place.parameter.removesuffix(".weight").rpartition(".")
        label = kind if kind != "bias" else f"{name.rpartition('.')[2]}\nbias"
        middle = place.x + place.columns / 2
        ax.text(middle, place.y - GAP * largest / 8, label, ha="center", va="bottom", fontsize=12)
        if kind != "bias":
            size = f"{place.rows} × {place.columns}"
            ax.text(
                middle, place.y + place.rows + GAP * largest / 8, size, ha="center", va="top", fontsize=10, color=INK
            )
    for unit, color in zip(units, UNIT_COLORS, strict=False):
        for member in group.members:
            draw_owned(ax, member, places[member.parameter], unit, color)
    middle = next(iter(places.values())).y + max(place.rows for place in places.values()) / 2
    numbers = " and ".join(map(str, units)) if len(units) < 3 else ", ".join(map(str, units))
    title = f"{group.kind}\n{group.n_units} units"
    ax.text(
        -GAP * largest / 2, middle + GAP * largest, f"coloured: {numbers}", ha="right", va="top", fontsize=11, color=INK
    )
    ax.text(-GAP * largest / 2, middle, title, ha="right", va="center", fontsize=13, weight="bold")


def draw_owned(ax: Axes, member: Member, place: Place, unit: int, color: str) -> None:
    """Bands over the rows or columns that a unit owns; never thinner than can be seen."""
    axis = member.dim - max(place.n_dims - 2, 0)  # 0 down, 1 across; below 0: a whole matrix of a stack
    for first, length in runs(member.index[unit].tolist()):
        corner = (place.x + first, place.y) if axis == 1 else (place.x, place.y + first)
        width, height = (length, place.rows) if axis == 1 else (place.columns, length)
        if axis < 0:
            corner, width, height = (place.x, place.y), place.columns, place.rows
        ax.add_patch(Rectangle(corner, width, height, facecolor=color, edgecolor=color, lw=1.6, alpha=0.75))


def runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending indices as (first, length) of unbroken runs."""
    values = np.asarray(indices)
    pieces = np.split(values, np.flatnonzero(np.diff(values) != 1) + 1)
    return [(int(piece[0]), len(piece)) for piece in pieces]
