"""Pictures of zeros in unchanged shapes."""

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.collections import QuadMesh
from plot_helpers import closed_figures, is_labelled_and_drawn_where_told  # noqa: F401

from prunekit.errors import PrunekitError
from prunekit.plotting import METHOD_COLORS, plot_ffn_errors, plot_mask, plot_sparsity, plot_zeros

WEIGHT = torch.tensor([[0.0, 2.0, 0.0, -1.0], [3.0, 0.0, 0.0, 1e-30]])
PARTS = ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")


def errors(n_layers=2):
    """SparseLLM's errors: they fall in layer 0, and rise in all others."""
    rows = [
        (layer, f"model.layers.{layer}.mlp.down_proj.weight", t, 0.1 / (t + 1) if layer == 0 else 0.1 * (t + 1))
        for layer in range(n_layers)
        for t in range(3)
    ]
    table = pd.DataFrame(rows, columns=["layer", "matrix", "iteration", "error"])
    return table.assign(kept=table["iteration"] == table["layer"].map(lambda layer: 2 if layer == 0 else 0))


def costs(high=80.0):
    rows = [("dense", 0.0, 3.0, "uniform")]
    rows += [(name, s, top, "uniform") for name in ("magnitude", "sparsegpt") for s, top in ((0.5, 3.1), (0.9, high))]
    rows += [("sparsegpt", s, top, "global") for s, top in ((0.5, 3.0), (0.9, 9.0))]
    return pd.DataFrame(rows, columns=["method", "sparsity", "perplexity", "allocation"])


def zeros(n_layers=2, parts=PARTS):
    rows = [
        (layer, f"model.layers.{layer}.{part}.weight", 10 * layer + number, 100)
        for layer in range(n_layers)
        for number, part in enumerate(parts)
    ]
    return pd.DataFrame(rows, columns=["layer", "matrix", "n_zeros", "n_weights"])


PLOTS = {
    "mask": lambda ax=None: plot_mask(WEIGHT, ax=ax),
    "large mask": lambda ax=None: plot_mask(torch.eye(200), ax=ax),
    "FFN errors": lambda ax=None: plot_ffn_errors(errors(), ax=ax),
    "FFN errors of many layers": lambda ax=None: plot_ffn_errors(errors(32), ax=ax),
    "sparsity": lambda ax=None: plot_sparsity(costs(), ax=ax),
    "little sparsity": lambda ax=None: plot_sparsity(costs(5.0), ax=ax),
    "zeros": lambda ax=None: plot_zeros(zeros(), ax=ax),
    "zeros of many layers": lambda ax=None: plot_zeros(zeros(32), ax=ax),
}


@pytest.mark.parametrize("plot", PLOTS.values(), ids=PLOTS.keys())
def test_axes_are_labelled_and_drawn_where_told(plot):
    is_labelled_and_drawn_where_told(plot)


