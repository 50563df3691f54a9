"""Refuses configurations of plain checkpoints that `transformers` cannot build, before it tries."""

import re
from contextlib import suppress
from typing import Any

from transformers import CONFIG_MAPPING

from prunekit.errors import PrunekitError

_COUNTS = r"^(num|n)_|_(size|dim|embd|layers|heads|positions|embeddings)$"  # names of fields that count or measure


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
