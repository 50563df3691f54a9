"""Pictures of the knowledge distribution: what stands where, which colour is worse, and what is refused."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from plot_helpers import closed_figures, is_labelled_and_drawn_where_told  # noqa: F401

from prunekit import PrunekitError
from prunekit.plot_knowledge import plot_knowledge, plot_massive, plot_score_agreement, plot_units


def changes(measure="accuracy", layers=3, worst=0.4):
    """Layer 1's heads hold all facts; nothing else is worth anything but for a gain in layer 2."""
    sign = -1 if measure == "accuracy" else 1
    rows = [
        (f"layers.{layer}.attn:{kind}", kind, layer, ratio, domain, measure,
         sign * (worst if (kind, layer, domain) == ("kv_head", 1, "fact") else -0.1 if layer == 2 else 0.0) * ratio)
        for layer in range(layers) for kind in ("kv_head", "ffn_channel", "layer")
        for ratio in ((1.0,) if kind == "layer" else (0.5, 1.0)) for domain in ("fact", "copying")
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["group", "kind", "layer", "ratio", "domain", "measure", "change"])


def grid(ax):
    return np.asarray(ax.collections[0].get_array())


def rows_of(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


def bar_label(ax):
    return ax.collections[0].colorbar.ax.get_ylabel()


@pytest.mark.parametrize("measure", ["accuracy", "loss"])
def test_the_worst_is_orange_and_hatched_whatever_the_measure(measure):
    ax = plot_knowledge(changes(measure))
    assert rows_of(ax) == [f"{layer} {kind}" for layer in range(3) for kind in ("kv_head", "ffn_channel", "layer")]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["fact", "copying"]
    values, mesh = grid(ax), ax.collections[0]
    row, column = divmod(int(np.abs(values).argmax()), 2)
    assert (rows_of(ax)[row], column) == ("1 kv_head", 0)
    assert abs(values[row, column]) == pytest.approx(40 if measure == "accuracy" else 0.4)
    assert ("points" if measure == "accuracy" else "nats") in bar_label(ax)
    red, _, blue = to_rgb(mesh.cmap(mesh.norm(values[row, column])))
    better_red, _, better_blue = to_rgb(mesh.cmap(mesh.norm(-values[row, column])))
    assert red > blue and better_blue > better_red
    assert mesh.norm(0) == 0.5  # centred
    (patch,) = ax.patches
    assert patch.get_hatch() and patch.get_xy() == (column - 0.5, row - 0.5)
    assert ax.yaxis_inverted() and "100%" in ax.get_title(loc="left")


def test_another_ratio_and_what_has_but_one():
    ax = plot_knowledge(changes(), ratio=0.5)
    assert grid(ax).min() == pytest.approx(-20) and "2 layer" in rows_of(ax) and "50%" in ax.get_title(loc="left")
    assert ax.collections[0].norm.vmax == plot_knowledge(changes(), ratio=1.0).collections[0].norm.vmax  # one scale
    with pytest.raises(PrunekitError, match=r"ratio=0.3 was not measured; one of \[0.5, 1.0\]"):
        plot_knowledge(changes(), ratio=0.3)


def test_a_broken_model_has_the_darkest_colour_and_the_scale_is_of_the_others():
    table = changes("loss")
    table.loc[table["change"].idxmax(), "change"] = np.inf
    ax = plot_knowledge(table)
    rest = table.loc[np.isfinite(table["change"]), "change"].abs().max()  # at any ratio
    assert ax.collections[0].norm.vmax == pytest.approx(rest) and grid(ax).max() == pytest.approx(rest)
    still = plot_knowledge(changes("loss").assign(change=0.0))
    assert np.isfinite(grid(still)).all() and not still.patches


def test_many_rows_are_named_where_there_is_room_and_blocks_by_their_module():
    ax = plot_knowledge(changes(layers=20))
    assert len(rows_of(ax)) <= 32 and len(grid(ax)) == 60
    table = changes().query("kind == 'layer'").assign(kind="block")
    both = pd.concat([table, table.assign(group=table["group"].str.replace("attn", "mlp"))])
    assert rows_of(plot_knowledge(both))[:2] == ["0 block attn", "0 block mlp"]


def test_units_are_rows():
    table = changes().query("kind == 'kv_head' and ratio == 1")
    table = pd.concat([table.assign(unit=unit, change=table["change"] * unit) for unit in range(3)])
    figure, given = plt.subplots()
    ax = plot_units(table, ax=given)
    assert ax is given and len(rows_of(ax)) == 9 and rows_of(ax)[5] == "1.2"
    assert grid(ax)[5, 0] == grid(ax).min() == pytest.approx(-80)
    two = plot_units(pd.concat([table, table.assign(kind="expert")]))
    assert rows_of(two)[:2] == ["0.0 kv_head", "0.1 kv_head"] or "expert" in "".join(rows_of(two))
    with pytest.raises(PrunekitError, match="no unit; give .*single units"):
        plot_units(changes())


def test_agreement_is_written_into_its_place():
    rows = [("taylor", "all", "fact", 0.9), ("taylor", "all", "copying", -0.25), ("random", "all", "fact", np.nan),
            ("random", "all", "copying", 0.0), ("taylor", "kv_head", "fact", 1.0)]  # fmt: skip
    table = pd.DataFrame(rows, columns=["score", "kind", "domain", "spearman"]).assign(n=8)
    ax = plot_score_agreement(table)
    written = {text.get_position(): text.get_text() for text in ax.texts}
    assert written == {(0, 0): "0.90", (1, 0): "-0.25", (0, 1): "–", (1, 1): "0.00"}
    assert rows_of(ax) == ["taylor", "random"] and ax.collections[0].norm(0) == 0.5
    assert (ax.collections[0].norm.vmin, ax.collections[0].norm.vmax) == (-1, 1) and not ax.patches
    assert "kv_head" in plot_score_agreement(table, kind="kv_head").get_title(loc="left")
    with pytest.raises(PrunekitError, match="a kind out of all, kv_head"):
        plot_score_agreement(table, kind="expert")


@pytest.mark.parametrize("plot", [plot_knowledge, plot_units, plot_score_agreement])
def test_tables_without_columns_are_refused(plot):
    for table in (pd.DataFrame(), changes().drop(columns="kind")):
        with pytest.raises(PrunekitError, match="the table is empty or has no"):
            plot(table)
    other = changes().drop(columns="domain").assign(score="a", spearman=0.0, kind="all")
    with pytest.raises(PrunekitError, match="has no column domain"):
        plot(other if plot is plot_knowledge else other.assign(unit=0))


def test_single_units_are_not_drawn_as_groups():
    with pytest.raises(PrunekitError, match="single units; draw it with plot_units"):
        plot_knowledge(changes().assign(unit=0))


def test_the_stream_and_the_attention_on_its_first_token():
    table = pd.DataFrame({"largest": [30.0, 25e3], "median": [0.6, 1.7], "attention_to_first": [0.01, 0.4]})
    is_labelled_and_drawn_where_told(lambda **options: plot_massive(table, **options))
    ax = plot_massive(table)
    assert [line.get_ydata().tolist() for line in ax.lines] == [[30.0, 25e3], [0.6, 1.7]] and ax.get_yscale() == "log"
    (right,) = (other for other in ax.figure.axes if other is not ax)
    assert [bar.get_height() for bar in right.patches] == [0.01, 0.4] and right.get_ylabel() == "share of attention"
    with pytest.raises(PrunekitError, match="MassiveActivations.layers"):
        plot_massive(table[["largest"]])