def line(ax, name):
    return next(line for line in ax.lines if line.get_label() == name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mask_is_dark_where_a_weight_stays(dtype):
    ax = plot_mask(WEIGHT.to(dtype).requires_grad_())
    (mesh,) = (c for c in ax.collections if isinstance(c, QuadMesh))
    np.testing.assert_array_equal(np.asarray(mesh.get_array()).reshape(2, 4), [[0, 1, 0, 1], [1, 0, 0, 1]])
    assert ax.get_title(loc="left") == "50% zeros"
    assert ax.yaxis_inverted() and not ax.xaxis_inverted()  # the first row is on top


def test_large_mask_is_one_picture():
    ax = plot_mask(torch.eye(200))
    (image,) = ax.images
    np.testing.assert_array_equal(image.get_array(), np.eye(200))
    assert image.get_extent() == [-0.5, 199.5, 199.5, -0.5]


def test_every_ffn_is_a_line_with_a_ring_round_what_was_kept():
    ax = plot_ffn_errors(errors())
    np.testing.assert_allclose(line(ax, "layer 0").get_ydata(), [0.1, 0.05, 0.1 / 3])
    np.testing.assert_allclose(line(ax, "layer 1").get_ydata(), [0.1, 0.2, 0.3])
    (rings,) = ax.collections
    np.testing.assert_allclose(rings.get_offsets(), [[2, 0.1 / 3], [0, 0.1]])
    assert ax.get_yscale() == "log"


def test_many_ffns_have_a_colour_bar_in_place_of_names():
    ax = plot_ffn_errors(errors(32))
    assert len(ax.lines) == 32
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["kept"]
    assert "layer" in {other.get_ylabel() for other in ax.figure.axes}


def test_experts_of_one_layer_are_lines_of_their_own():
    table = errors(1)
    names = [f"model.layers.0.experts.down_proj[{i}]" for i in range(3)]
    assert len(plot_ffn_errors(pd.concat([table.assign(matrix=name) for name in names])).lines) == 3


def test_a_method_has_one_colour_and_what_is_not_uniform_is_dashed():
    ax = plot_sparsity(costs())
    even, other = line(ax, "sparsegpt"), line(ax, "sparsegpt, global")
    assert even.get_color() == other.get_color() == METHOD_COLORS["sparsegpt"]
    assert (even.get_linestyle(), other.get_linestyle()) == ("-", "--") and even.get_marker() == other.get_marker()
    assert even.get_marker() != line(ax, "magnitude").get_marker()
    np.testing.assert_allclose(other.get_xydata(), [[0.5, 3], [0.9, 9]])
    np.testing.assert_allclose(line(ax, "dense").get_ydata(), 3)


def test_a_table_without_allocations_is_uniform():
    ax = plot_sparsity(costs().query("allocation == 'uniform'").drop(columns="allocation"))
    assert {line.get_label() for line in ax.lines} == {"dense", "magnitude", "sparsegpt"}


def test_seeds_become_their_median():
    seeds = pd.DataFrame({"method": "wanda", "sparsity": 0.5, "perplexity": [3.0, 9.0, 4.0]})
    np.testing.assert_allclose(line(plot_sparsity(seeds), "wanda").get_ydata(), [4])


@pytest.mark.parametrize("high", [5.0, 80.0])
def test_perplexities_can_be_read_off_the_axis(high):
    ax = plot_sparsity(costs(high))
    ax.figure.canvas.draw()
    low, top = ax.get_ylim()
    written = [t.get_text() for t, y in zip(ax.get_yticklabels(), ax.get_yticks(), strict=True) if low <= y <= top]
    assert len([text for text in written if text]) >= 3


def cells(ax):
    mesh = next(c for c in ax.collections if isinstance(c, QuadMesh))
    labels = [t.get_text() for t in ax.get_yticklabels()]
    return labels, np.ma.filled(mesh.get_array().reshape(len(labels), -1), np.nan)


def test_zeros_are_matrices_by_layers():
    ax = plot_zeros(zeros())
    labels, share = cells(ax)
    assert labels == ["q_proj", "gate_proj", "down_proj"]
    np.testing.assert_allclose(share, [[0, 0.1], [0.01, 0.11], [0.02, 0.12]])
    assert {t.get_text() for t in ax.texts} == {"0%", "10%", "1%", "11%", "2%", "12%"}
    assert ax.get_title(loc="left") == "Where the zeros are (6% of all)"


def test_a_share_short_of_all_is_not_called_all():
    table = zeros(1).assign(n_zeros=[997, 1000, 500], n_weights=1000)
    assert [t.get_text() for t in plot_zeros(table).texts] == [">99%", "100%", "50%"]


def test_matrices_that_a_layer_lacks_stay_blank():
    table = zeros().drop(index=0)
    assert np.isnan(cells(plot_zeros(table))[1][:, 0]).any()


def test_experts_are_taken_together():
    parts = [*(f"mlp.experts.{i}.up_proj" for i in range(4)), "mlp.shared.up_proj"]
    labels, share = cells(plot_zeros(zeros(1, parts)))
    assert labels == ["mlp.experts.up_proj", "mlp.shared.up_proj"]
    np.testing.assert_allclose(share, [[0.015], [0.04]])
    stacked = pd.DataFrame(
        {"layer": 0, "matrix": [f"layers.0.moe.up[{i}]" for i in range(2)], "n_zeros": [1, 3], "n_weights": 4}
    )
    labels, share = cells(plot_zeros(stacked))
    assert labels == ["up"] and share.tolist() == [[0.5]]


@pytest.mark.parametrize(
    ("plot", "message"),
    [
        (lambda: plot_mask(torch.ones(3)), r"not of \(3,\)"),
        (lambda: plot_mask(torch.ones(0, 3)), r"not of \(0, 3\)"),
        (lambda: plot_mask("weight"), "not of str"),
        (lambda: plot_ffn_errors(costs()), "give SparsityReport.ffn_errors"),
        (lambda: plot_ffn_errors(errors().iloc[:0]), "empty"),
        (lambda: plot_sparsity(errors()), "method, sparsity, perplexity"),
        (lambda: plot_sparsity("costs"), "a str is no table"),
        (lambda: plot_zeros(costs()), "give SparsityReport.table"),
    ],
)
def test_bad_input_is_refused(plot, message):
    with pytest.raises(PrunekitError, match=message):
        plot()
