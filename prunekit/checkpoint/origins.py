"""Finds the checkpoint folder or hub id that a name stands for; a GGUF file is converted to a folder of the cache.

The weights of a GGUF file are dequantized by transformers' reader. Nothing that stands in the file is executed, and
nothing else that lies in its folder counts, but for the files of a tokenizer where the file holds no vocabulary.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any

import transformers
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from prunekit.annotations import shown
from prunekit.checkpoint.gguf import FILE, SUFFIX, GgufHeader, read_header
from prunekit.checks import PROCESS
from prunekit.digests import VARIABLE, cache_root, cached_folder, digest_of_text, sha256_of
from prunekit.errors import PrunekitError, reason
from prunekit.models import own_tensors
from prunekit.names import NAMES, packaged_file

FORMAT = 1  # of the cached folders; another number makes all of them anew
MAGIC = b"GGUF"
READ = "llama, qwen2, qwen3, gemma2, gemma3, phi3 or gpt2"  # some of those that transformers reads
PROBE = "Once upon a time, in 1984: naïve 猫s\n\n\tdef f(x): return x  # <|im_start|>user<bos></s>"


def resolve(source: str | Path) -> str | Path:
    """The checkpoint folder or hub id of a source.

    A GGUF file, a folder with one and no config.json, and the name of a packaged model such as `"smollm2"` are
    converted, once, to a folder in the user's cache. Whatever else is given back as it is.

    Args:
        source: as `prunekit.load` takes it, but for `"world"`, which has no folder.

    Raises:
        PrunekitError: the file or folder is missing, a file cannot be converted, the folder holds several, or the
            package of the model is not installed.
    """
    try:
        Path(source).is_dir()
    except (OSError, ValueError) as error:  # too long, or with a NUL byte
        raise PrunekitError(
            f"{shown(source)} cannot be a name ({getattr(error, 'strerror', None) or error}); give a checkpoint "
            f"folder, a .gguf file, a hub id, or {NAMES}"
        ) from None
    file = packaged_file(source) or _gguf_of(Path(source))
    if file is not None:
        return converted(file)
    on_disk = _is_gguf(Path(source)) or Path(source).is_absolute() or str(source).startswith(".")
    if (on_disk or str(source).count("/") > 1) and not os.path.lexists(source):  # no hub id
        raise PrunekitError(
            f"{str(source)!r} does not exist; give a .gguf file, a checkpoint folder, a hub id, or {NAMES}"
        )
    return source


def files_alone(source: str) -> dict[str, bool]:
    """The option to take only files fetched before, where the hub does not answer: it is asked once, not each time."""
    if Path(source).is_dir():
        return {}
    try:
        get_hf_file_metadata(hf_hub_url(source, "config.json"))
    except (HfHubHTTPError, HFValidationError):  # an answer too, or no name that a hub could know
        return {}
    except Exception:  # the client's or the network's
        return {"local_files_only": True}
    return {}


def _gguf_of(path: Path) -> Path | None:
    """The GGUF file of a path; None for anything else."""
    if path.is_file():
        return path if _is_gguf(path) else None
    if not path.is_dir() or os.path.lexists(path / "config.json"):
        return None
    found = sorted(file for file in path.glob("*.*") if _is_gguf(file) and file.is_file())
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise PrunekitError(f"{str(path)!r} holds several models ({names}); give one of them: {str(found[0])!r}")
    return found[0] if found else None


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == SUFFIX


def converted(path: Path) -> Path:
    """The checkpoint folder of a GGUF file, converted at the first call and then cached.

    The cache key is a SHA-256 of the file's content (not its name), of tokenizer files beside it, and of the version
    of transformers.

    Args:
        path: of the file.

    Raises:
        PrunekitError: the file cannot be read or converted, or the cache cannot be written.
    """
    _check_magic(path)
    return cached_folder(f"gguf-{_key(path)}", lambda folder: _convert(path, folder))


def _check_magic(path: Path) -> None:
    """Raise an error for a file that is not a GGUF file, by its first four bytes.

    Raises:
        PrunekitError: says how it begins.
    """
    try:
        with path.open("rb") as file:
            first = file.read(len(MAGIC))
    except OSError as error:
        raise PrunekitError(f"cannot read {str(path)!r} ({error.strerror}); restore it from its source") from None
    if first != MAGIC:
        raise PrunekitError(
            f"{str(path)!r} is not a GGUF file: it begins with {first!r}, not with {MAGIC!r}; restore it from its "
            "source, or give the folder of a checkpoint with config.json and safetensors"
        )


def _key(path: Path) -> str:
    digests = [f"{file.name} {sha256_of(file)}" for file in _tokenizer_files(path)]
    facts = [f"{FORMAT}", version("transformers"), sha256_of(path), *digests]
    return digest_of_text("\n".join(facts))[:32]


def _tokenizer_files(path: Path) -> list[Path]:
    """Tokenizer files in the GGUF file's folder, used if the file itself has no vocabulary."""
    return sorted(file for file in path.absolute().parent.glob("tokenizer*") if file.is_file())


