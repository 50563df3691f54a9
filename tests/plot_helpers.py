"""What every test of pictures shares: no window, and a guard over what plots leave behind."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest


def is_labelled_and_drawn_where_told(plot):
    ax = plot()
    assert ax.get_xlabel() and ax.get_ylabel() and (ax.get_title() or ax.get_title(loc="left"))
    own = plt.subplots()[1]
    assert plot(ax=own) is own
    own.figure.canvas.draw()


@pytest.fixture(autouse=True)
def closed_figures():
    before = dict(matplotlib.rcParams)
    yield
    plt.close("all")
    assert dict(matplotlib.rcParams) == before, "a plot changed global state"
