"""Plots of knowledge distributions, their agreement with scores, and massive activations."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, PercentFormatter

from prunekit.errors import PrunekitError
from prunekit.plot_style import METHOD_COLORS, axes_or_new, domain_column, projected, require_columns

GIVEN = "KnowledgeDistribution.table()"
COLORS = "PuOr"  # dark at both ends, of which the orange one is always the worse
HATCH = "///"  # over what has become worse, so that it shows without colour


@projected
def plot_knowledge(table: pd.DataFrame, *, ratio: float | None = None, ax: Axes | None = None) -> Axes:
    """Plots the change of each domain under ablation, one row per group.

    Args:
        table: columns kind, layer, ratio, a domain (or task, tier, hops), measure and change:
            `KnowledgeDistribution.table()`.
        ratio: share of each group that was ablated; None is the largest. Groups of one unit are drawn at any.
        ax: where to draw; None is a new figure.

    Returns:
        The axes: domains across, groups down by layer, the change as colour: orange and hatched is worse. The colours
        are the same at all ratios of the table.

    Raises:
        PrunekitError: the table has not these columns, or not this ratio.
    """
    require_columns(table, ("kind", "layer", "ratio", "measure", "change"), GIVEN)
    if "unit" in table:
        raise PrunekitError("this is a table of single units; draw it with plot_units")
    ratio = float(table["ratio"].max()) if ratio is None else ratio
    at = np.isclose(table["ratio"], ratio)
    if not at.any():
        raise PrunekitError(f"ratio={ratio} was not measured; one of {sorted(set(table['ratio'].tolist()))}")
    whole = table["kind"].isin(["block", "layer"])
    rows = table[at | whole]
    groups = rows["group"] if "group" in rows else [""] * len(rows)
    kinds = rows["kind"].unique()
    # Numbers of layers say all then, and stand in larger letters.
    numbers = len(kinds) == 1 and kinds[0] != "block" and bool(rows["layer"].notna().all())
    names = [
        _layer(layer).strip() if numbers else f"{_layer(layer)}{_short(group, kind)}"
        for group, kind, layer in zip(groups, rows["kind"], rows["layer"], strict=True)
    ]
    ax = _changes(rows, names, ax, over=table)
    ax.set_ylabel("layer and kind" if not numbers else "layer" if kinds[0] == "layer" else f"layer ({kinds[0]})")
    ax.set_title(f"What is lost with each group, {ratio:.0%} of it ablated", loc="left")
    return ax


@projected
def plot_units(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Plots the change of each domain under ablation, one row per unit.

    Args:
        table: columns kind, layer, unit, a domain (or task, tier, hops), measure and change: `table()` of what
            `knowledge_of_units` returns.
        ax: where to draw; None is a new figure.

    Returns:
        The axes: domains across, units down as layer.unit, the change as colour: orange and hatched is worse.

    Raises:
        PrunekitError: the table has not these columns.
    """
    require_columns(table, ("kind", "layer", "unit", "measure", "change"), f"{GIVEN} of single units")
    kinds = table["kind"].unique()
    names = [
        f"{_layer(layer).strip()}.{unit}" + (f" {kind}" if len(kinds) > 1 else "")
        for kind, layer, unit in zip(table["kind"], table["layer"], table["unit"], strict=True)
    ]
    ax = _changes(table, names, ax)
    of = kinds[0] if len(kinds) == 1 else "unit"
    ax.set_ylabel(f"layer.unit ({', '.join(kinds)})")
    ax.set_title(f"What is lost with each {of} alone", loc="left")
    return ax


@projected
def plot_score_agreement(table: pd.DataFrame, *, kind: str = "all", ax: Axes | None = None) -> Axes:
    """Plots the rank correlation of scores with measured damage, by domain.

    Args:
        table: columns score, kind, a domain (or task, tier, hops) and spearman:
            `KnowledgeDistribution.agreement(scores)`.
        kind: the kind of group; `"all"` is all together.
        ax: where to draw; None is a new figure.

    Returns:
        The axes: domains across, scores down, Spearman's correlation as colour and number.

    Raises:
        PrunekitError: the table has not these columns, or not this kind.
    """
    require_columns(table, ("score", "kind", "spearman"), "KnowledgeDistribution.agreement(scores)")
    rows = table[table["kind"] == kind]
    require_columns(rows, (), f"a kind out of {', '.join(table['kind'].unique())}")
    by = domain_column(table, GIVEN)
    grid = rows.pivot_table(index="score", columns=by, values="spearman", sort=False, dropna=False)
    ax = _heat(axes_or_new(ax), grid, 1.0, "Spearman's ρ with the real change", worse=None)
    for (row, column), value in np.ndenumerate(grid.to_numpy(float)):
        shade = "white" if abs(value) > 0.6 else "black"
        ax.text(column, row, "–" if np.isnan(value) else f"{value:.2f}", ha="center", va="center", color=shade)
    told = "all kinds" if kind == "all" else kind
    ax.set(ylabel="score", xlabel=by)
    ax.set_title(f"Rank correlation of scores with damage ({told})", loc="left")
    return ax


