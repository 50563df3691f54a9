"""Plots of the knowledge lab: what a question needs, answers, attention, exciting tokens, and models compared."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from prunekit.errors import PrunekitError
from prunekit.plot_style import (
    HATCHES,
    KIND_COLORS,
    MARKERS,
    axes_or_new,
    colors_of,
    domain_column,
    legend_outside,
    projected,
    require_columns,
)

MOST = 20  # bars at most
FEW = 12  # bars beside which a share has room in a large font
WIDEST = 24  # letters of a token or choice in a label
FALLS = {
    "answer": "fall of the answer's log-probability (nats)",
    "choices": "fall of the log of the answer's share among the choices (nats)",
    "domain": "mean rise of the loss (nats; 95% interval)",
}


@projected
def plot_needs(
    table: pd.DataFrame, *, most: int = 15, title: str = "What the answer needs", ax: Axes | None = None
) -> Axes:
    """Plots how much the answer to one question, or a domain, loses without each unit: the units that matter most.

    Args:
        table: columns kind, layer, unit, fall and measure: what `needs` or `domain_needs` returns.
        most: number of units to draw, those with the largest change in either direction.
        title: title of the plot.
        ax: where to draw; None is a new figure.

    Returns:
        The axes: one bar per unit, the fall of the log-probability in nats to the right (the answer needs the unit);
        bars to the left are units without which the answer is likelier. Kinds differ by colour and hatch. Lines are
        95% intervals, where the table has columns low and high.

    Raises:
        PrunekitError: the table has not these columns.
    """
    require_columns(table, ("kind", "layer", "unit", "fall", "measure"), "needs(...)")
    strongest = table["fall"].abs().sort_values(ascending=False, kind="stable").index[: max(1, most)]
    rows = table.loc[strongest].sort_values("fall", ascending=False, kind="stable")
    kinds = list(dict.fromkeys(table["kind"]))
    colors = colors_of(kinds, KIND_COLORS)
    ax = axes_or_new(ax)
    finite = rows["fall"].clip(*_finite_limits(rows["fall"]))
    for number, kind in enumerate(kinds):
        mine = (rows["kind"] == kind).to_numpy()
        ax.barh(np.flatnonzero(mine), finite[mine], label=kind, **_bars(colors[kind], number))
    if {"low", "high"} <= {*rows}:
        ends = np.abs(rows[["low", "high"]].to_numpy(float) - finite.to_numpy(float)[:, None]).T
        ax.errorbar(finite, range(len(rows)), xerr=ends, linestyle="none", color="black", elinewidth=1.2, capsize=2)
    names = [unit_name(*row) for row in zip(rows["layer"], rows["unit"], strict=True)]
    ax.set_yticks(range(len(rows)), names)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set(xlabel=FALLS.get(str(table["measure"].iloc[0]), "fall (nats)"), ylabel="ablated alone (layer.unit)")
    ax.set_title(title)
    legend_outside(ax)
    return ax


def _bars(color: str, number: int) -> dict[str, Any]:
    return {"color": color, "hatch": HATCHES[number % len(HATCHES)], "edgecolor": "white", "linewidth": 0.5}


def unit_name(layer: object, unit: object) -> str:
    """A short name such as `"2.1"` for a unit, or `"3 all"` where the whole group was ablated."""
    place = "–" if pd.isna(layer) else str(int(layer))  # type: ignore[call-overload]
    return f"{place} all" if pd.isna(unit) else f"{place}.{int(unit)}"  # type: ignore[call-overload]


def _finite_limits(values: pd.Series) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if len(finite) else (-1.0, 1.0)


@projected
def plot_answers(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Plots the probability of each choice, with one bar per model.

    Args:
        table: columns model, choice and probability: `side_by_side_answers({"dense": …, "cut": …})`.
        ax: where to draw; None is a new figure.

    Returns:
        The axes: choices down, probability to the right; models differ by colour and hatch.

    Raises:
        PrunekitError: the table has not these columns.
    """
    require_columns(table, ("model", "choice", "probability"), "side_by_side_answers(...)")
    models, choices = list(dict.fromkeys(table["model"])), list(dict.fromkeys(table["choice"]))
    colors = colors_of(models)
    ax = axes_or_new(ax)
    height = 0.8 / len(models)
    size = "medium" if len(models) * len(choices) <= FEW else "small"  # shares of neighbours must not touch
    for number, name in enumerate(models):
        shares = table[table["model"] == name].groupby("choice", sort=False)["probability"].first().reindex(choices)
        places = np.arange(len(choices)) + (number - (len(models) - 1) / 2) * height
        ax.barh(places, shares.fillna(0), height, label=label_text(name), **_bars(colors[name], number))
        for place, share in zip(places, shares, strict=True):
            if not np.isnan(share):
                ax.text(0.01 + share, place, f"{share:.1%}", va="center", fontsize=size)
    ax.set_yticks(range(len(choices)), [label_text(choice) for choice in choices])
    ax.set(xlabel="probability", ylabel="choice", xlim=(0, 1.12), title="The answer")
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1])
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    legend_outside(ax)
    return ax


