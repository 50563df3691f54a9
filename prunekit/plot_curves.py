"""Plots of curves: methods by pruning ratio, fusion weights by layer, unit norms and sources during training."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.ticker import MaxNLocator, PercentFormatter

from prunekit.checks import check_choice
from prunekit.discovery.groups import kind_in, layer_in
from prunekit.plot_style import (
    HATCHES,
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
    """Draws a median, with its range as a band where it is given; curves differ by marker and dash, not only colour."""
    marker, dash = MARKERS[number % len(MARKERS)], DASHES[number % len(DASHES)]
    ax.plot(found.index, found["median"], dash, label=name, color=color, marker=marker, linewidth=2.2, markersize=8)
    if "min" in found:
        ax.fill_between(found.index, found["min"], found["max"], color=color, alpha=0.15, linewidth=0)


@projected
def plot_fusion(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Plots the fusion weight of the coarse estimate by layer, one curve per kind of group.

    Args:
        table: columns kind, layer, coarse and fine, one row per group: `FusedScores.weight_table()`. A column `rule`
            draws one curve for each rule and kind.
        ax: where to draw; None is a new figure.

    Returns:
        The axes: layers across, coarse / (coarse + fine) up, with a line where both weigh the same. Curves are medians
        of the rows of a layer, and upright lines their ranges.

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
    curves = list(rows.groupby(["rule", "kind"] if by_rule else ["kind"], sort=False))
    for number, (name, curve) in enumerate(curves):
        found = curve.groupby("layer")["share"].agg(["median", "min", "max"])
        _draw(ax, found[["median"]], ", ".join(name), colors[name[0]], numbers[name[-1]])
        beside = found.index + 0.08 * (number - (len(curves) - 1) / 2)  # so that ranges do not hide each other
        ax.vlines(beside, found["min"], found["max"], color=colors[name[0]], linewidth=2)
    ax.axhline(0.5, color="black", linewidth=1.2, linestyle="--", label="both alike")
    ax.set(xlabel="layer", ylabel="weight of the coarse estimate", ylim=(-0.02, 1.02), title="Fusion across depth")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    legend_outside(ax)
    return ax


MOST = 400  # lines; more are a blot
LABELS = {  # label of the vertical axis, and the title
    "n_windows": ("windows drawn", "What training drew"),
    "gap": ("loss above the dense model's (nats per token)", "What was still lacking"),
}


@projected
def plot_norms(table: pd.DataFrame, *, kind: str | None = None, ax: Axes | None = None) -> Axes:
    """Plots the norm of each redundant unit, from the step of its choice to zero at its period's end.

    Args:
        table: columns period, step, group, unit and norm, one row per unit and step: `LHSPG.history()`.
        kind: of the units drawn; None is the kind with most units.
        ax: where to draw; None is a new figure.

    Returns:
        The axes: steps of training across, norm up, one line a unit, the layer as its colour; dotted lines between
        periods.

    Raises:
        PrunekitError: the table is empty, or has not these columns or no such kind.
    """
    require_columns(table, ("period", "step", "group", "unit", "norm"), "LHSPG.history()")
    kinds = table["group"].map(kind_in)
    kind = kind or str(kinds.mode()[0])
    rows = table[kinds == kind]
    require_columns(rows, (), f"a kind out of {', '.join(sorted(set(kinds)))}")
    ax = axes_or_new(ax)
    _draw_paths(ax, rows)
    ends = table.groupby("period")["step"].agg(["min", "max"])
    for step in sorted({*ends["min"], *ends["max"]}):
        ax.axvline(step, color="black", linewidth=1.2, linestyle=":")
    low, top = rows.loc[rows["norm"] > 0, "norm"].min(), rows["norm"].max()
    for number, row in ends.iterrows():
        ax.text(row.mean(), 1.2 * top, f"period {number}", ha="center", va="bottom", fontsize="small")
    title = f"Units of kind {kind} on their way to zero"
    ax.set(xlabel="optimiser step", ylabel="norm of a unit (logarithmic, with 0)")
    ax.set_title(title, loc="left")
    ax.set_yscale("symlog", linthresh=low, linscale=1)
    ax.set(ylim=(-0.1 * low, 2 * top), xlim=(0, 1.01 * ends["max"].max()))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax


def _draw_paths(ax: Axes, rows: pd.DataFrame) -> None:
    """Draws one line per unit, coloured by layer."""
    wide = rows.pivot_table(index=["group", "unit", "period"], columns="step", values="norm")
    wide = wide.iloc[:: max(1, len(wide) // MOST)]
    layers = wide.index.get_level_values("group").to_series().map(layer_in).astype(float)
    paths = [list(row.dropna().items()) for _, row in wide.iterrows()]
    crowded = len(paths) > 50
    lines = LineCollection(paths, cmap="viridis", linewidths=0.8 if crowded else 2.2, alpha=0.6 if crowded else 0.9)
    lines.set_array(layers.to_numpy())
    ax.add_collection(lines)
    if layers.notna().any():
        ax.figure.colorbar(lines, ax=ax, label="layer", pad=0.02, ticks=MaxNLocator(integer=True))


@projected
def plot_mixture(table: pd.DataFrame, *, y: str = "n_windows", ax: Axes | None = None) -> Axes:
    """Plots the windows drawn from each source in each round, or the loss gaps.

    Args:
        table: columns round, source, gap and n_windows, one row per round and source: `MixtureLog.table()`.
        y: `"n_windows"` stacks what was drawn; `"gap"` draws the gap of each source, in nats per token.
        ax: where to draw; None is a new figure.

    Returns:
        The axes: rounds across, windows drawn or gap to the dense model up.

    Raises:
        PrunekitError: another `y`, or a table that is empty or has not these columns.
    """
    check_choice("y", y, LABELS)
    require_columns(table, ("round", "source", "n_windows", "gap"), "MixtureLog.table()")
    wide = table.pivot_table(index="round", columns="source", values=y, sort=False)
    colors = colors_of(wide.columns, {})
    ax = axes_or_new(ax)
    draw = _stack if y == "n_windows" else _follow
    draw(ax, wide, colors)
    label, title = LABELS[y]
    ax.set(xlabel="round", ylabel=label, title=title)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_outside(ax)
    return ax


def _stack(ax: Axes, wide: pd.DataFrame, colors: dict[str, str]) -> None:
    """Draws one bar per round with windows."""
    wide = wide[wide.sum(axis=1) > 0]
    bottom = wide.cumsum(axis=1) - wide
    for number, name in enumerate(wide.columns):
        hatch = HATCHES[number % len(HATCHES)]
        bars = ax.bar(wide.index, wide[name], bottom=bottom[name], label=name, color=colors[name], hatch=hatch)
        for bar in bars:
            bar.set(edgecolor="white", linewidth=0.5)
    ax.grid(False, axis="x")


def _follow(ax: Axes, wide: pd.DataFrame, colors: dict[str, str]) -> None:
    """Draws one curve per source."""
    for number, name in enumerate(wide.columns):
        marker, dash = MARKERS[number % len(MARKERS)], "-" if number < len(MARKERS) else "--"
        ax.plot(wide.index, wide[name], dash, label=name, color=colors[name], marker=marker, linewidth=2, markersize=8)
    ax.axhline(0, color="black", linewidth=1.2, linestyle="--", label="dense")
