"""Decides what a checkpoint folder holds, from its configuration alone, before any work."""

from pathlib import Path
from typing import Any

import transformers

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


def check_kind(folder: Path, config: dict[str, Any]) -> None:
    """Raise an error for a folder that holds something else than a plain language model.

    Args:
        folder: of the checkpoint.
        config: its config.json.

    Raises:
        PrunekitError: its weights are quantized, or it is a model of another kind, such as a classifier.
    """
    quantization = _quantization(config)
    if quantization is not None:
        raise _quantized(folder, config, quantization)
    _check_architecture(folder, config)


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
        loader = _loader_of(config.get("model_type"))
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


def _check_architecture(folder: Path, config: dict[str, Any]) -> None:
    """Raise an error for models of another kind, such as an encoder, which `transformers` would load.

    A model of pictures and text is taken where `transformers` has a class for it.
    """
    names = [str(name) for name in config.get("architectures") or []]
    if not names or set(names) & _classes(config.get("model_type")) or _is_foreign(names, config):
        return
    said, give = f"{str(folder)!r} is a {names[0]}", "give one that AutoModelForCausalLM loads"
    if hasattr(transformers, names[0]):
        raise PrunekitError(f"{said}, no causal language model; {give}")
    raise PrunekitError(
        f"{said}, which transformers does not have; {give}, or, if this is one, write its class, such as "
        "LlamaForCausalLM, into architectures of its config.json"
    )


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


def _is_foreign(names: list[str], config: dict[str, Any]) -> bool:
    """Whether a class is of no release of transformers, and a language model by its name or by code of its own."""
    known = any(hasattr(transformers, name) for name in names)
    named = any(name.endswith(_LANGUAGE_MODELS) for name in names)
    return not known and (named or "AutoModelForCausalLM" in (config.get("auto_map") or {}))


def _listed(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def _loader_of(model_type: Any) -> str:
    only_pictured = model_type in IMAGE_TEXT_MODELS and model_type not in CAUSAL_MODELS
    return "AutoModelForImageTextToText" if only_pictured else "AutoModelForCausalLM"
