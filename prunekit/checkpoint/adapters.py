"""Merges an adapter that lies in a folder into its base model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prunekit.checkpoint.door import ADAPTER, has_adapter
from prunekit.checkpoint.folders import read_object
from prunekit.errors import PrunekitError, reason
from prunekit.models import name_model


@contextmanager
def base_of_adapter(folder: str | Path) -> Iterator[str]:
    """The folder or hub id of an adapter's base model: the weights beside it, else the one that it names.

    Raises:
        PrunekitError: there is no adapter, or it names no base model.
    """
    folder = Path(folder)
    if not has_adapter(folder):
        raise PrunekitError(f"{str(folder)!r} is no folder with an adapter ({ADAPTER}); leave out merge_adapter=True")
    if not (folder / "config.json").exists():
        named = read_object(folder / ADAPTER).get("base_model_name_or_path")
        if not named or not isinstance(named, str):
            raise PrunekitError(
                f"{ADAPTER} of {str(folder)!r} names no base model; write its folder or hub id into "
                "base_model_name_or_path"
            )
        yield named
        return
    with TemporaryDirectory() as beside:  # transformers would attach the adapter to the weights in its own folder
        for file in folder.absolute().iterdir():
            if not file.name.startswith("adapter_"):
                (Path(beside) / file.name).symlink_to(file)
        yield beside


def merge_adapter_of(folder: str | Path, model: Any) -> Any:
    """The model with the folder's adapter merged into its weights.

    Raises:
        PrunekitError: peft cannot read it, or it does not fit the model.
    """
    from peft import PeftModel

    try:
        merged = PeftModel.from_pretrained(model, folder).merge_and_unload()
    except Exception as error:  # peft's, torch's and safetensors', of any kind
        raise PrunekitError(
            f"the adapter in {str(folder)!r} does not fit {type(model).__name__}, loaded as its base "
            f"({reason(error)}); name the model that it was trained on in "
            f"base_model_name_or_path of its {ADAPTER}"
        ) from error
    name_model(merged, str(folder))
    return merged
