"""The model card: the cut, the evaluation, and how to load the model."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.account import LossChange
from prunekit.annotations import readable
from prunekit.errors import PrunekitError
from prunekit.escaping import in_code, in_fence, in_markdown
from prunekit.files import write_text
from prunekit.models import auto_class, count_parameters
from prunekit.names import GGUF, OWN, PADDED, PLAIN
from prunekit.pruning import PruningPlan
from prunekit.pruning.configurations import fit_for_grouped
from prunekit.pruning.cuts import tokens_went
from prunekit.sparsity.zero_masks import current_report

if TYPE_CHECKING:
    from prunekit.evaluation import Report
    from prunekit.sparsity import SparsityReport

CARD = "README.md"
SPARSITY = "sparsity.json"
_PLAIN_CODE = (
    'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("THIS FOLDER")'
)
_FORMS = {  # layout → its description, and the Python that loads it
    PLAIN: ("A plain checkpoint of its family.", _PLAIN_CODE),
    PADDED: (
        "The configuration of its family cannot express its widths ({unsaid}), so they are filled up with zeros.",
        _PLAIN_CODE,
    ),
    GGUF: (
        "`model.gguf` holds the weights in llama.cpp's form.",
        _PLAIN_CODE.replace("FOLDER", 'FOLDER", gguf_file="model.gguf'),
    ),
    OWN: (
        "The configuration of its family cannot express its widths ({unsaid}), so it needs prunekit to load; once "
        "that is imported, `AutoModelForCausalLM.from_pretrained` loads it too.",
        'import prunekit as pk\n\nmodel, tokenizer = pk.load("THIS FOLDER")',
    ),
}
_GGUF_ALONE = (
    "`model.gguf` holds the weights in llama.cpp's form. What it says of the model ({unsaid}) llama.cpp reads and "
    "`transformers` does not.",
    "import xllamacpp  # or any other program with llama.cpp\n\nparams = xllamacpp.CommonParams()\n"
    'params.model.path = "THIS FOLDER/model.gguf"\nserver = xllamacpp.Server(params)',
)
_NOT_FILLED = "A plain checkpoint of its family; nothing had to be filled up."
RENUMBERED = "its tokens were renumbered"
LISTED = "plan.json lists, under keep, the old number of each new one"
_WRITTEN_OUT = (
    "torch's grouped products do not take the widths of its experts. `prunekit.load` sets them to use the eager "
    "implementation; "
    'with `transformers` alone, say `experts_implementation="eager"`.'
)
_GOOD_FOR = (
    "What these zeros are good for: to a dense engine they are numbers like any other, multiplied and stored in full. "
    "Zeros anywhere make nothing faster, and this folder no smaller unless it is compressed. Only 2:4 "
    "(two zeros in every four weights along a row) can be faster: on NVIDIA GPUs of compute capability 8.0 or higher, "
    "in half precision, in an engine with kernels for semi-structured sparsity. Whether it is depends on shapes and "
    "batch: measure. No other pattern is faster in an engine that this library writes for."
)


def model_card(
    model: Any, layout: str, plan: PruningPlan | None, report: "Report | None", zeros: "SparsityReport | None",
    unsaid: Sequence[str], remarks: Sequence[str],
) -> str:  # fmt: skip
    """The card of a model in Markdown.

    Args:
        model: that is saved.
        layout: `"plain"`, `"padded"`, `"gguf"` or `"prunekit"`.
        plan: the plan of the cut; its notes are included.
        report: evaluation report of the model.
        zeros: sparsity report of its weights.
        unsaid: the widths that its family cannot express.
        remarks: more sentences about it.
    """
    parameters = count_parameters(model)
    sentence, loader = _GGUF_ALONE if layout == GGUF and unsaid else _FORMS[layout]
    loader = loader.replace("AutoModelForCausalLM", auto_class(model.config).__name__)
    sentence = _NOT_FILLED if layout == PADDED and not unsaid else sentence.format(unsaid="; ".join(unsaid))
    family = f"`{type(model).__name__}`, {parameters:,} parameters. {sentence}"
    parts = ["---\nlibrary_name: prunekit\n---\n# A model saved by prunekit", family, *remarks, *_loss_parts(model)]
    if not fit_for_grouped(model):
        parts.append(_WRITTEN_OUT)
        loader = loader.replace(
            'from_pretrained("THIS FOLDER"', 'from_pretrained("THIS FOLDER", experts_implementation="eager"'
        )
    parts += _plan_parts(plan) if plan is not None else []
    parts += _zero_parts(zeros) if zeros is not None else []
    parts += [f"## Figures\n\n{in_fence(report)}\n\nEvery answer: `report.json`."] if report is not None else []
    return "\n\n".join([*parts, f"## Load\n\n```python\n{loader}\n```"]) + "\n"


def renumbered(model: Any, plan: PruningPlan | None, tokenizer: Any) -> list[str]:
    """The card's text on the tokenizer: missing if tokens were removed and none was given."""
    if tokenizer is not None or not tokens_went(model, plan):
        return []
    listed = f" ({LISTED})" if plan is not None and plan.takes_tokens else ""
    return [f"{RENUMBERED.capitalize()}{listed}. The tokenizer of the uncut model does not fit, and none is saved."]


