"""The panels of the knowledge lab: controls wired to pure functions and plots, with nothing else in them."""

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from html import escape
from typing import Any

import ipywidgets as widgets
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from prunekit.discovery.groups import CoupledGroup
from prunekit.errors import PrunekitError
from prunekit.knowledge.ablation_sets import ablate, units_named
from prunekit.knowledge.asking import ask, attention_pattern, side_by_side_answers
from prunekit.knowledge.exciting import ExcitingTokens
from prunekit.knowledge.question_needs import needs
from prunekit.plot_lab import label_text, plot_answers, plot_attention, plot_exciting, plot_moved, plot_needs
from prunekit.questions import Question

FIGURE, DOTS = (10, 5.625), 80  # inches and dots an inch: 800 × 450 on the screen
SHOWN = 6  # rows of a table beside a picture
WIDE = widgets.Layout(width="32em")
Drawn = tuple[str, Callable[[Axes], Any]]  # words, and what draws the picture
Redraw = Callable[[dict[str, Any]], Drawn]  # values of the controls by name →


class Panel:
    """Controls, a picture, and words beside it; what a user typed wrong is said in words.

    Attributes:
        box: the widget.
        controls: name → control.
        message: what was refused, as HTML; empty where all went well.
        picture: the picture, as PNG.
        words: what stands beside the picture, as HTML.
        failures: an Output that shows any other exception, with its traceback.
    """

    def __init__(self, controls: Mapping[str, Any], redraw: Redraw, *, note: str = "") -> None:
        self.controls, self._redraw, self._waits = dict(controls), redraw, False
        self.message, self.words = widgets.HTML(), widgets.HTML()
        self.picture = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))
        self.failures = widgets.Output()
        rows = widgets.Box([*controls.values()], layout=widgets.Layout(flex_flow="row wrap"))
        beside = widgets.Box([self.picture, self.words], layout=widgets.Layout(flex_flow="row wrap"))
        self.box = widgets.VBox([widgets.HTML(note), rows, self.message, beside, self.failures])
        for control in controls.values():
            control.observe(self.update, names="value")
        self.update()

    def update(self, _change: Any = None) -> None:
        """Draw anew from what the controls say."""
        if self._waits:
            return
        self.failures.outputs = ()
        with self.failures:
            try:
                words, plot = self._redraw({name: control.value for name, control in self.controls.items()})
                self.picture.value = png(plot)
            except PrunekitError as error:
                self.message.value = f"<p role='alert'><b>{escape(str(error))}</b></p>"
                return
            except Exception:  # shown below, and no earlier answer beside it
                self.message.value, self.words.value, self.picture.value = "", "", b""
                raise
            self.message.value, self.words.value = "", words

    def fill(self, **values: Any) -> None:
        """Set several controls, and draw once."""
        self._waits = True
        try:
            for name, value in values.items():
                self.controls[name].value = value
        finally:
            self._waits = False
        self.update()


def png(plot: Callable[[Axes], Any]) -> bytes:
    """A picture of what a plot function draws on new axes, in a figure that pyplot does not know."""
    written = io.BytesIO()
    with sns.axes_style("whitegrid"), sns.plotting_context("notebook", font_scale=1.2):
        figure = Figure(figsize=FIGURE, dpi=DOTS, layout="constrained")
        plot(figure.subplots())
        figure.savefig(written, format="png")
    return written.getvalue()


def html_table(table: pd.DataFrame) -> str:
    """The first rows of a table as HTML, in the colours of the page; texts are escaped."""
    shown = table.head(SHOWN).copy()
    for name in shown:
        if pd.api.types.is_float_dtype(shown[name]):
            shown[name] = [f"{value:.2f}".replace("-0.00", "0.00") for value in shown[name]]
        shown[name] = shown[name].astype(object).where(shown[name].notna(), "all" if name == "unit" else "–")
    return str(shown.to_html(index=False, escape=True, border=0))


def _text(name: str, value: str, hint: str = "") -> widgets.Text:
    return widgets.Text(
        value,
        description=name,
        placeholder=hint,
        continuous_update=False,
        layout=WIDE,
        style={"description_width": "8em"},
    )


def _choice(name: str, options: Sequence[Any]) -> widgets.Dropdown:
    return widgets.Dropdown(options=options, description=name, style={"description_width": "8em"})


def question_panel(
    model: Any, tokenizer: Any, groups: Sequence[CoupledGroup], asked: Mapping[str, Sequence[Question]], channels: int
) -> Panel:
    """A question, typed or picked from a domain → the units that its answer needs."""

    def redraw(value: dict[str, Any]) -> Drawn:
        table = needs(model, tokenizer, value["question"], value["answer"], groups=groups, channels=channels)
        shown = table[["kind", "layer", "unit", "fall"]]
        said = f"<p>log-probability of the answer, nothing ablated: {table['dense'].iloc[0]:.2f} nats</p>"
        return said + html_table(shown), lambda ax: plot_needs(table, most=12, ax=ax)

    first = _written(next(iter(asked.values()))[0]) if asked else {"question": "1 plus 1 is", "answer": " 2"}
    controls = {name: _text(name, value) for name, value in first.items()}
    panel = Panel(controls, redraw, note="<p>Type a question and its answer (Enter), or pick a domain.</p>")
    if asked:
        domain = _choice("domain", list(asked))
        number = widgets.BoundedIntText(
            0, 0, len(asked[domain.value]) - 1, description="number", continuous_update=False
        )

        def pick(_change: Any) -> None:
            several = asked[domain.value]
            number.max = len(several) - 1
            panel.fill(**_written(several[number.value]))

        for control in (domain, number):
            control.observe(pick, names="value")
        panel.controls |= {"domain": domain, "number": number}
        panel.box.children = (panel.box.children[0], widgets.HBox([domain, number]), *panel.box.children[1:])
    return panel


