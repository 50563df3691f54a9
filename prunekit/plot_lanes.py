"""Diagram of the coupled groups of a layer: one lane per kind, one box per parameter."""

from collections.abc import Sequence
from math import ceil

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

from prunekit.discovery.groups import KINDS, Groups
from prunekit.lanes import Lane, Part, first_layer, layer_lanes
from prunekit.plot_structure import INK, PAPER, runs
from prunekit.plot_style import KIND_COLORS, projected

# Inches, and points for letters: legible from the last row on a slide of 13.3 × 7.5 inches.
WIDTH, LABEL, LANE, BOX, SHEET = 13.0, 2.1, 0.56, 0.38, 0.05
MARGIN = 0.12  # round the whole, so that no letter touches the edge
COLUMN = (WIDTH - LABEL) / 14  # parts begin at multiples of this
NAME_SIZE, NOTE_SIZE, KIND_SIZE = 12, 11, 14
LETTER = 0.56 / 72  # inches a point of size: the mean width of a letter
LINES = 2  # of a lane; what does not fit is counted

Placed = tuple[Part | str, float, int]  # what, where from the left, in which line of its lane


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
    ax = new_axes(sum(heights)) if ax is None else ax
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


def new_axes(height: float) -> Axes:
    """Axes on a figure of its own, this high under the title."""
    layout = ConstrainedLayoutEngine(h_pad=MARGIN, w_pad=MARGIN)
    return plt.subplots(figsize=(WIDTH, height + 0.45 + 2 * MARGIN), layout=layout)[1]


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
    draw_owned(ax, part, x, y, width, color)
    right = x + width + sheets * SHEET + 0.08
    ax.text(right, y + BOX * 0.2, part.name, fontsize=NAME_SIZE, va="center")
    ax.text(right, y + BOX * 0.82, part.takes, fontsize=NOTE_SIZE, va="center", color="#444444")


def draw_owned(ax: Axes, part: Part, x: float, y: float, width: float, color: str) -> None:
    """Bands where one unit's rows or columns lie."""
    across = len(part.shape) > 1 and part.dim == len(part.shape) - 1
    for first, share in bands(part):
        corner = (x + first * BOX, y) if across else (x, y + first * BOX)
        size = (share * BOX, BOX) if across else (width, share * BOX)
        ax.add_patch(Rectangle(corner, *size, facecolor=color, lw=0))


def add_box(ax: Axes, x: float, y: float, width: float, face: str) -> None:
    """A rectangle with a rim, as high as all are."""
    ax.add_patch(Rectangle((x, y), width, BOX, facecolor=face, edgecolor=INK, lw=1))


def bands(part: Part) -> list[tuple[float, float]]:
    """(first, length) of what is owned, as fractions of the box; never thinner than can be seen."""
    if not part.shape or part.dim < len(part.shape) - 2:
        return []
    found, size = runs(part.owned), part.shape[part.dim]
    least = min(0.1, 0.5 / len(found))
    return [(min(first / size, 1 - least), max(length / size, least)) for first, length in found]