def _loss_parts(model: Any) -> list[str]:
    """The change of the loss by each step since the model was loaded, as far as it was measured."""
    changes = (*getattr(model, "earlier_changes", ()), getattr(model, "loss_change", None))
    return [
        f"What {in_code(change.step)} did: {in_markdown(change)}.{' **That is much.**' * change.is_large}"
        for change in changes
        if isinstance(change, LossChange)
    ]


def _plan_parts(plan: PruningPlan) -> list[str]:
    plain = {name: value for name, value in plan.notes.items() if not isinstance(value, dict | list)}
    told = {name: readable(value) if isinstance(value, float) else value for name, value in plain.items()}
    facts = "\n".join(f"- {in_markdown(name)}: {in_markdown(value)}" for name, value in told.items())
    shown = markdown_table(plan.summary_rows())
    return ["## The cut", *([facts] if facts else []), shown, "Which units stay: `plan.json`."]


def _zero_parts(report: "SparsityReport") -> list[str]:
    rows = [
        (layer, f"{row.sparsity:.2%}", "not measured" if math.isnan(row.error) else f"{row.error:.4f}")
        for layer, row in report.by_layer().iterrows()
    ]
    shown = markdown_table([("layer", "sparsity", "mean output error"), *rows])
    remarks = "\n".join(f"- {in_markdown(remark)}" for remark in report.remarks)
    told = f"Output error: ‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² on the calibration set. Every matrix: `{SPARSITY}`."
    return ["## Zeros", in_code(repr(report)), shown, told, *([remarks] if remarks else []), _GOOD_FOR]


def markdown_table(rows: Sequence[Sequence[object]]) -> str:
    """Rows of cells in Markdown; the first row is the head."""
    lines = ["| " + " | ".join(map(in_markdown, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def write_texts(
    model: Any, folder: Path, layout: str, plan: PruningPlan | None, report: "Report | None",
    files: Mapping[str, str] | None, *, unsaid: Sequence[str], remarks: Sequence[str],
) -> None:  # fmt: skip
    """Write the files besides the weights: the card, the plan, reports, and the user's, which may replace the card.

    Raises:
        PrunekitError: one of the user's has the name of a file that is written already.
    """
    zeros = current_report(model)
    write_text(folder / CARD, model_card(model, layout, plan, report, zeros, unsaid, remarks))
    for name, value in (("plan.json", plan), (SPARSITY, zeros), ("report.json", report)):
        if value is not None:
            write_text(folder / name, value.to_json())
    for name, text in (files or {}).items():
        if name != CARD and (folder / name).exists():
            raise PrunekitError(f"files: {name!r} is a part of the checkpoint itself; give yours another name")
        write_text(folder / name, text)
