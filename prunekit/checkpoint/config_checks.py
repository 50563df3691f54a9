"""Refuses configurations of other kinds of models, with code of others, or with numbers that no model has."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING

from prunekit.annotations import fault_in, shown
from prunekit.compat import class_names
from prunekit.errors import PrunekitError

ADAPTER = "adapter_config.json"
_DEQUANTIZING = {
    "mxfp4": "Mxfp4Config(dequantize=True)",
    "fp8": "FineGrainedFP8Config(dequantize=True)",
    "mxfp8": "FineGrainedFP8Config(dequantize=True)",
    "compressed-tensors": "CompressedTensorsConfig(dequantize=True)",
    "bitsandbytes": "",
    "higgs": "",
}  # quant_method → what makes transformers dequantize while loading; "" where the loaded model is dequantized
CAUSAL_MODELS, IMAGE_TEXT_MODELS = class_names("CAUSAL_LM"), class_names("IMAGE_TEXT_TO_TEXT")
_LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")  # how classes of language models end, whoever wrote them
_COUNTS = r"^(num|n)_|_(size|dim|embd|layers|heads|positions|embeddings)$"  # names of fields that count or measure
# Part of a field's name, of which ^ is the beginning → the largest number that is believed.
_MOST = {"layers": 1024, "^n_layer": 1024, "num_layer": 1024, "position": 2**24}


def check_kind(folder: Path, config: dict[str, Any]) -> None:
    """Raise an error for a folder that holds something else than a plain language model.

    `transformers` would load an encoder too. A model of pictures and text is taken where it has a class for it.

    Args:
        folder: of the checkpoint.
        config: its config.json.

    Raises:
        PrunekitError: its weights are quantized, or it is a model of another kind, such as a classifier.
    """
    quantization = _quantization(config)
    if quantization is not None:
        raise _quantized(folder, config, quantization)
    names = config.get("architectures") or []
    known = any(hasattr(transformers, name) for name in names)
    named = any(name.endswith(_LANGUAGE_MODELS) for name in names)
    foreign = not known and (named or "AutoModelForCausalLM" in (config.get("auto_map") or {}))
    if not names or set(names) & _classes(config.get("model_type")) or foreign:
        return
    said, give = f"{str(folder)!r} is a {names[0]}", "give one that AutoModelForCausalLM loads"
    if hasattr(transformers, names[0]):
        raise PrunekitError(f"{said}, no causal language model; {give}")
    raise PrunekitError(
        f"{said}, which transformers does not have; {give}, or, if this is one, write its class, such as "
        "LlamaForCausalLM, into architectures of its config.json"
    )


def has_adapter(folder: Path) -> bool:
    """Whether an adapter lies in a folder, alone or beside the weights of a model."""
    return (folder / ADAPTER).is_file()


def _quantization(config: dict[str, Any]) -> Any:
    """How weights are quantized, by the configuration or one inside it; None where none are."""
    for field in ("quantization_config", "compression_config"):
        if config.get(field) is not None:
            return config[field]
    inner = (value for value in config.values() if isinstance(value, dict))
    return next((found for found in map(_quantization, inner) if found is not None), None)


def _quantized(folder: Path, config: dict[str, Any], quantization: Any) -> PrunekitError:
    """What to do about quantized weights: some formats have no other release, and transformers dequantizes them."""
    method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
    if method in _DEQUANTIZING:
        option = f", quantization_config={_DEQUANTIZING[method]}" if _DEQUANTIZING[method] else ""
        dequantized = "" if option else ".dequantize()"
        kind = config.get("model_type")
        pictured = kind in IMAGE_TEXT_MODELS and kind not in CAUSAL_MODELS
        loader = "AutoModelForImageTextToText" if pictured else "AutoModelForCausalLM"
        advice = (
            f"dequantize it first: model = {loader}.from_pretrained({str(folder)!r}{option}){dequantized}, "
            "then prunekit.save(model, new_folder), and give that"
        )
    else:
        advice = (
            "transformers cannot turn these into plain weights; give the checkpoint it was made from, which is not "
            "quantized (often the base_model of its README.md)"
        )
    return PrunekitError(f"{str(folder)!r} is quantized ({method}), and quantized weights cannot be cut; {advice}")


def check_class(model: Any) -> None:
    """Raise an error for a model whose folder `load` would refuse, of a class of transformers without tokens' logits.

    Raises:
        PrunekitError: names the class.
    """
    name, above = type(model).__name__, {cls.__name__ for cls in type(model).__mro__}
    if hasattr(transformers, name) and not above & _classes(getattr(model.config, "model_type", None)):
        raise PrunekitError(
            f"a {name} is no causal language model, and prunekit.load would refuse its folder; save it with its own "
            "save_pretrained, or give one that AutoModelForCausalLM loads"
        )


def _classes(model_type: Any) -> set[str]:
    """The classes of transformers that are taken for a model type."""
    pictured = _listed(IMAGE_TEXT_MODELS.get(str(model_type), ()))
    return {name for value in CAUSAL_MODELS.values() for name in _listed(value)} | set(pictured)


def _listed(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def check_names(path: Path, config: dict[str, Any]) -> None:
    """Raise an error for a model type that is no text, or architectures that are no list of texts."""
    kind, names = config.get("model_type"), config.get("architectures")
    if fault_in("config.json", (kind, names), tuple[str | None, list[str] | None]) is not None:
        raise PrunekitError(
            f"{str(path)!r} has model_type={kind!r:.40} and architectures={names!r:.40}; these must be a text and a "
            "list of texts: restore it from its source"
        )


def check_described(described: Any, source: str, own: bool | None = None) -> None:
    """Raise an error where a configuration names weights of its own, code, or a number that no model has.

    `transformers` would read other weights than are checked here, fetch and run the code for attention or experts, or
    make a list of so many layers. A cut checkpoint of ours is built without the fields that name code instead.

    Args:
        described: config.json as it is, nested configurations included.
        source: of the checkpoint, for the message.
        own: whether it is of a cut checkpoint of ours; None asks the configuration.

    Raises:
        PrunekitError: names the field and what stands there.
    """
    own = described.get("model_type") == "prunekit" if own is None else own
    for value in described if isinstance(described, list) else ():
        check_described(value, source, own)
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
        check_described(value, source, own)


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