@projected
def plot_attention(pattern: pd.DataFrame, *, title: str = "Attention of one head", ax: Axes | None = None) -> Axes:
    """Plots an attention pattern: how much each token reads from each token.

    Args:
        pattern: a square table of weights in [0, 1]: what `attention_pattern` returns.
        title: title of the plot.
        ax: where to draw; None is a new figure.

    Returns:
        The axes: tokens that are read across, tokens that read down, the weight as colour (darker: more). Later
        tokens cannot be read, so nothing is drawn above the diagonal.

    Raises:
        PrunekitError: the table is not square, or is empty.
    """
    require_columns(pattern, (), "attention_pattern(...)")
    if pattern.shape[0] != pattern.shape[1]:
        raise PrunekitError(f"the table has the shape {pattern.shape} and is not square; give attention_pattern(...)")
    ax = axes_or_new(ax)
    ax.grid(False)
    edges = np.arange(len(pattern) + 1) - 0.5
    weights = np.ma.masked_array(pattern.to_numpy(float), np.triu(np.ones(pattern.shape, dtype=bool), 1))
    mesh = ax.pcolormesh(edges, edges, weights, cmap="Blues", vmin=0, vmax=1, rasterized=True)
    ax.figure.colorbar(mesh, ax=ax, label="attention weight", pad=0.02)
    step = 1 + (len(pattern) - 1) // 32
    places, names = range(0, len(pattern), step), [label_text(name) for name in pattern.index[::step]]
    size = "medium" if len(pattern) <= 14 else "x-small"
    ax.set_xticks(places, names, rotation=60, ha="right", rotation_mode="anchor", fontsize=size)
    ax.set_yticks(places, names, fontsize=size)
    ax.set(xlabel="token that is read", ylabel="token that reads", aspect="equal")
    ax.set_title(title, loc="left")
    ax.invert_yaxis()
    return ax


@projected
def plot_exciting(table: pd.DataFrame, *, title: str = "Tokens that excite one unit", ax: Axes | None = None) -> Axes:
    """Plots the activation at the tokens that excite one unit most, with the text before each.

    Args:
        table: columns before, token and activation: `ExcitingTokens.table(group, unit)`.
        title: title of the plot.
        ax: where to draw; None is a new figure.

    Returns:
        The axes: one bar per token, the activation to the right; its label ends with the token, in brackets.

    Raises:
        PrunekitError: the table has not these columns.
    """
    require_columns(table, ("before", "token", "activation"), "ExcitingTokens.table(group, unit)")
    rows = table.head(MOST)
    ax = axes_or_new(ax)
    ax.barh(range(len(rows)), rows["activation"], color=KIND_COLORS["ffn_channel"], edgecolor="black", linewidth=0.5)
    names = [
        f"{label_text(before, end=True)} [{label_text(token).strip()}]"
        for before, token in zip(rows["before"], rows["token"], strict=True)
    ]
    ax.set_yticks(range(len(rows)), names, fontsize="small")
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set(xlabel="activation", ylabel="… text before [token]")
    ax.set_title(title, loc="left")
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    return ax


