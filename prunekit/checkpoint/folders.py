"""Reads and checks a checkpoint folder: its configuration and the headers of its weights.

Only headers are read here, so that what is wrong is said before memory is asked for.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.overrides import TorchFunctionMode

from prunekit.checkpoint.config_checks import check_described, check_kind, check_names, has_adapter
from prunekit.checks import PROCESS
from prunekit.errors import PrunekitError
from prunekit.files import LARGEST, check_regular, read_json
from prunekit.models import auto_class, shapes_of

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = {b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"}  # how torch's zip files and bare ones begin
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_READ = {".json", ".safetensors", ".model", ".txt", ".jinja"}  # what transformers may read of a folder
_UNLIMITED = 2**62
FEW_CALLS, CALLS_A_TENSOR = 20_000, 2_000  # of torch, to build a model; experts are built one by one, and stored as one
ROOM = 2**27  # numbers in constants, such as masks, that no weights stand for


@dataclass(frozen=True)
class Stored:
    """One tensor as described by its file's header.

    Attributes:
        file: the safetensors file.
        shape: of the tensor.
        dtype: in safetensors' words, such as `"F32"`.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: str


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        PrunekitError: the file is missing, cannot be read, or is not a JSON object.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise PrunekitError(f"{str(path)!r} holds no JSON object but a {type(value).__name__}; restore it")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a checkpoint that prunekit can read.

    Raises:
        PrunekitError: the file is missing, or the folder does not hold a plain language model.
    """
    path = folder / "config.json"
    if has_adapter(folder):
        what = "beside the weights of a model" if path.exists() else "only"
        raise PrunekitError(
            f"{str(folder)!r} holds an adapter {what}; merge it (peft's merge_and_unload): model, tokenizer = "
            f"prunekit.load({str(folder)!r}, merge_adapter=True), save that with prunekit.save(model, new_folder), and "
            f"give its folder{'; or take the files adapter_* away' if path.exists() else ''}"
        )
    if not path.exists() and not path.is_symlink():
        raise PrunekitError(f"{str(folder)!r} is no checkpoint: it has no config.json; give the folder that holds it")
    for file in sorted(folder.iterdir()):  # before anything reads them: a pipe would never end
        if file.suffix in _READ and file.exists() and not file.is_dir():
            check_regular(file, LARGEST if file.suffix == ".json" else _UNLIMITED)
    config = read_object(path)
    check_names(path, config)
    check_described(config, str(folder))
    check_kind(folder, config)
    return config


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint, by name, from the headers of its safetensors alone.

    Raises:
        PrunekitError: no weights, a broken file, or an index that does not fit the files.
    """
    if (folder / WHOLE).is_file():
        return header_of(folder / WHOLE)
    if (folder / INDEX).exists():
        return _sharded(folder, _weight_map(folder / INDEX))
    read_config(folder)  # a folder without a checkpoint has its own message
    found = ", ".join(sorted(p.name for p in folder.glob("*.safetensors"))) or "none"
    if found != "none":
        raise PrunekitError(f"{str(folder)!r} has neither {WHOLE} nor {INDEX} that can be read (safetensors: {found})")
    pickled = ", ".join(sorted(p.name for p in folder.glob("*.bin"))) or "none"
    raise PrunekitError(
        f"{str(folder)!r} has no safetensors weights (pickled ones: {pickled}); prunekit reads no pickles, "
        "so convert them to safetensors first"
    )


def _weight_map(path: Path) -> dict[str, str]:
    names = read_object(path).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise PrunekitError(f"{str(path)!r} has no weight_map of tensor names to file names; restore it")
    for file in set(names.values()):
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise PrunekitError(f"{str(path)!r} names {file!r}; only a safetensors file in the same folder is read")
    return names


def _sharded(folder: Path, names: dict[str, str]) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for file in sorted(set(names.values())):
        for name, stored in header_of(folder / file).items():
            if name in found:
                raise PrunekitError(
                    f"{name!r} stands in {found[name].file.name!r} and in {file!r} of {str(folder)!r}; restore both"
                )
            found[name] = stored
    for name, file in names.items():
        if name not in found or found[name].file.name != file:
            where = found[name].file.name if name in found else "no file"
            raise PrunekitError(
                f"the index of {str(folder)!r} seeks {name!r} in {file!r}, but {where!r} has it; restore it"
            )
    return found


def header_of(path: Path) -> dict[str, Stored]:
    """Tensor name → file, shape and dtype, from the header of one safetensors file; no weights are read.

    Raises:
        PrunekitError: the file cannot be read.
    """
    check_regular(path, _UNLIMITED)
    try:
        with path.open("rb") as file:
            first = file.read(2)
        with safe_open(path, "pt") as weights:
            parts = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118 - not a dictionary
            return {name: Stored(path, tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
    except OSError as error:
        raise _unreadable(path, error.strerror) from None
    except SafetensorError as error:
        raise _unreadable(path, "it is a pickle by another name" if first in _PICKLES else error) from None


def _unreadable(path: Path, reason: object) -> PrunekitError:
    return PrunekitError(f"the weights in {str(path)!r} cannot be read ({reason}); restore them from their source")


def check_dtypes(folder: Path, stored: dict[str, Stored]) -> None:
    """Raise an error for weights that are packed into a few bits.

    Raises:
        PrunekitError: some are.
    """
    for name, tensor in stored.items():
        if tensor.dtype.startswith("F") and tensor.dtype not in FLOATS:  # such as F8_E4M3, which a scale must go with
            raise PrunekitError(
                f"{name!r} of {str(folder)!r} is stored as {tensor.dtype}, which cannot be cut; "
                f"give a checkpoint in one of {', '.join(sorted(FLOATS))}"
            )


def check_size(config: Any, stored: dict[str, Stored], source: str, *, factor: int) -> None:
    """Raise an error for a configuration that asks for far more than its files hold, before anything is allocated.

    Args:
        config: of the model to build.
        stored: tensors of the checkpoint.
        source: the checkpoint, for the message.
        factor: how many times the stored elements the model may have.

    Raises:
        PrunekitError: it asks for more.
    """
    held = sum(math.prod(tensor.shape) for tensor in stored.values())
    counter = _Counter(FEW_CALLS + CALLS_A_TENSOR * len(stored))
    try:
        with PROCESS, torch.device("meta"), counter:  # not even buffers cost anything
            model: Any = auto_class(config).from_config(config, trust_remote_code=False)
        model.tie_weights()
    except Exception:  # an error of the family is reported by the load that follows
        if counter.n_left >= 0:
            return
        raise PrunekitError(
            f"config.json of {source!r} describes a model of many more parts than the {len(stored)} tensors that are "
            "stored; restore both from one source"
        ) from None
    asked = sum(map(math.prod, shapes_of(model).values()))
    constants = sum(buffer.numel() for buffer in model.buffers())
    if asked > factor * held or constants > factor * held + ROOM:
        raise PrunekitError(
            f"config.json of {source!r} asks for {asked:,} parameters and {constants:,} constants, but its weights "
            f"hold {held:,} numbers; restore both from one source"
        )


class _Counter(TorchFunctionMode):
    """Ends the building of a model that makes more calls than its stored tensors can explain.

    Attributes:
        n_left: calls that may still come; below 0 where it ended the building.
    """

    def __init__(self, n_calls: int) -> None:
        super().__init__()
        self.n_left = n_calls

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.n_left -= 1
        if self.n_left < 0:
            raise OverflowError
        return func(*args, **(kwargs or {}))
