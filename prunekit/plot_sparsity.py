"""Plots of sparsity: masks, zeros per matrix, perplexity, and SparseLLM's iterations."""

from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter
from torch import Tensor

from prunekit.errors import PrunekitError
from prunekit.plot_style import MARKERS, axes_or_new, colors_of, legend_outside, projected, require_columns

KEPT = "#21618C"  # as dark as it must be in greyscale
CELLS = 64  # rows or columns up to which lines and numbers are drawn
LINES = 12  # FFNs up to which each has an entry in the legend


@projected
def plot_mask(weight: Tensor, *, ax: Axes | None = None) -> Axes:
    """Plots the mask of a weight matrix: zeros white, other weights dark.

    Args:
        weight: (out, in), or a part of it such as `weight[:48, :48]`.
        ax: where to draw; None is a new figure.

    Returns:
        The axes: inputs across, outputs down, the share of zeros as the title.

    Raises:
        PrunekitError: no matrix.
    """
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.numel():
        given = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise PrunekitError(f"a mask is drawn of a weight (out, in), not of {given}")
    stays = (weight.detach() != 0).float().cpu().numpy()
    ax = axes_or_new(ax)
    ax.grid(False)
    if max(stays.shape) > CELLS:
        ax.imshow(stays, cmap=ListedColormap(["white", KEPT]), vmin=0, vmax=1, aspect="equal")
    else:
        edges = [np.arange(n + 1) - 0.5 for n in (stays.shape[1], stays.shape[0])]
        style: dict[str, Any] = {"edgecolor": "#C8C8C8", "linewidth": 0.5}
        ax.pcolormesh(*edges, stays, cmap=ListedColormap(["white", KEPT]), vmin=0, vmax=1, **style)
        ax.set_aspect("equal")
        ax.invert_yaxis()
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))
    ax.set(xlabel="input (column)", ylabel="output (row)")
    ax.set_title(f"{1 - stays.mean():.0%} zeros", loc="left")
    return ax


