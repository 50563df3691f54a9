"""Plots of coupled groups: to scale, and as a diagram with one lane per kind and one box per parameter."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch, Rectangle

from prunekit.discovery.groups import KINDS, CoupledGroup, Groups, Member
from prunekit.errors import PrunekitError
from prunekit.lanes import Lane, Part, first_layer, layer_lanes
from prunekit.plot_style import KIND_COLORS, axes_or_new, projected

UNIT_COLORS = ("#E69F00", "#0072B2", "#009E73", "#CC79A7")  # the first two differ in greyscale too
PAPER, INK = "#ECECEC", "#666666"
GAP = 0.16  # of the largest matrix, between two matrices

# Inches, and points for letters: legible from the last row on a slide of 13.3 × 7.5 inches.
WIDTH, LABEL, LANE, BOX, SHEET = 13.0, 2.1, 0.56, 0.38, 0.05
MARGIN = 0.12  # round the whole, so that no letter touches the edge
COLUMN = (WIDTH - LABEL) / 14  # parts begin at multiples of this
NAME_SIZE, NOTE_SIZE, KIND_SIZE = 12, 11, 14
LETTER = 0.56 / 72  # inches a point of size: the mean width of a letter
LINES = 2  # of a lane; what does not fit is counted

Placed = tuple[Part | str, float, int]  # what, where from the left, in which line of its lane


@dataclass(frozen=True)
class Place:
    """Where one parameter is drawn: its lower-left-most corner's x, its top's y, and its size, in indices."""

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
    shown = {g.name: sorted({g.n_units // 4, g.n_units * 5 // 8}) if units is None else list(units) for g in chosen}
    ax = axes_or_new(ax)
    top = 0.0
    largest = max(max(matrix_shape(groups.shapes[m.parameter])) for group in chosen for m in group.members)
    for group in chosen:
        places = place_row(group, groups.shapes, top, GAP * largest)
        draw_row(ax, group, places, shown[group.name], largest)
        top += max(place.rows for place in places.values()) + 2.4 * GAP * largest
    n_colors = max(map(len, shown.values()))
    labels = ["one unit", "another", "a third", "a fourth"][:n_colors]
    handles = [Patch(color=color, label=label) for color, label in zip(UNIT_COLORS, labels, strict=False)]
    ax.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, -0.09), ncols=n_colors, frameon=False)
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
        places[member.parameter] = Place(x, top, rows, columns, len(shapes[member.parameter]))
        x += columns + gap
    return places


def draw_row(ax: Axes, group: CoupledGroup, places: dict[str, Place], units: Sequence[int], largest: int) -> None:
    """Draws a group's parameters with their names and sizes, then what each unit owns."""
    for parameter, place in places.items():
        ax.add_patch(Rectangle((place.x, place.y), place.columns, place.rows, facecolor=PAPER, edgecolor=INK, lw=1))
        name, _, kind = parameter.removesuffix(".weight").rpartition(".")
        label = kind if kind != "bias" else f"{name.rpartition('.')[2]}\nbias"
        middle, below = place.x + place.columns / 2, place.y + place.rows + GAP * largest / 8
        ax.text(middle, place.y - GAP * largest / 8, label, ha="center", va="bottom", fontsize=12)
        if kind != "bias":
            size = f"{place.rows} × {place.columns}"
            ax.text(middle, below, size, ha="center", va="top", fontsize=10, color=INK)
    for unit, color in zip(units, UNIT_COLORS, strict=False):
        for member in group.members:
            draw_owned(ax, member, places[member.parameter], unit, color)
    middle = next(iter(places.values())).y + max(place.rows for place in places.values()) / 2
    numbers = " and ".join(map(str, units)) if len(units) < 3 else ", ".join(map(str, units))
    left, title = -GAP * largest / 2, f"{group.kind}\n{group.n_units} units"
    ax.text(left, middle + GAP * largest, f"coloured: {numbers}", ha="right", va="top", fontsize=11, color=INK)
    ax.text(left, middle, title, ha="right", va="center", fontsize=13, weight="bold")


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


# --- a diagram of one layer ---------------------------------------------------------------------


@projected
def plot_groups(
    groups: Groups, *, layer: int | None = None, kinds: Sequence[str] = KINDS, ax: Axes | None = None
) -> Axes:
    """Draws the groups of one layer and the slices that one unit of each owns.

    Each kind of group is a lane, each parameter in it a box; the coloured bands are the rows (dimension 0) or columns
    that one unit owns where they lie, a coloured sheet of a stack is a whole matrix. A weight and its bias share a box.

    Args:
        groups: of the model, from `discover`.
        layer: number of the layer; None is the first that has groups. Groups that go through all layers come last.
        kinds: kinds of group to draw, where the layer has them.
        ax: where to draw; None is a new figure as wide as a slide and as high as it must be.

    Returns:
        The axes, in inches, without ticks.

    Raises:
        PrunekitError: there are no groups, or none of these kinds in that layer.
    """
    layer = first_layer(groups) if layer is None else layer
    lanes = layer_lanes(groups, layer, kinds)
    width = WIDTH if ax is None else ax.get_window_extent().width / ax.figure.dpi
    placed = [(lane, place_parts(lane, width - LABEL)) for lane in lanes]
    heights = [LANE * max(1 + places[-1][2], 1.45 if lane.where else 1) for lane, places in placed]
    if ax is None:
        layout = ConstrainedLayoutEngine(h_pad=MARGIN, w_pad=MARGIN)
        ax = plt.subplots(figsize=(WIDTH, sum(heights) + 0.45 + 2 * MARGIN), layout=layout)[1]
    for (lane, places), height, top in zip(placed, heights, np.cumsum([0, *heights]), strict=False):
        draw_lane(ax, lane, places, float(top), width, height)
    ax.set_title(f"Layer {layer}: what goes together", loc="left", fontsize=18, weight="bold")
    ax.set_title("coloured and counted: what one unit takes", loc="right", fontsize=NAME_SIZE)
    ax.set(xlim=(0, width), ylim=(sum(heights), 0))
    ax.axis("off")
    return ax