@projected
def plot_moved(table: pd.DataFrame, *, moved: bool = False, ax: Axes | None = None) -> Axes:
    """Plots what one domain loses with each group, for several models, with intervals.

    Args:
        table: columns model, kind, layer, change, low, high, moved, moved_low, moved_high, measure and a domain (or
            task, tier, hops) with one value: rows of `compare_knowledge(...)`.
        moved: draw the difference from the first model instead of each model's change.
        ax: where to draw; None is a new figure.

    Returns:
        The axes: groups across, the change up with its 95% interval; models differ by colour and marker.

    Raises:
        PrunekitError: the table has not these columns, or holds several domains.
    """
    columns = ("moved", "moved_low", "moved_high") if moved else ("change", "low", "high")
    require_columns(table, ("model", "kind", "layer", "measure", *columns), "compare_knowledge(...)")
    by = domain_column(table, "compare_knowledge(...)")
    if table[by].nunique() != 1:
        raise PrunekitError("the table holds several domains; give the rows of one: table.query('domain == …')")
    if "ratio" in table and table["ratio"].nunique() > 1:
        raise PrunekitError("the table holds several ratios; give the rows of one: table.query('ratio == 1')")
    table = table.assign(unit=table.get("unit"))
    table = table.sort_values(["kind", "layer", "unit"], ascending=[False, True, True], kind="stable")
    models = list(dict.fromkeys(table.sort_index()["model"]))
    ax = axes_or_new(ax)
    scale = 100 if table["measure"].iloc[0] == "accuracy" else 1
    colors, drawn = colors_of(models), models[1:] if moved else models
    places = [tuple(row) for row in table[table["model"] == models[0]][["kind", "layer", "unit"]].to_numpy(object)]
    for number, name in enumerate(drawn):
        rows = scale * table[table["model"] == name][list(columns)].to_numpy(float)
        x = np.arange(len(rows)) + (number - (len(drawn) - 1) / 2) * 0.6 / len(drawn)
        errors = np.abs(rows[:, [1, 2]] - rows[:, [0]]).T
        style: dict[str, Any] = {
            "color": colors[name],
            "marker": MARKERS[models.index(name) % len(MARKERS)],
            "markersize": 8,
            "capsize": 3,
        }
        ax.errorbar(x, rows[:, 0], yerr=errors, linestyle="none", elinewidth=1.8, label=name, **style)
    ax.axhline(0, color="black", linewidth=1)
    ax.set_xticks(range(len(places)), [unit_name(layer, unit).removesuffix(" all") for _, layer, unit in places])
    _name_kinds(ax, [kind for kind, _, _ in places])
    unit_of = "accuracy (points)" if scale == 100 else "loss (nats)"
    ax.set(xlabel="layer of the ablated group", ylabel=f"{'difference in the ' if moved else ''}change of {unit_of}")
    ax.set_title(f"{table[by].iloc[0]}: {'moved' if moved else 'lost'} with each group")
    ax.xaxis.grid(False)
    legend_outside(ax)
    return ax


def _name_kinds(ax: Axes, kinds: list[str]) -> None:
    """Writes the kind of each run of groups above the axis, with a line between two."""
    starts = [i for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind]
    for start, end in zip(starts, [*starts[1:], len(kinds)], strict=True):
        if start:
            ax.axvline(start - 0.5, color="0.5", linewidth=0.8, linestyle=":")
        if len(starts) <= 6:
            ax.text(
                (start + end - 1) / 2, 0.99, kinds[start], transform=ax.get_xaxis_transform(), ha="center", va="top"
            )


def label_text(text: object, *, end: bool = False) -> str:
    """A text for a label: short, on one line, and without mathematics that matplotlib would typeset."""
    line = " ".join(str(text).split())
    if len(line) > WIDEST:
        line = f"… {line[-WIDEST:].partition(' ')[2] or line[-WIDEST:]}" if end else f"{line[:WIDEST]}…"
    return line.replace("$", r"\$")
