"""The structure of a checkpoint's model without its weights, which discovery does not read."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from prunekit.checkpoint.building import check_size, cut_again
from prunekit.checkpoint.cut_checkpoints import LEAST_PART_LEFT, MODEL_TYPE, without_kernels
from prunekit.checkpoint.folders import read_config, stored_tensors
from prunekit.checkpoint.left_out import check_left_out
from prunekit.checkpoint.loading import load
from prunekit.checkpoint.origins import resolve
from prunekit.discovery import discover
from prunekit.errors import PrunekitError
from prunekit.models import empty_model, shapes_of


def load_structure(source: str | Path) -> Any:
    """A model to discover groups in: without weights where its folder's configuration says all, else loaded.

    Args:
        source: as for `load`; a GGUF file stands for the folder that it is converted to.

    Raises:
        PrunekitError: as `load`, which says what is wrong with a checkpoint.
    """
    folder = Path(resolve(source))
    if folder.is_dir():
        with suppress(Exception):  # any error of any family; loading reports it
            return _without_weights(folder)
    return load(source)[0]


def _without_weights(folder: Path) -> Any:
    """The model that a configuration leads to, empty, cut as recorded.

    Raises:
        PrunekitError: it does not fit the files, or is not of the class that it names. Whatever else its family raises.
    """
    saved, stored = read_config(folder), stored_tensors(folder)
    cut = saved.get("model_type") == MODEL_TYPE
    plain = None if cut else AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config = plain or AutoConfig.for_model(**without_kernels(saved["base_config"]))
    check_size(config, stored, str(folder), factor=LEAST_PART_LEFT if cut else 2)
    model = empty_model(config)
    if "prunekit" in saved or type(model).__name__ not in config.architectures:
        raise PrunekitError(f"{str(folder)!r} is not what its configuration says; load it")
    shapes = shapes_of(model)
    if not cut and any(tuple(stored[name].shape) != shape for name, shape in shapes.items() if name in stored):
        raise PrunekitError(f"the weights in {str(folder)!r} do not fit its configuration; load it")
    if not cut:
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
        rest = [
            name for name in stored.keys() - model.state_dict().keys() if not re.search("|".join(ignored) or "$^", name)
        ]
        check_left_out(str(folder), model, rest)
    return cut_again(model, discover(model), saved["stages"], saved.get("biases", [])) if cut else model
