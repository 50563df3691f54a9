"""The knowledge lab as one widget: questions, ablations, domains, models side by side, attention, channels."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import pandas as pd
import torch
from torch import Tensor

from prunekit import world
from prunekit.checks import FilePath, Model, Tokenizer, Whole, checked
from prunekit.discovery import discover
from prunekit.discovery.groups import CoupledGroup
from prunekit.discovery.parts import outermost_elements
from prunekit.documents import TextSource
from prunekit.errors import PrunekitError
from prunekit.evaluation.standard_tasks import Tasks, named_tasks
from prunekit.explorer_panels import (
    Panel,
    ablation_panel,
    attention_panel,
    channel_panel,
    comparison_panel,
    domain_panel,
    question_panel,
)
from prunekit.knowledge.ablation_sets import CONSUMED
from prunekit.knowledge.comparison import domain_needs
from prunekit.knowledge.exciting import ExcitingTokens, exciting_tokens
from prunekit.knowledge.measurement import check_groups
from prunekit.knowledge.result import KnowledgeDistribution
from prunekit.plot_style import domain_column, require_columns
from prunekit.questions import Question

KINDS = ("kv_head", "ffn_channel")
COMPARED = "compare_knowledge(...)"  # where a table of `compared` comes from
LINES = 40  # of the world's held-out text
WINDOWS = 8  # of a text, of which the mean ablation takes the mean


class Explorer(widgets.Tab):
    """The knowledge lab, one tab per panel.

    Attributes:
        panels: title of the tab → its panel.
    """

    def __init__(self, panels: Mapping[str, Panel]) -> None:
        super().__init__([panel.box for panel in panels.values()], titles=[*panels])
        self.panels = dict(panels)


@checked
def explore(
    model: Model,
    tokenizer: Tokenizer,
    *,
    groups: Iterable[CoupledGroup] | None = None,
    tasks: Tasks | None = None,
    data_dir: FilePath | None = None,
    known: KnowledgeDistribution | None = None,
    compared: pd.DataFrame | None = None,
    text: Tensor | TextSource | None = None,
    channels: Whole = 8,
) -> Explorer:
    """The knowledge lab, a widget: which units a question needs, what a cut of any set of units changes, and why.

    Everything that needs many questions is measured before and given (`known`, `compared`), or is one pass of the text
    when the lab is made; while a control moves, one question is asked. That takes .1 to .2 seconds of a CPU core on the
    embedded world, and about six for a short question to all layers of SmolLM2: there, give some of the groups.

    Args:
        model: a causal language model of transformers; unchanged by all that the lab does.
        tokenizer: the model's own tokenizer.
        groups: heads and FFN channels discovered in the model; None takes its KV heads and FFN channels.
        tasks: tasks or names of published ones, as for `zero_shot`: their questions can be picked by domain. None takes
            the embedded world's for its tokenizer, but for its boolq, which its model answers by chance; else none.
        data_dir: the folder from which published tasks are read, as for `zero_shot`; by default from the hub.
        known: what `knowledge_of_units` or `knowledge_distribution` measured on this model: shows what each domain
            needs.
        compared: what `compare_knowledge` returned for several models: shows whether knowledge moved.
        text: text whose tokens excite channels, which the mean ablation averages over too; None takes some of the
            embedded world's held-out text for its tokenizer, else none, and these two are not available.
        channels: number of single FFN channels that are ablated for each question, beside all heads and whole FFNs.

    Returns:
        An `Explorer`, an ipywidgets Tab: the last expression of a cell shows it.

    Raises:
        PrunekitError: groups of another model or kind, tasks that cannot be read, or a `compared` of another form.
    """
    if data_dir is not None and tasks is None:
        raise PrunekitError(f"data_dir={data_dir!r} is read for tasks=, such as tasks=['piqa']; give both, or neither")
    if compared is not None:  # before anything is measured
        require_columns(compared, ("model", "kind", "layer", "moved", "moved_low", "moved_high"), COMPARED)
    chosen = _chosen(model, groups)
    is_world = world.is_world_tokenizer(tokenizer)
    if tasks is None and is_world:
        tasks = {name: task for name, task in world.tasks().items() if name != "boolq"}
    if text is None and is_world:
        text = "\n".join(world.validation_text().splitlines()[:LINES])
    asked = _by_domain(tasks, data_dir)
    first = next(iter(asked.values()))[0] if asked else Question("1 plus 1 is", (" 2", " 3"), 0, "")
    panels = {"Question": question_panel(model, tokenizer, chosen, asked, channels)}
    if known is not None:
        panels["Domain"] = domain_panel(domain_needs(known))
    excited = None if text is None else exciting_tokens(model, tokenizer, chosen, text)
    panels["Ablate"] = ablation_panel(
        model, tokenizer, chosen, first, None if excited is None else _calibration(excited)
    )
    if compared is not None:
        panels["Compare"] = comparison_panel(compared, domain_column(compared, COMPARED))
    config: Any = model.config.get_text_config()
    n_layers, n_heads = len(outermost_elements(model)), int(getattr(config, "num_attention_heads", 1))
    prompt = first.contexts[0] if first.contexts else first.context
    panels["Attention"] = attention_panel(model, tokenizer, n_layers, n_heads, prompt)
    if excited is not None:
        panels["Channel"] = channel_panel(excited, chosen)
    return Explorer(panels)


def _chosen(model: Any, groups: Iterable[CoupledGroup] | None) -> list[CoupledGroup]:
    found = discover(model).of_kind(*KINDS) if groups is None else groups
    chosen = check_groups(model, found)
    for group in chosen:
        if group.kind not in CONSUMED:
            raise PrunekitError(f"{group.name!r} is of the kind {group.kind!r}; the lab takes {', '.join(CONSUMED)}")
    return sorted(chosen, key=lambda group: CONSUMED.index(group.kind))


def _by_domain(tasks: Tasks | None, data_dir: str | Path | None) -> dict[str, list[Question]]:
    found: dict[str, list[Question]] = {}
    for task in named_tasks(tasks, data_dir=data_dir) if tasks is not None else []:
        for question in task.questions:
            found.setdefault(question.domain, []).append(question)
    return found


def _calibration(excited: ExcitingTokens) -> Tensor:
    """The first windows of the text, those as long as the first one: what a mean ablation averages over."""
    first, *others = excited.windows
    return torch.tensor([first, *(window for window in others if len(window) == len(first))][:WINDOWS])
