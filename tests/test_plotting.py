import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from other_families import EVERYONE
from plot_helpers import closed_figures  # noqa: F401

from prunekit.discovery import discover
from prunekit.discovery.groups import CoupledGroup, Groups, Member
from prunekit.errors import PrunekitError
from prunekit.plot_style import KIND_COLORS
from prunekit.plotting import (
    METHOD_COLORS,
    layer_table,
    plot_accuracy,
    plot_agreement,
    plot_coupled_group,
    plot_fusion,
    plot_groups,
    plot_loss,
    plot_plan,
    plot_scores,
    plot_tradeoff,
    side_by_side,
)


def scores(seed=0):
    rng = np.random.default_rng(seed)
    rows = [
        (f"layers.{layer}:{kind}", kind, layer, unit, float(rng.lognormal()))
        for layer in range(3)
        for kind, n in (("kv_head", 4), ("ffn_channel", 20 - layer))
        for unit in range(n)
    ]
    return pd.DataFrame(rows, columns=["group", "kind", "layer", "unit", "score"])


def plan_table():
    rows = [(f"{k}{i}", k, i, 8, 8 - i, 1 - i / 8) for i in range(3) for k in ("kv_head", "ffn_channel")]
    return pd.DataFrame(rows, columns=["group", "kind", "layer", "n_units", "kept", "kept_fraction"])


def accuracies():
    rows = [
        (model, task, 100, value, 0.05, 0.5 if task == "piqa" else 0.25)
        for model, value in (("dense", 0.9), ("cut", 0.5), ("recovered", 0.8))
        for task in ("piqa", "arc_easy")
    ]
    return pd.DataFrame(rows, columns=["model", "task", "n", "accuracy", "stderr", "chance"])


def losses(n=20):
    return pd.DataFrame({"step": range(1, n + 1), "loss": np.linspace(5, 2, n)})


def budgets():
    """Two methods at two ratios over three seeds, and the dense model."""
    rows = [
        (method, ratio, start + 10 * ratio * seed)
        for method, start in (("element", 4.0), ("L2", 8.0))
        for ratio in (0.2, 0.5)
        for seed in range(3)
    ]
    return pd.DataFrame([("dense", 0.0, 3.0), *rows], columns=["method", "ratio", "perplexity"])


def fusions():
    rows = [
        (kind, layer, 0.2 + 0.1 * layer, 0.4) for kind in ("kv_head", "ffn_channel") for layer in (0, 1) for _ in "ab"
    ]
    return pd.DataFrame(rows, columns=["kind", "layer", "coarse", "fine"])


def two_groups():
    """A fused matrix with heads in rows 0-1 and 4-5, its vector, a reader, a stack of experts, and another layer."""
    rows = torch.tensor([[0, 1, 4, 5], [2, 3, 6, 7]])
    head = CoupledGroup(
        "layers.0.attn:kv_head",
        "kv_head",
        2,
        (
            Member("layers.0.attn.qkv.weight", 0, rows),
            Member("layers.0.attn.qkv.bias", 0, rows),
            Member("layers.0.attn.out.weight", 1, torch.tensor([[0, 1], [2, 3]])),
        ),
        exact=True,
    )
    expert = CoupledGroup(
        "layers.0.moe:ffn_channel",
        "ffn_channel",
        3,
        (Member("layers.0.moe.up", 1, torch.arange(3)[:, None]),),
        exact=True,
    )
    shapes = {
        "layers.0.attn.qkv.weight": (8, 6),
        "layers.0.attn.qkv.bias": (8,),
        "layers.0.attn.out.weight": (6, 4),
        "layers.0.moe.up": (2, 3, 6),
    }
    return Groups((head, expert), shapes)


def patches_of(ax, color):
    return [
        patch for patch in ax.patches if isinstance(patch, Rectangle) and to_hex(patch.get_facecolor()) == color.lower()
    ]


