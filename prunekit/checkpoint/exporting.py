"""Exports of a model for engines that know one width: plain, filled up with zeros, or as a GGUF file."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from prunekit.checkpoint.cards import texts_beside
from prunekit.checkpoint.gguf import write_gguf
from prunekit.checkpoint.padded import padded_model
from prunekit.checkpoint.saving import (
    SHARD,
    check_saving,
    whole_folder,
    write_plain,
    write_texts,
    write_tokenizer,
)
from prunekit.checkpoint.uniform import plain_config
from prunekit.checkpoint.widths import Cuts
from prunekit.errors import PrunekitError
from prunekit.layouts import GGUF, LAYOUTS, PADDED
from prunekit.pruning import PruningPlan

if TYPE_CHECKING:
    from prunekit.evaluation import Report


def export(
    model: nn.Module,
    out: str | Path,
    *,
    layout: Literal["plain", "padded", "gguf"] = "plain",
    tokenizer: Any = None,  # noqa: ANN401
    plan: PruningPlan | None = None,
    report: "Report | None" = None,
    files: Mapping[str, str] | None = None,
    max_shard_size: str | int = SHARD,
) -> Path:
    """Write a folder that other programs load without prunekit, proved to give the same logits.

    Args:
        model: a model, cut or not; adapters merged.
        out: a folder that does not exist yet. It is complete or not there.
        layout: `"plain"` for a checkpoint that plain `transformers` loads, for cuts that the family's configuration
            can say. `"padded"` fills any other up to even widths with zeros. `"gguf"` writes `model.gguf` for
            llama.cpp, for what is plain.
        tokenizer: as for `save`, and so are `plan`, `report`, `files` and `max_shard_size`.
        plan: by which the model was cut.
        report: what was measured about it.
        files: more texts for the folder.
        max_shard_size: of one safetensors file.

    Returns:
        The folder.

    Raises:
        PrunekitError: the layout is unknown or cannot hold this model, or what `save` raises. Nothing is left behind.
    """
    if layout not in LAYOUTS:
        raise PrunekitError(f"layout={layout!r} is not known; give one of {', '.join(map(repr, LAYOUTS))}")
    check_saving(model, out, tokenizer, plan, report, files, max_shard_size)
    model, config = (_padded if layout == PADDED else _plain)(model)
    with whole_folder(out) as folder:
        write_tokenizer(model, folder, tokenizer)
        if layout == GGUF:
            write_gguf(model, config, folder)
        else:
            write_plain(model, config, folder, max_shard_size)
        write_texts(folder, texts_beside(model, layout, plan, report), files or {})
    return Path(out)


def _plain(model: Any) -> tuple[Any, Any]:  # noqa: ANN401
    config = plain_config(model)
    if config is None:
        raise PrunekitError(
            f"the configuration of {type(model).__name__} cannot say these widths; export with layout='padded', or "
            "save it with prunekit.save"
        )
    return model, config


def _padded(model: Any) -> tuple[Any, Any]:  # noqa: ANN401
    config = plain_config(model)
    if config is not None:
        return model, config
    name_or_path = model.config.name_or_path
    model = padded_model(model, Cuts.of(model))
    model.config.name_or_path = name_or_path
    return model, model.config
