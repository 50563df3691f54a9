"""Plots of methods by pruning ratio, and of fusion weights by layer."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from prunekit.plot_style import (
    KIND_COLORS,
    MARKERS,
    METHOD_COLORS,
    axes_or_new,
    colors_of,
    legend_outside,
    projected,
    require_columns,
)

DASHES = ("-", "--", "-.", ":")
FEW = 10  # ratios, each with a tick of its own


@projected
def plot_tradeoff(table: pd.DataFrame, *, y: str = "perplexity", ax: Axes | None = None) -> Axes:
    """Plots a measure by pruning ratio, one curve per method: the median, with the range as a band.

    Args:
        table: columns method, ratio and `y`, one row per measured model (several where there are seeds). Rows of the
            method `"dense"` become a line across.
        y: column of the vertical axis, such as `"perplexity"` (logarithmic) or `"mean_accuracy"` (a fraction).
        ax: where to draw; None is a new figure.

    Returns:
        The axes: the fraction of parameters removed across, `y` up.

    Raises:
        PrunekitError: the table is empty or has not these columns.
    """
    require_columns(table, ("method", "ratio", y), "columns method, ratio and what is measured")
    dense, rows = table[table["method"] == "dense"], table[table["method"] != "dense"]
    colors = colors_of(table["method"])
    ax = axes_or_new(ax)
    for number, (name, curve) in enumerate(rows.groupby("method", sort=False)):
        found = curve.groupby("ratio")[y].agg(["median", "min", "max"])
        _draw(ax, found, str(name), colors[str(name)], number)
    if len(dense):
        ax.axhline(dense[y].median(), color=colors["dense"], linewidth=1.5, linestyle=":", label="dense")
    ax.set(xlabel="parameters removed", ylabel=y.replace("_", " "), title="What a budget costs")
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if 0 < rows["ratio"].nunique() <= FEW:
        measured = sorted(rows["ratio"].unique())
        ax.set_xticks(measured, [f"{100 * ratio:.3g}%" for ratio in measured])
    if y == "perplexity":
        ax.set(yscale="log", ylabel="perplexity (logarithmic)")
        ax.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
    else:
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    legend_outside(ax)
    return ax


def _draw(ax: Axes, found: pd.DataFrame, name: str, color: str, number: int) -> None:
    """Draws a median with its range; curves differ by marker and dash, not only colour."""
    marker, dash = MARKERS[number % len(MARKERS)], DASHES[number % len(DASHES)]
    ax.plot(found.index, found["median"], dash, label=name, color=color, marker=marker, linewidth=2.2, markersize=8)
    ax.fill_between(found.index, found["min"], found["max"], color=color, alpha=0.15, linewidth=0)


@projected
def plot_fusion(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Plots the fusion weight of the coarse estimate by layer, one curve per kind of group.

    Args:
        table: columns kind, layer, coarse and fine, one row per group: `FusedScores.weight_table()`. A column `rule`
            draws one curve for each rule and kind.
        ax: where to draw; None is a new figure.

    Returns:
        The axes: layers across, coarse / (coarse + fine) up, with a line where both weigh the same.

    Raises:
        PrunekitError: the table is empty or has not these columns.
    """
    require_columns(table, ("kind", "layer", "coarse", "fine"), "FusedScores.weight_table()")
    rows = table.assign(share=table["coarse"] / (table["coarse"] + table["fine"])).dropna(subset="layer")
    by_rule = "rule" in table  # a colour a rule then, and a marker a kind
    of_rules = {name.removeprefix("HyWIA "): color for name, color in METHOD_COLORS.items()}
    colors = colors_of(rows["rule"], of_rules) if by_rule else colors_of(rows["kind"], KIND_COLORS)
    numbers = {kind: number for number, kind in enumerate(rows["kind"].unique())}
    ax = axes_or_new(ax)
    for name, curve in rows.groupby(["rule", "kind"] if by_rule else ["kind"], sort=False):
        found = curve.groupby("layer")["share"].agg(["median", "min", "max"])
        _draw(ax, found, ", ".join(name), colors[name[0]], numbers[name[-1]])
    ax.axhline(0.5, color="black", linewidth=1.2, linestyle="--", label="both alike")
    ax.set(xlabel="layer", ylabel="weight of the coarse estimate", ylim=(-0.02, 1.02), title="Fusion across depth")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    legend_outside(ax)
    return ax
