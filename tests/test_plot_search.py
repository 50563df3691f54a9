"""Pictures of a search: what they show is what the tables say, and what is no table is refused."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
from plot_helpers import closed_figures, is_labelled_and_drawn_where_told  # noqa: F401

from prunekit import PrunekitError
from prunekit.plotting import plot_front, plot_learning, plot_predictions, plot_spared

PREDICTIONS = pd.DataFrame({"expected": [1.0, 2.0, 3.0, 4.0], "measured": [1.5, 2.0, 2.5, 4.5]})
LEARNING = pd.DataFrame(
    {"n_pairs": [20, 20, 80, 80], "spearman": [0.4, 0.6, 0.8, 0.9], "rmse": [1.0, 0.8, 0.4, 0.2], "repeat": [0, 1] * 2}
)
PAIRS = pd.DataFrame(
    {
        "round": [0, 0, 0, 1, 1],
        "parameters": [1e6, 2e6, 3e6, 1.5e6, 2.5e6],
        "perplexity": [9.0, 5.0, 4.0, 6.0, 90.0],
    }
)
RULES = pd.DataFrame({"method": ["uniform"] * 2, "parameters": [1e6, 2e6], "perplexity": [12.0, 7.0]})
SPARED = pd.DataFrame(
    {"kind": ["kv_head", "kv_head", "ffn_channel", "ffn_channel"], "layer": [0, 1] * 2, "shap": [0.4, 0.1, 0.3, -0.2],
     "knowledge": [0.9, 0.2, 0.5, 0.1]}
)  # fmt: skip


@pytest.mark.parametrize(
    ("plot", "table"),
    [(plot_predictions, PREDICTIONS), (plot_learning, LEARNING), (plot_front, PAIRS), (plot_spared, SPARED)],
)
def test_plots_are_labelled_and_draw_where_they_are_told(plot, table):
    is_labelled_and_drawn_where_told(partial(plot, table))


def test_predictions_show_every_architecture_and_how_far_they_are_off():
    ax = plot_predictions(PREDICTIONS)
    (points,) = ax.collections
    assert points.get_offsets().tolist() == PREDICTIONS[["expected", "measured"]].to_numpy().tolist()
    assert ax.get_title(loc="left") == "ρ = 1.00, rmse 0.43"  # sqrt(.75 / 4)
    rounds = plot_predictions(PREDICTIONS.assign(round=[1, 1, 2, 2]))
    assert [len(points.get_offsets()) for points in rounds.collections] == [2, 2]


@pytest.mark.parametrize("figure", ["spearman", "rmse"])
def test_learning_shows_the_mean_and_every_draw(figure):
    ax = plot_learning(LEARNING, figure=figure, levels={"another text": 0.97})
    mean = LEARNING.groupby("n_pairs")[figure].mean()
    curve = next(line for line in ax.lines if line.get_label() == "predictor, mean")
    assert curve.get_xdata().tolist() == [20, 80] and np.allclose(curve.get_ydata(), mean)
    level = next(line for line in ax.lines if line.get_label() == "another text")
    assert set(level.get_ydata()) == {0.97}


def test_the_front_is_what_nothing_measured_is_better_than():
    ax = plot_front(PAIRS, limit=2.2e6, rules=RULES)
    front = next(line for line in ax.lines if line.get_label() == "front")
    assert front.get_xdata().tolist() == [1e6, 1.5e6, 2e6, 3e6, 3e6]
    assert front.get_ydata().tolist() == [9, 6, 5, 4, 4]
    ring = next(points for points in ax.collections if points.get_label() == "best within the limit")
    assert ring.get_offsets().tolist() == [[2e6, 5.0]]
    assert "1 of 5 lie above" in [text.get_text() for text in ax.texts]
    rule = next(line for line in ax.lines if line.get_label() == "uniform")
    assert rule.get_ydata().tolist() == [12, 7]


def test_spared_groups_are_ranked_within_each_view():
    ax = plot_spared(SPARED)
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "shap\nkv_head", "shap\nffn_channel", "knowledge\nkv_head", "knowledge\nffn_channel"
    ]  # fmt: skip
    mesh = ax.collections[0].get_array()
    assert mesh.reshape(4, 2).tolist() == [[4, 2], [3, 1], [4, 2], [3, 1]]
    assert [text.get_text() for text in ax.texts] == ["0.40", "0.10", "0.30", "-0.20", "0.90", "0.20", "0.50", "0.10"]


@pytest.mark.parametrize(
    ("plot", "table"),
    [
        (plot_predictions, PREDICTIONS[["expected"]]),
        (plot_learning, LEARNING[["n_pairs"]]),
        (plot_learning, LEARNING.head(0)),
        (plot_front, PAIRS[["round", "parameters"]]),
        (partial(plot_front, limit=10.0), PAIRS),
        (partial(plot_front, rules=RULES[["method"]]), PAIRS),
        (plot_spared, SPARED[["kind", "layer"]]),
        (plot_spared, [1, 2]),
    ],
)
def test_what_is_no_such_table_is_refused(plot, table):
    with pytest.raises(PrunekitError):
        plot(table)