def place_parts(lane: Lane, width: float) -> list[Placed]:
    """Parts from left to right in as many lines as a lane may have; in place of those left over, how many there are."""
    places: list[Placed] = []
    x, line, flat = 0.0, 0, [part for parts in lane.groups for part in parts]
    for number, part in enumerate(flat):
        more = COLUMN * 2 if line + 1 == LINES and number + 1 < len(flat) else 0
        if line + 1 == LINES and x + part_width(part) + more > width:
            return [*places, (f"and {len(flat) - number} more", x, line)]
        if x and x + part_width(part) > width:
            x, line = 0.0, line + 1
        places.append((part, x, line))
        x += part_width(part)
    return places


def part_width(part: Part) -> float:
    """Inches from the left of a box to the left of the next."""
    letters = max(len(part.name) * NAME_SIZE, len(part.takes) * NOTE_SIZE) * LETTER
    return COLUMN * ceil((BOX + 2 * SHEET + 0.2 + letters) / COLUMN)


def draw_lane(ax: Axes, lane: Lane, places: Sequence[Placed], top: float, width: float, height: float) -> None:
    """The kind, how many units it has, and its parts, on a ground of the kind's colour."""
    color, first = KIND_COLORS[lane.kind], [id(parts[0]) for parts in lane.groups]
    for broad, alpha in ((width, 0.1), (0.1, 1.0)):
        ax.add_patch(Rectangle((0, top + 0.03), broad, height - 0.06, facecolor=color, alpha=alpha, lw=0))
    ax.text(0.22, top + LANE * 0.3, lane.name, fontsize=KIND_SIZE, weight="bold", va="center")
    ax.text(0.22, top + LANE * 0.61, f"{lane.size}\n{lane.where}".strip(), fontsize=NOTE_SIZE, va="top")
    for what, x, line in places:
        left, y = LABEL + x, top + line * LANE + (LANE - BOX) / 2
        if x and id(what) in first:  # another group of the same kind begins
            ax.plot([left - 0.1] * 2, [y, y + BOX], color=color, lw=1.5)
        if isinstance(what, str):
            ax.text(left, y + BOX / 2, what, fontsize=NAME_SIZE, va="center", color=INK)
        else:
            draw_part(ax, what, left, y, color)


def draw_part(ax: Axes, part: Part, x: float, y: float, color: str) -> None:
    """A box with its name and the count."""
    sheets = 2 if len(part.shape) > 2 else 0
    for sheet in range(sheets, 0, -1):  # behind the box, to the upper right
        whole = sheet == 1 and part.dim < len(part.shape) - 2
        add_box(ax, x + sheet * SHEET, y - sheet * SHEET, BOX, color if whole else PAPER)
    width = BOX / 5 if len(part.shape) == 1 else BOX
    add_box(ax, x, y, width, PAPER if part.shape else color)
    draw_bands(ax, part, x, y, width, color)
    right = x + width + sheets * SHEET + 0.08
    ax.text(right, y + BOX * 0.2, part.name, fontsize=NAME_SIZE, va="center")
    ax.text(right, y + BOX * 0.82, part.takes, fontsize=NOTE_SIZE, va="center", color="#444444")


def draw_bands(ax: Axes, part: Part, x: float, y: float, width: float, color: str) -> None:
    """Bands where one unit's rows or columns lie; never thinner than can be seen."""
    if not part.shape or part.dim < len(part.shape) - 2:
        return
    found, size = runs(part.owned), part.shape[part.dim]
    least = min(0.1, 0.5 / len(found))
    across = len(part.shape) > 1 and part.dim == len(part.shape) - 1
    for first, length in found:
        start, extent = min(first / size, 1 - least) * BOX, max(length / size, least) * BOX
        corner, sides = ((x + start, y), (extent, BOX)) if across else ((x, y + start), (width, extent))
        ax.add_patch(Rectangle(corner, *sides, facecolor=color, lw=0))


def add_box(ax: Axes, x: float, y: float, width: float, face: str) -> None:
    """A rectangle with a rim, as high as all are."""
    ax.add_patch(Rectangle((x, y), width, BOX, facecolor=face, edgecolor=INK, lw=1))
