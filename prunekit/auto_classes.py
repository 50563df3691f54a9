"""Configuration and loader of cut checkpoints for `transformers`' auto classes."""

import json
from pathlib import Path
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from prunekit.errors import PrunekitError

_WEIGHTS = ["*.json", "*.safetensors"]
_HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")
# Options that change nothing: no code, no pickles, low memory, and what AutoModelForCausalLM adds:
_SETTLED = ("trust_remote_code", "code_revision", "use_safetensors", "low_cpu_mem_usage", "adapter_kwargs")


class PrunekitConfig(PreTrainedConfig):
    """config.json of a cut checkpoint.

    Attributes:
        base_config: the uncut model's configuration.
        stages: the cuts, one after the other: group name → units kept.
        per_layer_config: the widths of each layer, `config.per_layer_config[3].intermediate_size`, under the
            names that the family has for them.
    """

    model_type = "prunekit"


class PrunekitForCausalLM:
    """Loader for `AutoModelForCausalLM.from_pretrained`; it returns an object of the family's own class."""

    config_class = PrunekitConfig

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        config: Any = None,
        dtype: Any = None,
        device_map: Any = None,
        output_loading_info: bool = False,
        subfolder: str = "",
        **options: Any,
    ) -> Any:
        """The model of a cut checkpoint.

        Args:
            source: a folder that `prunekit.save` wrote, or a hub id of one.
            config: read from it already; it holds options such as `attn_implementation`.
            dtype: of the weights; the checkpoint's own by default.
            device_map: one device, such as `"cuda:0"` or `{"": 0}`.
            output_loading_info: return a pair with the loading information of `transformers`.
            subfolder: folder of the checkpoint in its source.
            options: where and how to fetch it, such as `revision`.

        Raises:
            PrunekitError: an option is not for cut checkpoints, or what `prunekit.load` raises.
        """
        from prunekit.checkpoint.cut_checkpoints import load_cut

        _check_options(options)
        device = _one_device(device_map)
        chosen = {name: getattr(config, f"_{name}", None) for name in ("attn_implementation", "experts_implementation")}
        folder = _folder(source, subfolder, options)
        told = {name: value for name, value in chosen.items() if value is not None}
        model = load_cut(folder, dtype or options.get("torch_dtype") or "auto", **told)
        model = model if device is None else model.to(device)
        info: dict[str, Any] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
        return (model, info) if output_loading_info else model

    @classmethod
    def _from_config(cls, config: PrunekitConfig, **options: Any) -> Any:
        raise PrunekitError("a cut model has no weights to start from; load one with from_pretrained, or cut another")


def is_cut(source: Any) -> bool:
    """Whether a source is a folder of a cut checkpoint in prunekit's own format."""
    try:
        path = Path(source) / "config.json"
        return path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("model_type") == "prunekit"
    except (TypeError, OSError, ValueError, AttributeError):  # no path, or no such file
        return False


def load_as(cls: Any, source: str | Path, **options: Any) -> Any:
    """The model of a cut checkpoint, loaded with the class of its own family.

    Raises:
        PrunekitError: it is of another class, or what `PrunekitForCausalLM.from_pretrained` raises.
    """
    loaded = PrunekitForCausalLM.from_pretrained(source, **options)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if not isinstance(model, cls):
        raise PrunekitError(
            f"{str(source)!r} is a cut {type(model).__name__}, no {cls.__name__}; load it with prunekit.load or "
            "AutoModelForCausalLM"
        )
    return loaded


def _check_options(options: dict[str, Any]) -> None:
    """Raises an error for options that are not supported."""
    known = {*_HUB, *_SETTLED, "torch_dtype"}
    for name, value in options.items():
        if name not in known and not name.startswith("_") and value not in (None, False, {}):
            raise PrunekitError(
                f"{name}={value!r} is not for cut checkpoints, which load unquantized and onto one device; leave it "
                f"out, or take one of dtype, device_map, attn_implementation, subfolder, {', '.join(_HUB)}"
            )


def _one_device(device_map: Any) -> Any:
    """The device that a map names, or None."""
    import torch

    named: Any = device_map.get("") if isinstance(device_map, dict) and len(device_map) == 1 else device_map
    try:
        return None if device_map is None else torch.device(named)
    except (RuntimeError, TypeError):
        raise PrunekitError(
            f"a cut checkpoint loads onto one device, unquantized, not onto device_map={device_map!r}; give one "
            "such as 'cuda:0'"
        ) from None


def _folder(source: str | Path, subfolder: str, options: dict[str, Any]) -> Path:
    if Path(source).is_dir():
        return Path(source) / subfolder
    from huggingface_hub import snapshot_download

    patterns = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in _WEIGHTS]
    known = {name: options[name] for name in _HUB if name in options}
    return Path(snapshot_download(str(source), allow_patterns=patterns, **known)) / subfolder
