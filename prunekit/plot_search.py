"""Plots of a search: predictions, learning curve, Pareto front, and groups to protect."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator

from prunekit.errors import PrunekitError
from prunekit.evaluation.report import unbeaten
from prunekit.plot_style import (
    MARKERS,
    METHOD_COLORS,
    axes_or_new,
    colors_of,
    legend_outside,
    projected,
    require_columns,
)

FIGURES = {"spearman": "Spearman's ρ", "kendall": "Kendall's τ", "rmse": "rmse", "regret": "regret"}
DASHES = ("--", ":", "-.")
TOP = 6.0  # times the best figure, above which an architecture is counted and not drawn
TICKS = 9  # numbers along an axis, beyond which they are rounded
FAINT = "#767676"


@projected
def plot_predictions(table: pd.DataFrame, *, of: str = "log perplexity", ax: Axes | None = None) -> Axes:
    """Plots predicted against measured values, one marker per candidate.

    Args:
        table: columns expected and measured, one row per candidate: `cross_validate(pairs)`. A column `round`
            distinguishes the rounds of a search apart.
        of: name and unit of the predicted value.
        ax: where to draw; None is a new figure.

    Returns:
        The axes: expected across, measured up, with rank correlation and error as the title.

    Raises:
        PrunekitError: the table is empty or has not these columns.
    """
    require_columns(table, ("expected", "measured"), "cross_validate(pairs)")
    named = [f"round {number}" for number in table["round"]] if "round" in table else ["architectures"] * len(table)
    colors = colors_of(named, METHOD_COLORS | {"architectures": METHOD_COLORS["predictor"]})
    ax = axes_or_new(ax)
    for marker, (name, rows) in zip(MARKERS * len(table), table.groupby(named, sort=False), strict=False):
        style: dict[str, Any] = {"color": colors[str(name)], "marker": marker, "alpha": 0.7, "s": 60, "lw": 0}
        ax.scatter(rows["expected"], rows["measured"], label=name, **style)
    ends = [table[["expected", "measured"]].min(axis=None), table[["expected", "measured"]].max(axis=None)]
    ax.plot(ends, ends, color="black", linestyle="--", linewidth=1.5, label="as expected")
    ax.set(xlabel=f"expected {of}", ylabel=f"measured {of}")
    rho = table["expected"].corr(table["measured"], method="spearman")
    error = float(np.sqrt(((table["expected"] - table["measured"]) ** 2).mean()))
    ax.set_title(f"ρ = {rho:.2f}, rmse {error:.2f}")
    legend_outside(ax)
    return ax


@projected
def plot_learning(
    table: pd.DataFrame, *, figure: str = "spearman", levels: Mapping[str, float] | None = None, ax: Axes | None = None
) -> Axes:
    """Plots a figure of the predictor by the number of training samples.

    Args:
        table: columns n_pairs and `figure`, one row per draw: `learning_curve(pairs, sizes)`.
        figure: `"spearman"`, `"kendall"`, `"rmse"` or `"regret"`.
        levels: name → figure to compare with, drawn as a line across: what another text would have said, or size alone.
        ax: where to draw; None is a new figure.

    Returns:
        The axes: pairs across, the mean over draws up, with their range as a band and each of them as a point.

    Raises:
        PrunekitError: the table is empty or has not these columns.
    """
    require_columns(table, ("n_pairs", figure), "learning_curve(pairs, sizes)")
    ax, color = axes_or_new(ax), METHOD_COLORS["predictor"]
    found = table.groupby("n_pairs")[figure].agg(["mean", "min", "max"])
    ax.fill_between(found.index, found["min"], found["max"], color=color, alpha=0.15, linewidth=0)
    ax.scatter(table["n_pairs"], table[figure], color=color, s=24, alpha=0.6, lw=0)
    ax.plot(found.index, found["mean"], color=color, marker="o", markersize=9, linewidth=2.4, label="predictor, mean")
    for dash, (name, level) in zip(DASHES * len(levels or {}), (levels or {}).items(), strict=False):
        ax.axhline(level, color="black", linestyle=dash, linewidth=1.8, label=name)
    ax.set(xlabel="training samples", ylabel=f"{FIGURES.get(figure, figure)}, on held-out samples")
    ax.set_title("Learning curve")
    ax.set_xticks(found.index if len(found) <= TICKS else MaxNLocator(TICKS, integer=True).tick_values(*ax.get_xlim()))
    legend_outside(ax)
    return ax


@projected
def plot_front(
    table: pd.DataFrame,
    *,
    cost: str = "parameters",
    metric: str = "perplexity",
    limit: float | None = None,
    rules: pd.DataFrame | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plots all measured candidates and their Pareto front.

    Args:
        table: columns round, `cost` and `metric`, one row an architecture: the table of `Pairs`.
        cost: column of the cost, such as `"parameters"`.
        metric: column of the metric; lower is better, above 0.
        limit: the most that may be spent; the best architecture within it is marked.
        rules: columns method, `cost` and `metric`, to compare with; one curve a method.
        ax: where to draw; None is a new figure.

    Returns:
        The axes: cost across, `metric` up, logarithmic and up to 6 times the best; a note counts what lies above.

    Raises:
        PrunekitError: the table is empty or has not these columns, or nothing in it is so cheap.
    """
    require_columns(table, ("round", cost, metric), "the table of Pairs")
    chosen = None if limit is None else _chosen(table, cost, metric, limit)
    ax = axes_or_new(ax)
    for name, rows, style in _by_origin(table):
        ax.scatter(rows[cost], rows[metric], label=name, **style)
    front = unbeaten(table[table[metric] < np.inf], cost, metric)
    line: dict[str, Any] = {"drawstyle": "steps-post", "linewidth": 2.6, "color": METHOD_COLORS["predictor"]}
    ax.plot([*front[cost], table[cost].max()], [*front[metric], front[metric].min()], label="front", **line)
    _draw_rules(ax, rules, cost, metric)
    top = TOP * float(table[metric].min())
    ax.set(xlabel=cost, ylabel=f"{metric} (logarithmic)", yscale="log", ylim=(0.95 * table[metric].min(), top))
    title = "What a budget buys"
    if chosen is not None and limit is not None:
        ring: dict[str, Any] = {"s": 320, "facecolors": "none", "edgecolors": "black", "linewidths": 2.4, "zorder": 4}
        ax.scatter([chosen[cost]], [chosen[metric]], label="best within the limit", **ring)
        ax.axvline(limit, color="black", linestyle="--", linewidth=1.5)
        title = f"At most {_short(limit)}: {metric} {chosen[metric]:.2f} for {_short(chosen[cost])}"
    ax.set_title(title)
    ax.yaxis.set(major_locator=LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)), major_formatter="{x:g}", minor_formatter="")
    ax.xaxis.set_major_formatter(EngFormatter(sep=" "))
    _note_above(ax, table[metric], top)
    legend_outside(ax)
    return ax