@projected
def plot_ffn_errors(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Plots the error of each FFN's output after each iteration of SparseLLM.

    Args:
        table: columns layer, matrix, iteration, error and kept, one row an FFN and iteration:
            `SparsityReport.ffn_errors()`.
        ax: where to draw; None is a new figure.

    Returns:
        The axes: iterations across (the first is SparseGPT's), ‖FFN(X) − Y‖² / ‖Y‖² up, logarithmic; one line an FFN, a
        ring round the iteration whose weights were kept.

    Raises:
        PrunekitError: the table is empty or has not these columns.
    """
    require_columns(table, ("layer", "matrix", "iteration", "error", "kept"), "SparsityReport.ffn_errors()")
    ax = axes_or_new(ax)
    low, high = int(table["layer"].min()), int(table["layer"].max())
    top = low + 1.15 * max(high - low, 1)  # the last layer is not as yellow as to be lost on white
    scale: Any = ScalarMappable(Normalize(low, top), "viridis")
    few = table["matrix"].nunique() <= LINES
    for number, (_, curve) in enumerate(table.groupby("matrix", sort=False)):
        layer = int(curve["layer"].iloc[0])
        style: dict[str, Any] = {"color": scale.to_rgba(layer), "linewidth": 2, "markersize": 8}
        style |= {"marker": (*MARKERS, "<")[number % (len(MARKERS) + 1)], "label": f"layer {layer}" if few else None}
        ax.plot(curve["iteration"], curve["error"], **style)
    kept = table[table["kept"]]
    ring: dict[str, Any] = {"s": 260, "facecolors": "none", "edgecolors": "black", "linewidths": 1.8, "zorder": 3}
    ax.scatter(kept["iteration"], kept["error"], label="kept", **ring)
    ax.set(xlabel="iteration (0: SparseGPT)", ylabel="relative error of the FFN's output", yscale="log")
    ax.set_title("What SparseLLM's iterations gain")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.margins(x=0.06)
    if not few:
        ax.figure.colorbar(scale, ax=ax, label="layer", pad=0.02, ticks=MaxNLocator(integer=True))
    legend_outside(ax)
    return ax


@projected
def plot_sparsity(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Plots perplexity by sparsity, one curve per method and allocation.

    Args:
        table: columns method, sparsity (a fraction) and perplexity, one row per measured model. Rows of the method
            `"dense"` become a line across. With a column `allocation`, other values than `"uniform"` are dashed,
            with hollow markers.
        ax: where to draw; None is a new figure.

    Returns:
        The axes: sparsity across, perplexity up, logarithmic.

    Raises:
        PrunekitError: the table is empty or has not these columns.
    """
    require_columns(table, ("method", "sparsity", "perplexity"), "columns method, sparsity and perplexity")
    dense = table[table["method"] == "dense"]
    rows = table[table["method"] != "dense"]
    rows = rows.assign(allocation=rows["allocation"].fillna("uniform") if "allocation" in rows else "uniform")
    colors = colors_of(table["method"])
    markers = dict(zip(rows["method"].unique(), MARKERS * len(rows), strict=False))
    ax = axes_or_new(ax)
    for (method, allocation), curve in rows.groupby(["method", "allocation"], sort=False):
        even = allocation == "uniform"
        style: dict[str, Any] = {"color": colors[method], "marker": markers[method], "linewidth": 2.2, "markersize": 9}
        style |= {"linestyle": "-"} if even else {"linestyle": "--", "markerfacecolor": "white", "markeredgewidth": 2}
        found = curve.groupby("sparsity")["perplexity"].median()
        ax.plot(found.index, found, label=method if even else f"{method}, {allocation}", **style)
    if len(dense):
        ax.axhline(dense["perplexity"].median(), color=colors["dense"], linewidth=1.5, linestyle=":", label="dense")
    ax.set(xlabel="zeros among the weights", ylabel="perplexity (logarithmic)", yscale="log", title="What zeros cost")
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set_xticks(sorted(rows["sparsity"].unique()) if rows["sparsity"].nunique() <= 8 else ax.get_xticks())
    wide = table["perplexity"].max() > 10 * table["perplexity"].min()
    ticks = LogLocator(subs=(1, 2, 5) if wide else (1, 1.5, 2, 3, 4, 5, 7))
    ax.yaxis.set(major_locator=ticks, major_formatter="{x:g}", minor_formatter="")
    legend_outside(ax)
    return ax


@projected
def plot_zeros(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Plots the share of zeros in each matrix of each layer.

    Args:
        table: columns layer, matrix, n_zeros and n_weights, one row per matrix: `SparsityReport.table()`. Experts of
            one layer are taken together.
        ax: where to draw; None is a new figure.

    Returns:
        The axes: layers across, matrices down, the share of zeros as colour.

    Raises:
        PrunekitError: the table is empty or has not these columns.
    """
    require_columns(table, ("layer", "matrix", "n_zeros", "n_weights"), "SparsityReport.table()")
    names = _short_names(table["matrix"])
    sums = table.assign(name=names).groupby(["name", "layer"], sort=False)[["n_zeros", "n_weights"]].sum()
    share = (sums["n_zeros"] / sums["n_weights"]).unstack("layer").sort_index(axis=1).reindex(names.unique())
    text = share.map(lambda value: ">99%" if 0.995 <= value < 1 else f"{value:.0%}")  # 100% is said of all alone
    written = {"annot": text, "fmt": "", "annot_kws": {"fontsize": "small"}} if share.shape[1] <= LINES else {}
    bar = {"label": "zeros", "pad": 0.02, "format": PercentFormatter(1, decimals=0)}
    ticks = {"xticklabels": max(1, share.shape[1] // 16), "yticklabels": 1}
    ax = axes_or_new(ax)
    ax.grid(False)
    sns.heatmap(share, vmin=0, vmax=1, cmap="viridis", linewidths=1, cbar_kws=bar, ax=ax, **written, **ticks)
    ax.tick_params(rotation=0)
    ax.set(xlabel="layer", ylabel="matrix")
    ax.set_title(f"Where the zeros are ({table['n_zeros'].sum() / table['n_weights'].sum():.0%} of all)", loc="left")
    return ax


def _short_names(matrices: pd.Series) -> pd.Series:
    """`model.layers.3.mlp.down_proj.weight` → `down_proj`, or a longer name if that is not unique."""
    inside = matrices.str.replace(r"\[\d+\]$|\.weight$", "", regex=True).str.replace(r"^.*?\.\d+\.", "", regex=True)
    inside = inside.str.replace(r"\.\d+(?=\.|$)", "", regex=True)  # numbers of experts
    last = inside.str.split(".").str[-1]
    alike = inside.groupby(last).transform("nunique") > 1
    return last.mask(alike, inside)