def _written(question: Question) -> dict[str, str]:
    context = question.contexts[question.answer] if question.contexts else question.context
    return {"question": context, "answer": question.choices[question.answer]}


def ablation_panel(
    model: Any, tokenizer: Any, groups: Sequence[CoupledGroup], first: Question, calib: Tensor | None
) -> Panel:
    """Any set of units, ablated in one of three ways → the answer of the dense and of the ablated model."""
    kinds = {kind: [group for group in groups if group.kind == kind] for kind in dict.fromkeys(g.kind for g in groups)}

    def redraw(value: dict[str, Any]) -> Drawn:
        choices = [choice for choice in value["choices"].split("|") if choice.strip()] or None
        units: dict[str, list[int]] = {}
        for kind, several in kinds.items():
            units |= units_named(value[kind], several)
        answers = {"dense": ask(model, tokenizer, value["prompt"], choices)}
        with ExitStack() as stack:
            if units:
                tokens = calib if value["mode"] == "mean" else None
                if value["mode"] == "patch":
                    tokens = tokenizer(value["other prompt"], return_tensors="pt")["input_ids"]
                stack.enter_context(ablate(model, groups, units, mode=value["mode"], tokens=tokens))
            answers["cut"] = ask(model, tokenizer, value["prompt"], choices)
        table = side_by_side_answers(answers)
        said = "".join(
            f"<p>{name}: {escape(value['prompt'])} <b>{escape(one.continuation)}</b></p>"
            for name, one in answers.items()
        )
        return said, lambda ax: plot_answers(table, ax=ax)

    written, head = _written(first), next(iter(kinds))
    choices = "" if first.contexts else "|".join(first.choices)  # with contexts, all choices are one text
    controls = {
        "prompt": _text("prompt", written["question"]),
        "choices": _text("choices", choices, "with spaces:  yes.| no.  (empty: next tokens)"),
        **{kind: _text(kind, "0.0" if kind == head else "", "layer.unit: 2.1, 6.0-3, 7.all") for kind in kinds},
        "mode": widgets.ToggleButtons(options=["zero", "mean", "patch"], description="ablate by"),
        "other prompt": _text("other prompt", written["question"], "for patch: as many tokens as the prompt"),
    }
    return Panel(controls, redraw, note="<p>Name units, ablate them, and ask again.</p>")


def domain_panel(tables: Mapping[Any, pd.DataFrame]) -> Panel:
    """A domain → the units that it needs, from tables that were measured before (`domain_needs`)."""

    def redraw(value: dict[str, Any]) -> Drawn:
        table, title = tables[value["domain"]], f"What {label_text(value['domain'])} needs"
        shown = html_table(table[["kind", "layer", "unit", "fall", "low", "high"]])
        return shown, lambda ax: plot_needs(table, most=12, title=title, ax=ax)

    return Panel({"domain": _choice("domain", list(tables))}, redraw)


def comparison_panel(compared: pd.DataFrame, by: str) -> Panel:
    """A domain → what it loses with each group in each model, with intervals (`compare_knowledge`)."""

    def redraw(value: dict[str, Any]) -> Drawn:
        rows = compared[compared[by] == value["domain"]]
        apart = rows[(rows["moved_low"] > 0) | (rows["moved_high"] < 0)]
        strongest = apart.loc[apart["moved"].abs().sort_values(ascending=False).index]
        said = f"<p>{len(apart)} intervals of the difference exclude 0:</p>" if len(apart) else "<p>No difference.</p>"
        shown = html_table(strongest[["model", "kind", "layer", "moved", "moved_low", "moved_high"]])
        return said + (shown if len(apart) else ""), lambda ax: plot_moved(rows, moved=value["draw"], ax=ax)

    draw = widgets.ToggleButtons(options=[("change", False), ("difference from the first", True)], description="draw")
    return Panel({"domain": _choice("domain", list(compared[by].unique())), "draw": draw}, redraw)


def attention_panel(model: Any, tokenizer: Any, n_layers: int, n_heads: int, text: str) -> Panel:
    """A layer and a head → its attention pattern on a text."""

    def redraw(value: dict[str, Any]) -> Drawn:
        pattern = attention_pattern(model, tokenizer, value["text"], value["layer"], value["head"])
        title = f"layer {value['layer']}, query head {value['head']}"
        return "", lambda ax: plot_attention(pattern, title=title, ax=ax)

    controls = {
        "text": _text("text", text),
        "layer": widgets.IntSlider(0, 0, n_layers - 1, description="layer", continuous_update=False),
        "head": widgets.IntSlider(0, 0, n_heads - 1, description="query head", continuous_update=False),
    }
    return Panel(controls, redraw)


def channel_panel(found: ExcitingTokens, groups: Sequence[CoupledGroup]) -> Panel:
    """A group and a unit → the tokens that excite it, from one pass that was made before."""

    def redraw(value: dict[str, Any]) -> Drawn:
        table = found.table(value["group"], value["unit"])
        title = f"{names[value['group']]}, unit {value['unit']}"
        return html_table(table[["token", "after", "activation"]]), lambda ax: plot_exciting(table, title=title, ax=ax)

    unit = widgets.BoundedIntText(0, 0, 10**9, description="unit", continuous_update=False)
    names = {group.name: f"layer {group.layer}, {group.kind}" for group in groups}
    return Panel({"group": _choice("group", [(label, name) for name, label in names.items()]), "unit": unit}, redraw)
