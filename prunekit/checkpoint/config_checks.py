"""Refuses configurations that name no model, code of others, or numbers that no model has, before anything is built."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from prunekit.annotations import shown
from prunekit.errors import PrunekitError

_COUNTS = r"^(num|n)_|_(size|dim|embd|layers|heads|positions|embeddings)$"  # names of fields that count or measure
# Part of a field's name, of which ^ is the beginning → the largest number that is believed.
_MOST = {"layers": 1024, "^n_layer": 1024, "num_layer": 1024, "position": 2**24}


def check_names(path: Path, config: dict[str, Any]) -> None:
    """Raise an error for a model type that is no text, or architectures that are no list of texts."""
    kind, names = config.get("model_type"), config.get("architectures")
    if not isinstance(kind, str | None):
        raise PrunekitError(f"{str(path)!r} has model_type={kind!r:.40}; it must be a text: restore it from its source")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise PrunekitError(
            f"{str(path)!r} has architectures={names!r:.40}; they must be a list of texts: restore it from its source"
        )


def check_described(described: dict[str, Any], source: str) -> None:
    """Raise an error where a configuration names weights of its own, code, or a number that no model has.

    `transformers` would read other weights than are checked here, fetch and run the code for attention or experts, or
    make a list of so many layers. A cut checkpoint of ours is built without the fields that name code instead.

    Args:
        described: config.json as it is, nested configurations included.
        source: of the checkpoint, for the message.

    Raises:
        PrunekitError: names the field and what stands there.
    """
    _check_fields(described, source, own=described.get("model_type") == "prunekit")


def _check_fields(described: Any, source: str, own: bool) -> None:
    if isinstance(described, list):
        for value in described:
            _check_fields(value, source, own)
    for key, value in described.items() if isinstance(described, dict) else ():
        if key == "transformers_weights" and value is not None:
            raise PrunekitError(
                f"config.json of {source!r} has transformers_weights={shown(value)}; weights are only read from "
                "model.safetensors or model.safetensors.index.json: rename the file to that, and remove the field from "
                "config.json"
            )
        part = next((part for part in _MOST if part in f"^{key}"), "")
        if part and type(value) is int and not 0 <= value <= _MOST[part]:
            raise PrunekitError(
                f"config.json of {source!r} has {key}={value:,}; it must lie between 0 and {_MOST[part]:,}: restore it "
                "from its source"
            )
        if not own and "_implementation" in key and "/" in str(value):
            raise PrunekitError(
                f"config.json of {source!r} has {key}={value!r}, code of a repository, which is not fetched or run; "
                "remove that field from config.json"
            )
        _check_fields(value, source, own)


def check_config(source: str, config: dict[str, Any], trust_remote_code: bool) -> None:
    """Raise an error for a kind of model that is not known, and for numbers that no model has.

    Args:
        source: the folder, for messages.
        config: the contents of config.json.
        trust_remote_code: whether code that comes with the checkpoint may be run.

    Raises:
        PrunekitError: names the field of the configuration.
    """
    kind = config.get("model_type")
    own_code = "auto_map" in config
    if own_code and trust_remote_code:
        return
    if own_code and kind not in CONFIG_MAPPING:
        raise PrunekitError(
            f"cannot load {source!r}: its model_type {kind!r} is code that comes with it, which is not run; read that "
            "code, and give load(..., trust_remote_code=True) where you trust it"
        )
    if kind not in CONFIG_MAPPING:
        what = "config.json has no model_type" if kind is None else f"no release of transformers here knows {kind!r}"
        raise PrunekitError(
            f"cannot load {source!r}: {what} (its model_type); restore config.json from its source, or install a newer "
            "transformers"
        )
    _check_numbers(source, config, CONFIG_MAPPING[kind])


def _check_numbers(source: str, config: dict[str, Any], family: type) -> None:
    """Raise an error where a count or a size is no integer of 0 or more."""
    usual: dict[str, Any] = {}
    with suppress(Exception):  # a family whose configuration needs arguments
        usual = family().to_dict()
    for name, value in config.items():
        counts = type(usual.get(name)) is int and usual[name] >= 0 and re.search(_COUNTS, name) is not None
        if counts and value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise PrunekitError(
                f"cannot load {source!r}: {name}={value!r:.40} in its config.json is no integer of 0 or more (usual is "
                f"{usual[name]}); restore config.json from its source"
            )