PLOTS = {
    "scores": lambda ax=None: plot_scores(scores(), ax=ax),
    "plan": lambda ax=None: plot_plan(plan_table(), ax=ax),
    "loss": lambda ax=None: plot_loss(losses(), ax=ax),
    "accuracy": lambda ax=None: plot_accuracy(accuracies(), ax=ax),
    "tradeoff": lambda ax=None: plot_tradeoff(budgets(), ax=ax),
    "fusion": lambda ax=None: plot_fusion(fusions(), ax=ax),
    "agreement": lambda ax=None: plot_agreement(side_by_side({"taylor": scores(), "magnitude": scores(1)}), ax=ax),
}


@pytest.mark.parametrize("plot", PLOTS.values(), ids=PLOTS.keys())
def test_axes_are_labelled_and_drawn_where_told(plot):
    ax = plot()
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    own = plt.subplots()[1]
    assert plot(ax=own) is own
    own.figure.canvas.draw()


def test_scores_are_sorted_inside_each_layer():
    ax = plot_scores(scores())
    grid = ax.collections[0].get_array().reshape(3, 20)
    assert grid.mask.sum() == 0 + 1 + 2
    for layer in range(3):
        table = scores()
        mine = table[(table["kind"] == "ffn_channel") & (table["layer"] == layer)]["score"]
        assert list(grid[layer].compressed()) == sorted(mine, reverse=True)
    assert "ffn_channel" in ax.get_title()
    assert plot_scores(scores(), kind="kv_head").collections[0].get_array().size == 12
    assert plot_scores(scores().assign(score=0.0)).collections[0].get_array().max() == 0


def test_a_plan_shows_each_kinds_share():
    ax = plot_plan(plan_table())
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in ax.containers}
    assert heights == {"kv_head": [1, 0.875, 0.75], "ffn_channel": [1, 0.875, 0.75]}


def test_a_long_loss_curve_gets_a_running_mean():
    assert len(plot_loss(losses(20)).lines) == 1
    raw, mean = plot_loss(losses(100)).lines
    assert np.ptp(mean.get_ydata()) < np.ptp(raw.get_ydata())
    both = pd.concat([losses().assign(method="lora"), losses().assign(method="taylor")])
    assert [line.get_color() for line in plot_loss(both).lines] == [METHOD_COLORS["lora"], METHOD_COLORS["taylor"]]


def test_accuracies_have_their_models_colour_error_and_chance():
    ax = plot_accuracy(accuracies())
    bars = {container.get_label(): container for container in ax.containers if container.get_label() in METHOD_COLORS}
    assert list(bars) == ["dense", "cut", "recovered"]
    for name, container in bars.items():
        assert to_hex(container[0].get_facecolor()) == METHOD_COLORS[name].lower()
        assert container.errorbar is not None
    chance = next(lines for lines in ax.collections if lines.get_label() == "chance")
    assert [segment[0][1] for segment in chance.get_segments()] == [0.5, 0.25]
    assert [text.get_text() for text in ax.get_legend().get_texts()][-1] == "chance"
    assert len({container[0].get_hatch() for container in bars.values()}) == 3


def test_a_tradeoff_has_medians_in_a_methods_colour_their_range_and_the_dense_model():
    ax = plot_tradeoff(budgets())
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines["element"].get_xdata()) == [0.2, 0.5] and list(lines["element"].get_ydata()) == [6.0, 9.0]
    assert lines["element"].get_color() == METHOD_COLORS["element"] and set(lines["dense"].get_ydata()) == {3.0}
    bands = [band.get_paths()[0].get_extents() for band in ax.collections]
    assert (bands[0].ymin, bands[0].ymax) == (4.0, 14.0) and ax.get_yscale() == "log"
    assert plot_tradeoff(budgets().rename(columns={"perplexity": "accuracy"}), y="accuracy").get_yscale() == "linear"
    ticks = [label.get_text() for label in ax.get_xticklabels()]
    assert ticks == [f"{ratio:.0%}" for ratio in sorted(set(budgets().query("method != 'dense'")["ratio"]))]


def test_fusion_shows_the_share_of_the_coarse_estimate():
    ax = plot_fusion(fusions())
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines["kv_head"].get_ydata()) == pytest.approx([0.2 / 0.6, 0.3 / 0.7])
    both = pd.concat([fusions().assign(rule=rule) for rule in ("attention", "uncertainty")])
    assert "uncertainty, kv_head" in {line.get_label() for line in plot_fusion(both).lines}


