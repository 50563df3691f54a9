"""Saving checkpoints, without pickles.

A cut that the family's own configuration can say is saved as a plain `transformers` checkpoint. Any other is saved
with `model_type: "prunekit"`: the uncut configuration and the units kept.
"""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import nn

from prunekit.checkpoint.loading import FORMAT, MODEL_TYPE, cut_again, load_tokenizer
from prunekit.checkpoint.uniform import plain_config
from prunekit.errors import PrunekitError
from prunekit.files import check_new_folder, new_folder


def save(
    model: nn.Module,
    out: str | Path,
    *,
    tokenizer: Any = None,  # noqa: ANN401
    files: Mapping[str, str] | None = None,
) -> Path:
    """Write a checkpoint folder that `load` reads back with the same logits.

    Args:
        model: a model, cut or not; adapters merged.
        out: a folder that does not exist yet. It is complete or not there.
        tokenizer: to save along; by default the one that stands where the model was loaded from.
        files: more texts for the folder, name → content, such as a plan or a model card.

    Returns:
        The folder.

    Raises:
        PrunekitError: `out` exists or cannot be written, adapters are not merged, or the model is not what its
            recorded cuts lead to.
    """
    check_new_folder(out)
    if hasattr(model, "peft_config"):
        raise PrunekitError("the model still carries adapters; call merge_and_unload() on it and save the result")
    config = plain_config(model)
    cut = _cut_config(model) if config is None else None
    with new_folder(out) as folder:
        _write_model(model, config, cut, folder)
        tokenizer = tokenizer if tokenizer is not None else _tokenizer_beside(model)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        for name, content in (files or {}).items():
            (folder / name).write_text(content, encoding="utf-8")
    return Path(out)


def _write_model(model: Any, config: Any, cut: dict[str, Any] | None, folder: Path) -> None:  # noqa: ANN401
    if cut is not None:
        _write_cut(model, cut, folder)
        return
    mine = model.config
    try:
        model.config = config
        model.save_pretrained(folder)
    finally:
        model.config = mine


def _cut_config(model: Any) -> dict[str, Any]:  # noqa: ANN401
    """What config.json says of a cut model, proved by building it again.

    Raises:
        PrunekitError: the record does not lead to this model.
    """
    base = copy.deepcopy(model.config)
    del base.prunekit
    described = base.to_dict() | {"architectures": [type(model).__name__]}
    stages = model.config.prunekit["stages"]
    try:
        again = {name: p.shape for name, p in cut_again(described, stages).named_parameters()}
    except Exception as error:  # code that came with a checkpoint, or a configuration its family refuses
        raise PrunekitError(f"this cut model cannot be rebuilt from its record, so it is not saved: {error}") from error
    if again != {name: p.shape for name, p in model.named_parameters()}:
        raise PrunekitError("this model's shapes are not those of its recorded cuts; it was changed by other means")
    return {"model_type": MODEL_TYPE, "format": FORMAT, "stages": stages, "base_config": described}


def _write_cut(model: Any, cut: dict[str, Any], folder: Path) -> None:  # noqa: ANN401
    """Weights under the names of `named_parameters()`, tied ones once; save_pretrained renames some."""
    (folder / "config.json").write_text(json.dumps(cut, indent=1))
    parameters = {id(p) for p in model.parameters()}
    persistent = {n: t for n, t in model.state_dict(keep_vars=True).items() if id(t) not in parameters}
    state = dict(model.named_parameters()) | persistent
    save_torch_state_dict({name: t.detach().contiguous() for name, t in state.items()}, folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def _tokenizer_beside(model: Any) -> Any:  # noqa: ANN401
    source = getattr(getattr(model, "config", None), "name_or_path", "")
    return load_tokenizer(source, False) if source and Path(source).is_dir() else None
