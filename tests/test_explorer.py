"""The lab's widget: each control is moved, nothing is hidden in an output, and what a user types wrong is said."""

import io
from dataclasses import replace

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
from evaluation_helpers import TEXT, byte_tokenizer, choice_task, llama, partial_task
from ipywidgets import Dropdown, Text, ToggleButtons
from plot_helpers import closed_figures, is_labelled_and_drawn_where_told  # noqa: F401

import prunekit as pk
from prunekit import PrunekitError
from prunekit.knowledge import domain_needs, needs, side_by_side_answers
from prunekit.plot_lab import label_text, plot_answers, plot_attention, plot_exciting, plot_moved, plot_needs


@pytest.fixture(scope="module")
def made():
    model, tokenizer, tasks = llama(), byte_tokenizer(), [choice_task(6), partial_task(4)]
    groups = pk.discover(model).of_kind("kv_head", "ffn_channel")
    scores = pk.score(model, groups, pk.Magnitude())
    known = pk.knowledge_distribution(model, tokenizer, groups, scores, ratios=(1.0,), tasks=tasks)
    other = replace(known, loss=known.loss + np.random.default_rng(0).random(known.loss.shape))
    compared = pk.compare_knowledge({"dense": known, "cut": other}, n_resamples=50)
    return model, tokenizer, tasks, known, compared, groups


@pytest.fixture(scope="module")
def lab(made):
    model, tokenizer, tasks, known, compared, _ = made
    return pk.explore(model, tokenizer, tasks=tasks, known=known, compared=compared, text=TEXT, channels=2)


@pytest.fixture(scope="module")
def bare(made):
    """A lab without questions and text."""
    model, tokenizer, *_, groups = made
    return pk.explore(model, tokenizer, groups=groups)


def moves(control):
    """Values that a user may set: the ends of a range or a list, all options that stand side by side, another text."""
    if isinstance(control, Dropdown | ToggleButtons):
        several = [option[1] if isinstance(option, tuple) else option for option in control.options]
        return several if isinstance(control, ToggleButtons) else [several[-1], several[0]]
    if isinstance(control, Text):
        return ["0.1", control.value]
    return [min(control.max, 1), 0]


@pytest.mark.slow
def test_every_control_of_every_panel_draws_without_an_exception(lab, made):
    before = {name: value.clone() for name, value in made[0].state_dict().items()}
    assert [*lab.titles] == ["Question", "Domain", "Ablate", "Compare", "Attention", "Channel"]
    for title, panel in lab.panels.items():
        drawn = set()
        for control in panel.controls.values():
            for value in moves(control):
                control.value = value
                assert not panel.message.value and not panel.failures.outputs, (title, value, panel.message.value)
                drawn.add(panel.picture.value)
            assert getattr(control, "continuous_update", False) is False
        assert matplotlib.image.imread(io.BytesIO(panel.picture.value)).shape == (450, 800, 4)
        assert len(drawn) > 1, title
    assert all(torch.equal(value, before[name]) for name, value in made[0].state_dict().items())
    assert not any(module._forward_pre_hooks for module in made[0].modules())


@pytest.mark.parametrize(
    ("title", "name", "value", "says"),
    [
        ("Question", "answer", "", "give the text that should follow the question"),
        ("Question", "question", "", "write some text"),
        ("Ablate", "kv_head", "<b>9", "&lt;b&gt;9&#x27; names no units; write layer.unit"),
        ("Ablate", "kv_head", "0.7", "has no unit 7; its units are 0 to 1"),
        ("Ablate", "ffn_channel", "7.0", "no such layer; there are 0, 1"),
        ("Attention", "text", "x" * 200, "at most 96 are shown; shorten it"),
        ("Channel", "unit", 999, "has no unit 999"),
    ],
)
def test_what_a_user_types_wrong_is_said_in_the_panel_and_the_picture_stays(lab, title, name, value, says):
    panel = lab.panels[title]
    control, picture = panel.controls[name], panel.picture.value
    good, control.value = control.value, value
    assert says in panel.message.value and "<b>9" not in panel.message.value and panel.picture.value == picture
    control.value = good
    assert not panel.message.value


def test_texts_of_users_are_escaped(lab):
    panel = lab.panels["Ablate"]
    good = panel.controls["prompt"].value
    panel.controls["prompt"].value = "<script>alert(1)</script> $x$"
    assert "<script>" not in panel.words.value and "&lt;script&gt;" in panel.words.value and not panel.message.value
    panel.controls["prompt"].value = good


def test_a_panel_says_what_the_function_says(lab, made):
    model, tokenizer, tasks, *_ = made
    panel, domain = lab.panels["Question"], tasks[0].questions[1].domain
    panel.controls["domain"].value = domain
    panel.controls["number"].value = 1
    asked = [q for task in tasks for q in task.questions if q.domain == domain][1]
    assert panel.controls["question"].value == asked.context
    groups = pk.discover(model).of_kind("kv_head", "ffn_channel")
    table = needs(model, tokenizer, asked, groups=groups, channels=2)
    assert f"{table['dense'].iloc[0]:.2f} nats" in panel.words.value
    assert f"<td>{table['fall'].iloc[0]:.2f}</td>" in panel.words.value