def test_methods_without_a_colour_get_different_ones():
    ax = plot_accuracy(accuracies().replace({"model": {"cut": "mine", "recovered": "yours"}}))
    assert len({to_hex(container[0].get_facecolor()) for container in ax.containers if len(container) == 2}) == 3
    many = pd.concat([accuracies().assign(model=f"model {i}") for i in range(40)])
    with pytest.raises(PrunekitError, match="40 series"):
        plot_accuracy(many)


def test_agreement_is_of_ranks_inside_groups():
    same = side_by_side({"taylor": scores(), "magnitude": scores().assign(score=lambda table: table["score"] ** 3)})
    assert "1.00" in plot_agreement(same).get_title()
    turned = same.assign(magnitude=-same["magnitude"])
    assert "-" in plot_agreement(turned, x="taylor", y="magnitude").get_title()


def test_a_unit_has_one_colour_in_every_matrix_it_owns_a_part_of():
    ax = plot_coupled_group(two_groups(), 0, kinds=("kv_head",), units=(1,))
    owned = {(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in patches_of(ax, "#E69F00")}
    weight_rows = {(0, 2, 6, 2), (0, 6, 6, 2)}
    assert weight_rows < owned
    assert len(owned) == 5, "two runs of rows in the matrix, two in its vector, one of columns in the reader"
    texts = " ".join(text.get_text() for text in ax.texts)
    assert all(word in texts for word in ("qkv", "bias", "out", "8 × 6", "6 × 4", "2 units", "coloured: 1"))


def test_every_group_of_the_layer_is_drawn_to_scale():
    ax = plot_coupled_group(two_groups(), 0)
    paper = {(p.get_width(), p.get_height()) for p in patches_of(ax, "#ECECEC")}
    assert {(6, 8), (4, 6), (6, 3)} < paper
    assert ax.get_aspect() == 1
    assert len(patches_of(ax, "#0072B2")) > 0


def groups_of(family):
    return discover(EVERYONE[family].model("eager", torch.float32))


def bands_of(ax, kind):
    """(x, y, width, height) of what is coloured for a kind, but for the stripe at the left."""
    found = [(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in patches_of(ax, KIND_COLORS[kind])]
    return sorted(band for band in found if band[0] > 0)


def test_fused_heads_lie_where_they_are_stored():
    """GPT-2 has the parts of a head in three places of one matrix, across; BLOOM in one, down."""
    *fused, _ = bands_of(plot_groups(groups_of("gpt2"), kinds=("kv_head",)), "kv_head")
    assert len(fused) == 3 and len({(y, height) for _, y, _, height in fused}) == 1
    starts = [x for x, *_ in fused]
    assert starts[2] - starts[1] == pytest.approx(starts[1] - starts[0]) and fused[0][3] > 4 * fused[0][2]
    interleaved, out = bands_of(plot_groups(groups_of("bloom"), kinds=("kv_head",)), "kv_head")
    assert interleaved[2] > 4 * interleaved[3] and out[3] > 4 * out[2]


def test_an_expert_is_a_sheet_of_each_stack():
    box = 0.38
    gate, up, down = bands_of(plot_groups(groups_of("mixtral"), kinds=("expert",)), "expert")
    assert gate[3] == pytest.approx(box / 4) and up[2:] == down[2:] == pytest.approx((box, box))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama_gqa", "gpt2", "bloom", "mixtral", "llama_peft", "deepseek_v3", "mamba"])
def test_every_kind_of_the_layer_is_told_in_picture_and_table(family):
    groups = groups_of(family)
    ax, table = plot_groups(groups), layer_table(groups)
    ax.figure.canvas.draw()
    texts = {text.get_text().splitlines()[0] for text in ax.texts}
    kinds = {group.kind for group in groups if group.layer in (0, None)}
    assert kinds <= texts and kinds == {name.partition("#")[0] for name in table.index}
    assert all(f"{units:,} unit" in "".join(t.get_text() for t in ax.texts) for units in table["units"])
    assert ax.get_title(loc="left") == "Layer 0: what goes together"


def test_letters_stay_inside_and_apart():
    ax = plot_groups(groups_of("llama_peft"))
    ax.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert all(box.x1 <= ax.figure.bbox.x1 for box in boxes)
    tops = [title.get_window_extent().y1 for title in (ax._left_title, ax._right_title)]
    assert max(tops) < ax.figure.bbox.y1 - 5, "the title keeps off the edge"
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert min(text.get_fontsize() for text in ax.texts) >= 11
    assert any(text.get_text() == "and 6 more" for text in ax.texts), "14 matrices of rank do not fit in two lines"


def test_a_layer_as_a_table():
    told = layer_table(groups_of("llama_gqa"))["one unit takes"]
    assert told["layer"] == "9 tensors of layer 0", "parameters are numbers, and these are none"
    assert told["kv_head"] == "16 rows of q_proj, 8 rows of k_proj, v_proj, 16 columns of o_proj"
    assert told["ffn_channel"] == "1 row of gate_proj, up_proj, 1 column of down_proj"
    assert told["block"] == "4 tensors of self_attn; 3 tensors of mlp"
    assert told["vocabulary"] == "1 row of embed_tokens, lm_head"
    assert layer_table(groups_of("gpt2"), layer=1, kinds=("ffn_channel",))["one unit takes"].tolist() == [
        "1 column of c_fc + bias, 1 row of mlp.c_proj"
    ]


def test_two_groups_of_a_kind_go_by_their_own_names():
    groups = groups_of("gpt_neox")  # rotary dimensions, and the rest
    names = {name.rpartition(":")[2] for name in (g.name for g in groups.of_kind("head_dim"))}
    assert len(names) == 2 and names <= set(layer_table(groups).index)
    assert names <= {text.get_text() for text in plot_groups(groups).texts}


def test_groups_are_drawn_where_told():
    own = plt.subplots(figsize=(8, 5))[1]
    assert plot_groups(two_groups(), ax=own) is own
    assert plot_groups(two_groups(), layer=0).figure is not own.figure


REFUSED = {
    "scores columns": (lambda: plot_scores(plan_table()), "score; give Scores.table"),
    "scores kind": (lambda: plot_scores(scores(), kind="colour"), "ffn_channel, kv_head"),
    "empty plan": (lambda: plot_plan(plan_table().iloc[:0]), "empty"),
    "loss columns": (lambda: plot_loss(scores()), "step, loss"),
    "compare table": (lambda: plot_accuracy(pd.DataFrame({"perplexity": [1.0]})), "compare_accuracy"),
    "agreement": (lambda: plot_agreement(side_by_side({"a": scores()}), y="b"), "no b"),
    "tradeoff": (lambda: plot_tradeoff(budgets(), y="accuracy"), "has no accuracy"),
    "fusion": (lambda: plot_fusion(budgets()), "kind, layer, coarse, fine"),
    "other units": (lambda: side_by_side({"a": scores(), "b": scores().iloc[1:]}), "not about the same units"),
    "no scores": (lambda: side_by_side({}), "nothing"),
    "layer without groups": (lambda: plot_groups(two_groups(), layer=7), "layer 7 has no groups; layers .0. have"),
    "kind of group": (lambda: layer_table(two_groups(), kinds=("rank",)), "kind rank; it has kv_head, ffn_channel"),
    "no groups": (lambda: plot_groups(Groups((), {})), "no groups in numbered layers"),
    "layer": (lambda: plot_coupled_group(two_groups(), 7), "layer 7 has no group.*give one of the layers .0."),
    "unit": (lambda: plot_coupled_group(two_groups(), 0, units=(2,)), "numbers from 0 to 1"),
    "too many units": (lambda: plot_coupled_group(two_groups(), 0, units=(0,) * 5), "1 to 4 numbers"),
}


@pytest.mark.parametrize(("plot", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_tables_are_refused(plot, message):
    with pytest.raises(PrunekitError, match=message):
        plot()