@projected
def plot_massive(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Plots the size of the residual stream and the attention to the first token, by layer.

    Args:
        table: columns largest, median and attention_to_first, one row per layer: `MassiveActivations.layers`.
        ax: where to draw; None is a new figure.

    Returns:
        The axes: layers across, |h| up on a logarithmic scale; grey bars, on an axis of their own on the right, are
        the share of attention that goes to the first token.

    Raises:
        PrunekitError: the table has not these columns.
    """
    require_columns(table, ("largest", "median", "attention_to_first"), "MassiveActivations.layers")
    ax = axes_or_new(ax)
    right = ax.twinx()
    ax.set(zorder=right.get_zorder() + 1, facecolor="none")  # lines in front of the bars
    bars = right.bar(table.index, table["attention_to_first"], color="0.8", label="attention to the first token")
    right.set(ylim=(0, 1), ylabel="share of attention")
    right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    right.grid(False)
    (high,) = ax.plot(table.index, table["largest"], "-o", color=METHOD_COLORS["cut"], label="largest |h|")
    (low,) = ax.plot(table.index, table["median"], "--s", color=METHOD_COLORS["dense"], label="median |h|")
    ax.set(yscale="log", xlabel="layer", ylabel="|h| after the layer (logarithmic)")
    ax.set_title("The residual stream", loc="left", pad=30)
    ax.legend(handles=[high, low, bars], loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False)
    return ax


def _layer(layer: float | None) -> str:
    return "" if layer is None or pd.isna(layer) else f"{int(layer)} "


def _short(group: str, kind: str) -> str:
    """Name of a kind, with the module if a layer has several of that kind."""
    return f"{kind} {group.rpartition(':')[0].rpartition('.')[2]}" if kind == "block" else kind


def _changes(rows: pd.DataFrame, names: list[str], ax: Axes | None, over: pd.DataFrame | None = None) -> Axes:
    """Draws a heatmap of changes, coloured by the direction that is worse; the scale is that of all of `over`."""
    by = domain_column(rows, GIVEN)
    ordered = rows.assign(name=names).sort_values("layer", kind="stable", na_position="first")
    layers = ordered.drop_duplicates("name")["layer"].to_numpy(float)
    grid = ordered.pivot_table(index="name", columns=by, values="change", sort=False, dropna=False)
    falls = bool((rows["measure"] == "accuracy").all())
    grid = 100 * grid if falls else grid
    finite = np.abs((rows if over is None else over)["change"].to_numpy(float)) * (100 if falls else 1)
    most = float(np.max(finite[np.isfinite(finite)], initial=0)) or 1.0
    unit = "accuracy (points)" if falls else "loss (nats)"
    label = f"change of {unit}\n(hatched: worse by {most / 4:.2g} or more)"
    ax = _heat(axes_or_new(ax), grid.clip(-most, most), most, label, worse=-1 if falls else 1)
    for edge in np.flatnonzero(np.diff(layers)):
        ax.axhline(edge + 0.5, color="0.6", linewidth=0.8)
    ax.set_xlabel(by)
    return ax


def _heat(ax: Axes, grid: pd.DataFrame, most: float, label: str, *, worse: int | None) -> Axes:
    """Draws colours centred on zero, with a colour bar; cells at least a quarter as bad as the worst are hatched."""
    values = np.ma.masked_invalid(grid.to_numpy(float))
    colors = f"{COLORS}_r" if worse == 1 else COLORS
    ax.grid(False)
    edges = np.arange(grid.shape[1] + 1) - 0.5, np.arange(grid.shape[0] + 1) - 0.5
    mesh = ax.pcolormesh(*edges, values, cmap=colors, norm=TwoSlopeNorm(0, -most, most), rasterized=True)
    for row, column in np.argwhere((worse or 0) * values.filled(0) > most / 4):
        place = (column - 0.5, row - 0.5)
        ax.add_patch(Rectangle(place, 1, 1, fill=False, hatch=HATCH, edgecolor="white", linewidth=0))
    bar = ax.figure.colorbar(mesh, ax=ax, label=label, pad=0.02)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
    step = 1 + (len(grid) - 1) // 32
    short = max(len(str(name)) for name in grid.index) <= 3
    size = "medium" if len(grid) <= 18 else "small" if short else "x-small"  # names stand where there is room
    ax.set_yticks(range(0, len(grid), step), [str(name) for name in grid.index[::step]], fontsize=size)
    ax.set_xticks(range(grid.shape[1]), [_text(name) for name in grid.columns], rotation=25, ha="right")
    ax.tick_params(length=0)
    ax.invert_yaxis()
    return ax


def _text(name: object) -> str:
    return f"{name:g}" if isinstance(name, float) else str(name)
