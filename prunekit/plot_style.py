"""Style of all plots: colours of methods and kinds, font sizes, legends."""

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, cast

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import AbstractPathEffect, withStroke

from prunekit.errors import PrunekitError
from prunekit.files import new_file, writing

DOMAINS = ("domain", "task", "tier", "hops")  # columns by which questions are put together
PICTURES = (".png", ".pdf", ".svg")

# Okabe and Ito's palette, safe for colour-blind readers, and some of Tol's where it ends.
METHOD_COLORS = {
    "dense": "#333333",
    "cut": "#D55E00",
    "recovered": "#009E73",
    "random": "#999999",
    "magnitude": "#E69F00",
    "taylor": "#0072B2",
    "L2": "#E69F00",
    "vector": "#56B4E9",
    "element": "#0072B2",
    "HyWIA attention": "#CC79A7",
    "HyWIA uncertainty": "#882255",
    "FLAP-style": "#44AA99",
    "element, re-fit": "#D55E00",
    "reconstruction, re-fit": "#117733",
    "reconstruction, re-fit, global": "#332288",
    "lora": "#CC79A7",
    "wanda": "#56B4E9",
    "sparsegpt": "#882255",
    "sparsellm": "#117733",
    "even shares": "#E69F00",
    "global Taylor": "#0072B2",
    "predictor": "#D55E00",
}
KIND_COLORS = {
    "kv_head": "#0072B2",
    "query_head": "#56B4E9",
    "ffn_channel": "#E69F00",
    "hidden": "#009E73",
    "head_dim": "#CC79A7",
    "expert": "#D55E00",
    "block": "#882255",
    "layer": "#332288",
    "rank": "#999933",
    "vocabulary": "#777777",
}
SPARE_COLORS = ("#CC79A7", "#56B4E9", "#882255", "#117733", "#44AA99", "#661100", "#F0E442")  # yellow lines are faint
HATCHES = ("", "//", "..", "xx", "\\\\", "oo", "++")
LETTERS = 64  # of a legend above the axes
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Round black lines, which would be lost on dark bars.
HALO: list[AbstractPathEffect] = [withStroke(linewidth=3.5, foreground="white")]
FIGURE = (10, 5.625)  # inches: 1280 × 720 at 128 dots an inch
P = ParamSpec("P")


def projected(plot: Callable[P, Axes]) -> Callable[P, Axes]:
    """A context with large fonts, whatever the caller's style."""

    @wraps(plot)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Axes:
        with sns.axes_style("whitegrid"), sns.plotting_context("notebook", font_scale=1.2):
            return plot(*args, **kwargs)

    return drawn


def axes_or_new(ax: Axes | None) -> Axes:
    """The axes given, or those of a new figure."""
    return plt.subplots(figsize=FIGURE, layout="constrained")[1] if ax is None else ax


def colors_of(names: Iterable[str], fixed: Mapping[str, str] = METHOD_COLORS) -> dict[str, str]:
    """Name → colour: its fixed colour, or a spare one in order of appearance."""
    wanted = list(dict.fromkeys(names))
    taken = {fixed[name] for name in wanted if name in fixed}
    spare = [color for color in (*SPARE_COLORS, *METHOD_COLORS.values()) if color not in taken]
    others = [name for name in wanted if name not in fixed]
    if len(others) > len(spare):
        raise PrunekitError(f"{len(others)} series have no colour of their own, at most {len(spare)} can; plot fewer")
    return {name: fixed[name] for name in wanted if name in fixed} | dict(zip(others, spare, strict=False))


def require_columns(table: pd.DataFrame, columns: Iterable[str], source: str) -> None:
    """Raises an error if a table is not a DataFrame, is empty, or lacks a column."""
    if not isinstance(table, pd.DataFrame):
        raise PrunekitError(f"a {type(table).__name__} is no table; give {source}")
    missing = [column for column in columns if column not in table.columns]
    if missing or table.empty:
        raise PrunekitError(f"the table is empty or has no {', '.join(missing) or 'rows'}; give {source}")


def domain_column(table: pd.DataFrame, source: str) -> str:
    """The column that names the domains, tasks, tiers or hops of a table; raises an error where there is none."""
    found = next((column for column in DOMAINS if column in table), None)
    if found is None:
        raise PrunekitError(f"the table has no column {', '.join(DOMAINS)}; give {source}")
    return found


def legend_outside(ax: Axes) -> None:
    """The title on the left above the axes and the legend on the right, where it hides no data; chance comes last.

    More than four entries, or long ones, stand beside the axes, one below the other.
    """
    ax.set_title(ax.get_title(), loc="left")
    ax.set_title("")
    entries = sorted(zip(*ax.get_legend_handles_labels(), strict=True), key=lambda entry: entry[1] == "chance")
    place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)}
    if len(entries) <= 4 and sum(len(label) for _, label in entries) <= LETTERS:
        place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": len(entries)}
        place |= {"columnspacing": 1, "handlelength": 1.6}
    ax.legend(*zip(*entries, strict=True), frameon=False, **place)


def check_picture(path: str | Path) -> Path:
    """The path, if `save_picture` can write a picture there by its name.

    Raises:
        PrunekitError: another kind of file.
    """
    path = Path(path)
    if path.suffix not in PICTURES:
        raise PrunekitError(f"{str(path)!r} is no picture; give a name that ends with {', '.join(PICTURES)}")
    return path


def save_picture(ax: Axes, path: str | Path) -> Path:
    """Write the figure of some axes as png, pdf or svg; the file is complete or not there, its folder is made.

    Args:
        ax: axes of a plot function.
        path: of the picture; a file that stands there is replaced.

    Returns:
        The path.

    Raises:
        PrunekitError: another kind of file, or it cannot be written.
    """
    path = check_picture(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as beside:
            cast(Figure, ax.figure).savefig(beside, dpi=150)
    return path