def _chosen(table: pd.DataFrame, cost: str, metric: str, limit: float) -> pd.Series:
    within = table[table[cost] <= limit]
    if within.empty:
        raise PrunekitError(f"nothing measured costs at most {limit:g} {cost}; the least is {table[cost].min():g}")
    return within.loc[within[metric].idxmin()]


def _by_origin(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame, dict[str, Any]]]:
    """Draws random candidates as faint rings, proposed ones as filled markers."""
    drawn = table["round"] == 0
    ring = {"facecolors": "none", "edgecolors": FAINT, "s": 40, "linewidths": 1.2}
    filled = {"color": METHOD_COLORS["predictor"], "s": 40, "alpha": 0.45, "linewidths": 0}
    parts = [("drawn", table[drawn], ring), ("proposed", table[~drawn], filled)]
    return [part for part in parts if len(part[1])]


def _draw_rules(ax: Axes, rules: pd.DataFrame | None, cost: str, metric: str) -> None:
    if rules is None:
        return
    require_columns(rules, ("method", cost, metric), f"rules with columns method, {cost} and {metric}")
    colors = colors_of(rules["method"])
    for number, (method, rows) in enumerate(rules.sort_values(cost).groupby("method", sort=False)):
        style: dict[str, Any] = {"color": colors[str(method)], "marker": MARKERS[1 + number], "markersize": 9}
        style |= {"linestyle": DASHES[number % len(DASHES)], "linewidth": 2}
        ax.plot(rows[cost], rows[metric], label=method, **style)


def _note_above(ax: Axes, values: pd.Series, top: float) -> None:
    above = int((values > top).sum())
    if above:
        style: dict[str, Any] = {"ha": "right", "va": "top", "fontsize": "small", "backgroundcolor": "white"}
        ax.text(0.99, 0.98, f"{above} of {len(values)} lie above", transform=ax.transAxes, **style)


def _short(value: float) -> str:
    return EngFormatter(sep=" ")(float(f"{value:.3g}"))


@projected
def plot_spared(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Plots which groups to protect by several measures, one row per measure and kind.

    Args:
        table: columns kind and layer, and one column of numbers a view, higher where a group is to be spared more; one
            row a group.
        ax: where to draw; None is a new figure.

    Returns:
        The axes: layers across, views and kinds down, the rank among all groups of that view as colour, and the number.

    Raises:
        PrunekitError: the table is empty, or has not these columns, or no view.
    """
    require_columns(table, ("kind", "layer"), "columns kind, layer, and one a view")
    views = [name for name in table.select_dtypes("number").columns if name != "layer"]
    if not views:
        raise PrunekitError("the table has no view: give it a column of numbers beside kind and layer")
    long = table.melt(["kind", "layer"], views, "view", "value")
    long["rank"] = long.groupby("view", sort=False)["value"].rank()
    wide = long.pivot_table(index=["view", "kind"], columns="layer", values=["rank", "value"], sort=False)
    ranks = wide["rank"].sort_index(axis=1)
    values, n = wide["value"].reindex_like(ranks), len(table)
    ax = axes_or_new(ax)
    ax.grid(False)
    names = [f"{view}\n{kind}" for view, kind in ranks.index]
    written = {"annot": values, "fmt": "z.2f", "annot_kws": {"fontsize": "small"}}
    sns.heatmap(ranks, vmin=1, vmax=n, cmap="viridis", linewidths=1, yticklabels=names, cbar=False, ax=ax, **written)
    bar = ax.figure.colorbar(ax.collections[0], ax=ax, label=f"rank among {n} groups", pad=0.02)
    bar.set_ticks([1, n], labels=["let go", "spare"])
    ax.tick_params(rotation=0)
    for edge in np.flatnonzero(ranks.index.get_level_values("view")[1:] != ranks.index.get_level_values("view")[:-1]):
        ax.axhline(int(edge) + 1, color="white", linewidth=8)
    ax.set(xlabel="layer", ylabel="view and kind")
    ax.set_title("Which groups to spare", loc="left")
    return ax
