"""Pictures of training that prunes."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection
from plot_helpers import closed_figures, is_labelled_and_drawn_where_told  # noqa: F401

from prunekit.errors import PrunekitError
from prunekit.plotting import plot_mixture, plot_norms


def history():
    """Two periods of three steps: two channels in each, and one head in the second."""
    rows = [
        (period, start + step, f"layers.{period}.mlp:ffn_channel", unit, (unit + 1) * (3 - step) / 3)
        for period, start in ((1, 2), (2, 5))
        for unit in (0, 1)
        for step in range(4)
    ]
    rows += [(2, 5 + step, "layers.0.attn:kv_head", 1, 9.0 - 3 * step) for step in range(4)]
    return pd.DataFrame(rows, columns=["period", "step", "group", "unit", "norm"])


def mixture():
    rows = [(n, name, gap / n, windows if n < 3 else 0)
            for n in (1, 2, 3) for name, gap, windows in (("facts", 0.4, 12), ("sums", -0.1, 4))]  # fmt: skip
    return pd.DataFrame(rows, columns=["round", "source", "gap", "n_windows"])


PLOTS = {
    "norms": lambda ax=None: plot_norms(history(), ax=ax),
    "drawn": lambda ax=None: plot_mixture(mixture(), ax=ax),
    "gaps": lambda ax=None: plot_mixture(mixture(), y="gap", ax=ax),
}


@pytest.mark.parametrize("plot", PLOTS.values(), ids=PLOTS.keys())
def test_axes_are_labelled_and_drawn_where_told(plot):
    is_labelled_and_drawn_where_told(plot)


def paths(ax):
    return next(c for c in ax.collections if isinstance(c, LineCollection)).get_segments()


def test_every_unit_is_a_line_from_its_choice_to_zero():
    found = paths(plot_norms(history()))
    assert len(found) == 4  # channels, of which there are most
    starts = sorted((float(path[0, 0]), float(path[0, 1])) for path in found)
    assert starts == [(2, 1), (2, 2), (5, 1), (5, 2)]
    assert all(path[-1, 1] == 0 and len(path) == 4 for path in found)
    (head,) = paths(plot_norms(history(), kind="kv_head"))
    np.testing.assert_allclose(head, [[5, 9], [6, 6], [7, 3], [8, 0]])


def test_many_units_are_thinned_out():
    wide = pd.concat([history().assign(unit=lambda t, i=i: t["unit"] + 2 * i) for i in range(300)])
    assert 200 <= len(paths(plot_norms(wide))) <= 400


def test_bars_stack_what_each_round_drew():
    ax = plot_mixture(mixture())
    tops = sorted((bar.get_x() + bar.get_width() / 2, bar.get_y() + bar.get_height()) for bar in ax.patches)
    assert tops == [(1, 12), (1, 16), (2, 12), (2, 16)]  # nothing was drawn after the last round


def test_gaps_are_followed_to_the_last_measurement():
    ax = plot_mixture(mixture(), y="gap")
    facts = next(line for line in ax.lines if line.get_label() == "facts")
    np.testing.assert_allclose(facts.get_ydata(), [0.4, 0.2, 0.4 / 3])


@pytest.mark.parametrize(
    ("plot", "message"),
    [
        (lambda: plot_norms(mixture()), "period, step, group, unit, norm; give LHSPG.history"),
        (lambda: plot_norms(history().iloc[:0]), "empty"),
        (lambda: plot_norms("history"), "a str is no table; give LHSPG.history"),
        (lambda: plot_norms(history(), kind="layer"), "ffn_channel, kv_head"),
        (lambda: plot_mixture(history()), "give MixtureLog.table"),
        (lambda: plot_mixture(mixture(), y="loss"), "'n_windows', 'gap'"),
    ],
)
def test_bad_tables_are_refused(plot, message):
    with pytest.raises(PrunekitError, match=message):
        plot()