def test_another_exception_is_not_hidden(bare, monkeypatch):
    monkeypatch.setattr("prunekit.explorer_panels.needs", lambda *_args, **_options: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # in a kernel, the panel's Output shows it
        bare.panels["Question"].controls["answer"].value = " x"


def test_a_model_without_questions_and_text_has_the_panels_that_need_neither(made, bare):
    model, tokenizer, *_, groups = made
    assert [*bare.panels] == ["Question", "Ablate", "Attention"]
    panel = bare.panels["Ablate"]
    panel.controls["mode"].value = "mean"
    assert "mode=&#x27;mean&#x27; needs tokens" in panel.message.value
    short = pk.explore(model, tokenizer, groups=groups, text="the cat").panels["Ablate"]
    short.controls["mode"].value = "mean"
    assert not short.message.value
    with pytest.raises(PrunekitError, match="the lab takes kv_head, query_head, ffn_channel"):
        pk.explore(model, tokenizer, groups=pk.discover(model).of_kind("layer"))
    with pytest.raises(PrunekitError, match="compare_knowledge"):
        pk.explore(model, tokenizer, groups=groups, compared=pd.DataFrame({"a": [1]}))


# --- plots ------------------------------------------------------------------------------------------------------------


def table_of_needs(**columns):
    rows = [
        ("kv_head", 2, 1, 7.0),
        ("ffn_channel", 0, None, 20.0),
        ("ffn_channel", 0, 127, 4.0),
        ("kv_head", 3, 0, -1.0),
    ]
    table = pd.DataFrame(rows, columns=["kind", "layer", "unit", "fall"]).assign(measure="answer", **columns)
    return table.astype({"layer": "Int64", "unit": "Int64"})


def test_needs_are_bars_by_size_with_units_by_name():
    ax = plot_needs(table_of_needs(), most=3)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0 all", "2.1", "0.127"] and ax.yaxis_inverted()
    assert "nats" in ax.get_xlabel()
    assert sorted(patch.get_width() for patch in ax.patches) == [4, 7, 20]
    hatches = {patch.get_hatch() for patch in ax.patches}
    assert len(hatches) == 2  # kinds differ without colour
    is_labelled_and_drawn_where_told(lambda **options: plot_needs(table_of_needs(), **options))
    with_intervals = plot_needs(table_of_needs(low=-2.0, high=30.0).assign(measure="domain"))
    assert "interval" in with_intervals.get_xlabel()
    infinite = table_of_needs()
    infinite.loc[0, "fall"] = float("inf")
    plot_needs(infinite).figure.canvas.draw()


def test_the_other_plots_of_the_lab(made):
    model, tokenizer, _, _, compared, groups = made
    ask = pk.ask(model, tokenizer, "who ran $5?", [" a$b$", " c"])
    answers = side_by_side_answers({"dense": ask, "cut": ask})
    pattern = pk.attention_pattern(model, tokenizer, "a $x$ \\frac", 0, 0)
    found = pk.exciting_tokens(model, tokenizer, groups[:1], TEXT).table(groups[0].name, 0)
    one = compared[compared["domain"] == "script"]
    for plot in (
        lambda **options: plot_answers(answers, **options),
        lambda **options: plot_attention(pattern, **options),
        lambda **options: plot_exciting(found, **options),
        lambda **options: plot_moved(one, **options),
        lambda **options: plot_moved(one, moved=True, **options),
    ):
        is_labelled_and_drawn_where_told(plot)
    mesh = plot_attention(pattern).collections[0]
    assert (
        mesh.norm.vmin == 0
        and mesh.norm.vmax == 1
        and mesh.get_array().mask.sum() == len(pattern) * (len(pattern) - 1) / 2
    )
    with pytest.raises(PrunekitError, match="several domains"):
        plot_moved(compared)
    with pytest.raises(PrunekitError, match="not square"):
        plot_attention(pattern.iloc[:2])
    assert label_text("a $x$\nb") == r"a \$x\$ b" and label_text("a long text that goes on", end=True).endswith(
        "goes on"
    )


def test_a_difference_keeps_the_colour_and_marker_of_its_model(made):
    one = made[4][made[4]["domain"] == "script"]
    both, moved = (plot_moved(one, moved=moved) for moved in (False, True))
    lines = [line for line in both.lines if line.get_marker() == "s"]
    alone = [line for line in moved.lines if line.get_marker() == "s"]
    assert lines and alone and lines[0].get_color() == alone[0].get_color()


def test_groups_ablated_in_part_are_not_taken_for_whole_ones(made):
    model, tokenizer, tasks, *_, groups = made
    scores = pk.score(model, groups, pk.Magnitude())
    ratios = {"half": (0.5,), "both": (0.5, 1.0)}
    known = {
        name: pk.knowledge_distribution(model, tokenizer, groups, scores, ratios=several, tasks=tasks)
        for name, several in ratios.items()
    }
    assert all(len(table) == len(groups) for table in domain_needs(known["both"]).values())
    with pytest.raises(PrunekitError, match="as a whole"):
        domain_needs(known["half"])
    with pytest.raises(PrunekitError, match="known"):
        domain_needs(pd.DataFrame())
    compared = pk.compare_knowledge({"dense": known["both"]}, n_resamples=10)
    with pytest.raises(PrunekitError, match="several ratios"):
        plot_moved(compared[compared["domain"] == compared["domain"].iloc[0]])


def test_questions_with_contexts_have_no_choices_and_a_failure_goes_when_the_next_move_works(made):
    model, tokenizer, *_ = made
    lab = pk.explore(model, tokenizer, tasks=[partial_task(4)])
    assert lab.panels["Ablate"].controls["choices"].value == ""
    with pytest.raises(PrunekitError, match="tasks="):
        pk.explore(model, tokenizer, data_dir="somewhere")
    panel = lab.panels["Question"]
    panel.failures.outputs = ({"output_type": "stream", "name": "stderr", "text": "an earlier one"},)
    panel.update()
    assert panel.failures.outputs == () and panel.picture.value
