"""Exports a model for other programs: plain, padded with zeros, or as a GGUF file."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prunekit.calibration import check_finite
from prunekit.checkpoint.cards import renumbered, texts_beside
from prunekit.checkpoint.gguf import check_family, write_gguf
from prunekit.checkpoint.padded import padded_model
from prunekit.checkpoint.saving import (
    SHARD,
    check_saving,
    write_plain,
    write_texts,
    write_tokenizer,
)
from prunekit.checks import FilePath, Network, Tokenizer, check_choice, checked
from prunekit.errors import PrunekitError
from prunekit.files import new_folder
from prunekit.names import GGUF, LAYOUTS, PADDED
from prunekit.pruning import PruningPlan
from prunekit.pruning.cuts import Cuts
from prunekit.pruning.describing import plain_config, unsaid

if TYPE_CHECKING:
    from prunekit.evaluation import Report

KEEP = "keep the checkpoint that prunekit saves, or re-fit with fit='weights', which adds none"


@checked
def export(
    model: Network,
    out: FilePath,
    *,
    layout: Literal["plain", "padded", "gguf"] = "plain",
    tokenizer: Tokenizer | None = None,
    plan: PruningPlan | None = None,
    report: "Report | None" = None,
    files: Mapping[str, str] | None = None,
    max_shard_size: str | int = SHARD,
) -> Path:
    """Exports a model to a folder that other programs load without prunekit, with the same logits.

    Args:
        model: a model, cut or not; adapters merged.
        out: a folder that does not exist yet. It is complete or not written.
        layout: `"plain"` for a checkpoint that plain `transformers` loads, for cuts that the family's configuration
            can say. `"padded"` fills any other up to even widths with zeros. `"gguf"` writes `model.gguf` for
            llama.cpp, for what is plain.
        tokenizer: as for `save`, and so are `plan`, `report`, `files` and `max_shard_size`.
        plan: by which the model was cut.
        report: evaluation report of the model.
        files: more texts for the folder.
        max_shard_size: of one safetensors file.

    Returns:
        The folder.

    Raises:
        PrunekitError: the layout is unknown or cannot hold this model, or what `save` raises. Nothing is left behind.
    """
    check_choice("layout", layout, LAYOUTS)
    check_saving(model, out, tokenizer, report, files, max_shard_size)
    check_finite(model)
    if layout == GGUF:
        check_family(model)
    remarks = renumbered(model, plan, tokenizer)
    even, config, filled = _even(model, layout)
    with new_folder(out) as folder:
        write_tokenizer(model, folder, tokenizer)
        if layout == GGUF:
            remarks += write_gguf(even, config, folder)
        else:
            write_plain(even, config, folder, max_shard_size)
        made = texts_beside(even, layout, plan, report, unsaid=filled, remarks=remarks)
        write_texts(folder, made, files or {})
    return Path(out)


def _even(model: Any, layout: str) -> tuple[Any, Any, list[str]]:
    """A model of even widths, a configuration that says them, and which had to be filled up for that."""
    config = plain_config(model)
    if config is not None:
        return model, config, []
    cuts = Cuts.of(model)
    if layout == PADDED:
        padded = padded_model(model, cuts)
        return padded, padded.config, unsaid(cuts)
    if cuts.biases:
        raise PrunekitError(f"{type(model).__name__} has biases, for which its configuration has no field; {KEEP}")
    raise PrunekitError(
        f"the configuration of {type(model).__name__} has no fields for these widths ({'; '.join(unsaid(cuts))}); "
        "export with layout='padded' (in a shell: --layout padded), or keep the checkpoint that prunekit saves"
    )
