"""Loads the tokenizer of a checkpoint, and writes it beside another."""

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from prunekit.checkpoint.origins import files_alone
from prunekit.errors import PrunekitError, reason, warn

_VOCABULARIES = ("tokenizer*", "*.model", "vocab.json", "vocab.txt")
_BESIDE = ("merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*")
_SENTENCEPIECE = ("sentencepiece", "google.protobuf")  # what transformers reads *.model with


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
    return alone and not all(_is_installed(package) for package in _SENTENCEPIECE)


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of the package above it
        return False
