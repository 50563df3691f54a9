"""Plot functions: a tidy table in, `Axes` out.

Every function draws on the axes given, or on a new figure, and changes no global state. A colour belongs to a
method (`METHOD_COLORS`) and is the same everywhere; series also differ by markers and hatches.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import MaxNLocator, PercentFormatter

from prunekit.errors import PrunekitError
from prunekit.lanes import layer_table
from prunekit.plot_curves import plot_fusion, plot_mixture, plot_norms, plot_tradeoff
from prunekit.plot_groups import plot_coupled_group, plot_groups
from prunekit.plot_knowledge import plot_knowledge, plot_massive, plot_score_agreement, plot_units
from prunekit.plot_lab import plot_answers, plot_attention, plot_exciting, plot_moved, plot_needs
from prunekit.plot_search import plot_front, plot_learning, plot_predictions, plot_spared
from prunekit.plot_sparsity import plot_ffn_errors, plot_mask, plot_sparsity, plot_zeros
from prunekit.plot_style import (
    HALO,
    HATCHES,
    KIND_COLORS,
    MARKERS,
    METHOD_COLORS,
    axes_or_new,
    colors_of,
    legend_outside,
    projected,
    require_columns,
    save_picture,
)

__all__ = [
    "METHOD_COLORS",
    "layer_table",
    "plot_accuracy",
    "plot_agreement",
    "plot_answers",
    "plot_attention",
    "plot_coupled_group",
    "plot_exciting",
    "plot_ffn_errors",
    "plot_front",
    "plot_fusion",
    "plot_groups",
    "plot_knowledge",
    "plot_learning",
    "plot_loss",
    "plot_mask",
    "plot_massive",
    "plot_mixture",
    "plot_moved",
    "plot_needs",
    "plot_norms",
    "plot_plan",
    "plot_predictions",
    "plot_score_agreement",
    "plot_scores",
    "plot_spared",
    "plot_sparsity",
    "plot_tradeoff",
    "plot_units",
    "plot_zeros",
    "side_by_side",
    "save_picture",
]


@projected
def plot_scores(table: pd.DataFrame, *, kind: str | None = None, ax: Axes | None = None) -> Axes:
    """Plots each layer's sorted scores as a row of colours.

    Args:
        table: columns kind, layer, score, one row per unit: `Scores.table()`.
        kind: the kind of group to draw; None is the one with most units.
        ax: where to draw; None is a new figure.

    Returns:
        The axes: units by rank across, layers down, the score as colour (logarithmic where all are positive).

    Raises:
        PrunekitError: the table has no such kind, or not these columns.
    """
    require_columns(table, ("kind", "layer", "score"), "Scores.table()")
    kind = kind or str(table["kind"].value_counts().index[0])
    rows = table[(table["kind"] == kind) & table["layer"].notna()]
    require_columns(rows, (), f"a kind out of {', '.join(sorted(set(table['kind'])))}")
    ranks = rows.groupby("layer")["score"].rank(ascending=False, method="first").astype(int)
    grid = rows.assign(rank=ranks).pivot(index="layer", columns="rank", values="score").sort_index()
    low, high = np.nanmin(grid), np.nanmax(grid)
    norm = LogNorm(low, high) if 0 < low < high else Normalize(low, high)
    ax = axes_or_new(ax)
    ax.grid(False)
    edges = np.arange(grid.shape[1] + 1) + 0.5, np.arange(grid.shape[0] + 1) - 0.5
    mesh = ax.pcolormesh(*edges, np.ma.masked_invalid(grid.to_numpy(float)), norm=norm, cmap="viridis", rasterized=True)
    scale = ", logarithmic" if isinstance(norm, LogNorm) else ""
    ax.figure.colorbar(mesh, ax=ax, label=f"importance{scale} (more: keep)", pad=0.02)
    ax.set(xlabel=f"units of kind {kind}, most important first (rank)", ylabel="layer", title=f"Importance: {kind}")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    step = max(1, len(grid) // 16)  # so that the numbers have room
    ax.set_yticks(range(0, len(grid), step), [str(int(layer)) for layer in grid.index[::step]])
    ax.invert_yaxis()
    return ax


@projected
def plot_plan(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Plots the kept fraction of each layer.

    Args:
        table: columns kind, layer, kept_fraction, one row per group: `PruningPlan.table()`.
        ax: where to draw; None is a new figure.

    Returns:
        The axes: layers across, the fraction of units kept up, one bar a kind.

    Raises:
        PrunekitError: the table is empty or has not these columns.
    """
    require_columns(table, ("kind", "layer", "kept_fraction"), "PruningPlan.table()")
    kept = table.dropna(subset="layer").pivot_table(index="layer", columns="kind", values="kept_fraction", sort=False)
    kept = kept.sort_index()
    ax = axes_or_new(ax)
    draw_bars(ax, kept, colors_of(kept.columns, KIND_COLORS))
    ax.set(xlabel="layer", ylabel="units kept", ylim=(0, 1.04), title="What the plan keeps")
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    legend_outside(ax)
    return ax