def _convert(path: Path, folder: Path) -> None:
    header = read_header(path)
    print(
        f"prunekit: converting {str(path)!r}, once; kept in {str(cache_root())!r} ({VARIABLE} names another place)",
        file=sys.stderr,
    )
    with _isolated(path) as alone:
        config = _config(path, alone, header)
        tokenizer = _tokenizer(path, alone, header, config)
        model = _model(path, alone, header, config)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        _check_tokenizer(path, folder, tokenizer)


@contextmanager
def _isolated(path: Path) -> Iterator[Path]:
    """A folder with the file alone: whatever lies beside it would be read as its configuration, or as an adapter."""
    with TemporaryDirectory() as folder:
        try:
            (Path(folder) / FILE).symlink_to(path.absolute())
        except OSError:  # a system that lets not everybody make links
            copyfile(path, Path(folder) / FILE)
        yield Path(folder)


def _config(path: Path, alone: Path, header: GgufHeader) -> Any:
    try:
        config = AutoConfig.from_pretrained(alone, gguf_file=FILE, trust_remote_code=False)
    except Exception as error:  # of any kind, for an architecture that it has no table for
        raise PrunekitError(
            f"{str(path)!r} is of architecture {header.architecture!r}, which transformers does not read from GGUF "
            f"({reason(error)}); give a file of {READ}, or the checkpoint that it was made from"
        ) from error
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise PrunekitError(
            f"{str(path)!r} is of architecture {header.architecture!r}, no causal language model; give one that is, "
            f"such as {READ}"
        )
    vars(config).pop("_model_name_or_path", None)  # the file's own title in a place of transformers'
    return config


def _model(path: Path, alone: Path, header: GgufHeader, config: Any) -> Any:
    options = {"gguf_file": FILE, "config": config, "dtype": header.dtype, "output_loading_info": True}
    if hasattr(transformers, "GgufConfig"):  # without it, blocks stay as they are; older releases dequantize anyway
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with PROCESS:
            model, info = AutoModelForCausalLM.from_pretrained(alone, trust_remote_code=False, **options)
    except Exception as error:  # transformers' and the gguf package's, of any kind
        raise PrunekitError(
            f"cannot convert {str(path)!r}, of architecture {header.architecture!r} with tensors of "
            f"{', '.join(sorted(header.kinds))} ({reason(error)}); give the checkpoint that it was made from"
        ) from error
    missing = sorted(map(str, info["missing_keys"]))
    if missing:
        raise PrunekitError(f"{str(path)!r} lacks weights: {', '.join(missing[:4])}; restore it from its source")
    _check_nothing_is_left_out(path, header, model)
    return _ordinary(model)


def _check_nothing_is_left_out(path: Path, header: GgufHeader, model: Any) -> None:
    """Raise an error for a file of which the model does not hold every number: it would compute something else.

    Blocks beyond the model's own, which some files have for guessing several tokens at once, do not count.
    """
    n_layers = model.config.get_text_config().num_hidden_layers
    blocks = {name: re.match(r"blk\.(\d+)\.", name) for name in header.sizes}
    extra = {name for name, found in blocks.items() if found and int(found[1]) >= n_layers}
    stored = sum(size for name, size in header.sizes.items() if name not in extra)
    held = sum(tensor.numel() for tensor in own_tensors(model).values())
    if stored == held:
        return
    likely = [name for name in header.sizes if name.startswith("rope_") or name.endswith(".bias")]
    named = f", perhaps {', '.join(likely[:3])}" if likely else ""
    raise PrunekitError(
        f"{str(path)!r} holds {stored:,} numbers, and {type(model).__name__}, as transformers reads it, {held:,}: "
        f"parts of the file would be left out{named}, and the model would compute something else; give the checkpoint "
        "that it was made from"
    )


def _ordinary(model: Any) -> Any:
    """Without what is left of having been quantized, which would keep it from being saved."""
    for name in ("hf_quantizer", "quantization_method"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)
    model.is_quantized = False
    return model


def _tokenizer(path: Path, alone: Path, header: GgufHeader, config: Any) -> Any:
    """The file's own; where it holds none, that of the files beside it, or None."""
    options: dict[str, Any] = {"config": config, "trust_remote_code": False}
    if header.vocabulary is None and not _tokenizer_files(path):
        return None
    try:
        if header.vocabulary is None:
            return AutoTokenizer.from_pretrained(path.absolute().parent, **options)
        return AutoTokenizer.from_pretrained(alone, gguf_file=FILE, **options)
    except Exception as error:  # of any kind
        raise PrunekitError(
            f"cannot read the tokenizer of {str(path)!r}, of kind {header.vocabulary!r} ("
            f"{reason(error)}); give the checkpoint that it was made from"
        ) from error


def _check_tokenizer(path: Path, folder: Path, tokenizer: Any) -> None:
    """Raise an error for one that is another after saving and loading."""
    again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if again(PROBE)["input_ids"] != tokenizer(PROBE)["input_ids"]:
        raise PrunekitError(
            f"the tokenizer of {str(path)!r} gives other tokens once it is saved and loaded; give the checkpoint that "
            "it was made from"
        )