def draw_bars(ax: Axes, wide: pd.DataFrame, colors: Mapping[str, str], errors: pd.DataFrame | None = None) -> None:
    """Grouped bars: one group per row, one bar per column; columns differ by colour and hatch."""
    width = 0.8 / wide.shape[1]
    places = np.arange(len(wide))
    style: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.5}
    style["error_kw"] = {"ecolor": "black", "elinewidth": 1.2, "capsize": 2}
    for i, name in enumerate(wide.columns):
        shift = (i - (wide.shape[1] - 1) / 2) * width
        own = {"label": name, "color": colors[name], "hatch": HATCHES[i % len(HATCHES)]}
        spread = None if errors is None else errors[name].to_numpy(float)
        bars = ax.bar(places + shift, wide[name].to_numpy(float), width, yerr=spread, **own, **style)
        for line in () if bars.errorbar is None else (*bars.errorbar.lines[1], *bars.errorbar.lines[2]):
            line.set_path_effects(HALO)
    step = max(1, len(wide) // 16) if pd.api.types.is_numeric_dtype(wide.index) else 1
    ax.set_xticks(places[::step], [str(label) for label in wide.index[::step]])
    ax.grid(False, axis="x")
    ax.set_axisbelow(True)


@projected
def plot_loss(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Plots the training loss by step, with its running mean if there are many steps.

    Args:
        table: columns step and loss in nats per token, one row per step: the recovery log's `table()`. A column
            `method` draws one curve each.
        ax: where to draw; None is a new figure.

    Returns:
        The axes: steps across, loss up.

    Raises:
        PrunekitError: the table is empty or has not these columns.
    """
    require_columns(table, ("step", "loss"), "the recovery log's table()")
    curves = dict(list(table.groupby("method", sort=False))) if "method" in table else {"loss": table}
    colors = colors_of(curves, METHOD_COLORS | {"loss": METHOD_COLORS["recovered"]})
    ax = axes_or_new(ax)
    for marker, (name, curve) in zip(MARKERS * len(curves), curves.items(), strict=False):
        draw_curve(ax, curve, str(name), colors[name], marker)
    ax.set(xlabel="optimiser step", ylabel="training loss (nats per token)", title="Recovery")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_outside(ax)
    return ax


def draw_curve(ax: Axes, curve: pd.DataFrame, name: str, color: str, marker: str) -> None:
    """One loss curve; behind its running mean where it has more than 20 steps."""
    many = len(curve) > 20
    window = max(5, len(curve) // 20)
    style: dict[str, Any] = {"color": color, "marker": marker, "markevery": max(1, len(curve) // 12)}
    if not many:
        ax.plot(curve["step"], curve["loss"], label=name, linewidth=2, **style)
        return
    ax.plot(curve["step"], curve["loss"], color=color, alpha=0.3, linewidth=1)
    mean = curve["loss"].rolling(window, min_periods=1).mean()
    ax.plot(curve["step"], mean, label=f"{name}, mean of {window} steps", linewidth=2.5, **style)


@projected
def plot_accuracy(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Plots the zero-shot accuracy of several models, by task.

    Args:
        table: columns model, accuracy, stderr, chance, and in second place the group that is drawn across:
            `prunekit.evaluation.compare_accuracy(reports, by="task")` (or by domain).
        ax: where to draw; None is a new figure.

    Returns:
        The axes: tasks across, accuracy up with its standard error, a line at chance.

    Raises:
        PrunekitError: the table is empty or has not these columns.
    """
    require_columns(table, ("model", "accuracy", "stderr", "chance"), "compare_accuracy(reports)")
    group = next(column for column in table.columns if column != "model")
    wide = table.pivot_table(index=group, columns="model", values=["accuracy", "stderr"], sort=False)
    ax = axes_or_new(ax)
    draw_bars(ax, wide["accuracy"], colors_of(wide["accuracy"].columns), wide["stderr"])
    chance = table.groupby(group, sort=False)["chance"].mean().reindex(wide["accuracy"].index)
    places = np.arange(len(chance))
    style: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1.8, "path_effects": HALO}
    ax.hlines(chance, places - 0.46, places + 0.46, label="chance", **style)
    ax.set(xlabel=group, ylabel="accuracy", ylim=(0, 1.04), title="Zero-shot accuracy (± standard error)")
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    if len(chance) > 6:
        ax.set_xticks(ax.get_xticks(), [label.get_text() for label in ax.get_xticklabels()], rotation=25, ha="right")
    legend_outside(ax)
    return ax


def side_by_side(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Joins several scores of the same units in one table, for `plot_agreement`.

    Args:
        tables: name of the score → `Scores.table()`.

    Returns:
        Columns group, kind, layer, unit, and one for each score.

    Raises:
        PrunekitError: a table lacks columns, or the tables are not about the same units.
    """
    keys = ["group", "kind", "layer", "unit"]
    columns = []
    for name, table in tables.items():
        require_columns(table, [*keys, "score"], "Scores.table() of each score")
        columns.append(table.set_index(keys)["score"].rename(name))
    if not columns or any(set(columns[0].index) != set(column.index) for column in columns):
        raise PrunekitError(
            f"the scores of {', '.join(tables) or 'nothing'} are not about the same units; score one model"
        )
    return pd.concat(columns, axis=1).reset_index()


@projected
def plot_agreement(table: pd.DataFrame, *, x: str | None = None, y: str | None = None, ax: Axes | None = None) -> Axes:
    """Plots the ranks of two scores against each other, inside each group.

    Args:
        table: columns group, kind and two scores, one row per unit: `side_by_side({"taylor": …, "magnitude": …})`.
        x: column across; None is the last but one.
        y: column up; None is the last.
        ax: where to draw; None is a new figure.

    Returns:
        The axes: rank inside the group from 0% (cut first) to 100%, and Spearman's rank correlation in the title.

    Raises:
        PrunekitError: the table is empty or has not these columns.
    """
    require_columns(table, ("group", "kind"), "side_by_side(...)")
    x, y = x or str(table.columns[-2]), y or str(table.columns[-1])
    require_columns(table, (x, y), "side_by_side(...)")
    ranks = table.groupby("group")[[x, y]].rank(pct=True)
    ax = axes_or_new(ax)
    colors = colors_of(table["kind"], KIND_COLORS)
    crowded = len(table) > 500
    by_size = sorted(table.groupby("kind", sort=False), key=lambda kind: -len(kind[1]))  # the few lie on top
    for marker, (kind, rows) in zip(MARKERS, by_size, strict=False):
        style: dict[str, Any] = {"s": 36 if not crowded or len(rows) < 200 else 8, "alpha": 0.6, "lw": 0}
        points = ranks.loc[rows.index]
        ax.scatter(points[x], points[y], marker=marker, color=colors[str(kind)], label=str(kind), **style)
    ax.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1.2, label="same rank")
    ax.set(xlabel=f"rank by {x} (0%: cut first)", ylabel=f"rank by {y} (0%: cut first)")
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    ax.set_title(f"Spearman's ρ = {ranks[x].corr(ranks[y]):.2f}")
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.set_aspect("equal")
    legend = ax.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    for handle in legend.legend_handles:  # small points are hard to see there
        if isinstance(handle, PathCollection):
            handle.set(sizes=[60], alpha=1)
    return ax
