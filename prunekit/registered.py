"""What `transformers`' auto classes know of cut checkpoints: a configuration, and how its model loads."""

from pathlib import Path
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from prunekit.errors import PrunekitError

_WEIGHTS = ["*.json", "*.safetensors"]


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
    """What `AutoModelForCausalLM.from_pretrained` calls; what it gives is an object of the family's own class."""

    config_class = PrunekitConfig

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        config: Any = None,  # noqa: ANN401
        dtype: Any = None,  # noqa: ANN401
        device_map: Any = None,  # noqa: ANN401
        output_loading_info: bool = False,
        quantization_config: Any = None,  # noqa: ANN401
        **hub: Any,
    ) -> Any:  # noqa: ANN401
        """The model of a cut checkpoint.

        Args:
            source: a folder that `prunekit.save` wrote, or a hub id of one.
            config: read from it already; it holds options such as `attn_implementation`.
            dtype: of the weights; the checkpoint's own by default.
            device_map: one device, such as `"cuda:0"`.
            output_loading_info: return a pair, with what `transformers` tells of a load that went well.
            quantization_config: refused.
            hub: where and how to fetch it, such as `revision`.

        Raises:
            PrunekitError: an option is not for cut checkpoints, or what `prunekit.load` raises.
        """
        from prunekit.checkpoint.loading import load_cut

        if quantization_config is not None or isinstance(device_map, dict) or device_map in ("auto", "balanced"):
            raise PrunekitError(
                "a cut checkpoint loads onto one device, unquantized; leave out quantization_config, and give a "
                "device_map such as 'cuda:0'"
            )
        attention = getattr(config, "_attn_implementation", None)
        options = {} if attention is None else {"attn_implementation": attention}
        model = load_cut(_folder(source, hub), dtype or hub.get("torch_dtype") or "auto", **options)
        model = model if device_map is None else model.to(device_map)
        info: dict[str, Any] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
        return (model, info) if output_loading_info else model

    @classmethod
    def _from_config(cls, config: PrunekitConfig, **options: Any) -> Any:  # noqa: ANN401
        raise PrunekitError("a cut model has no weights to start from; load one with from_pretrained, or cut another")


def _folder(source: str | Path, hub: dict[str, Any]) -> Path:
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    known = {name: hub[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in hub}
    return Path(snapshot_download(str(source), allow_patterns=_WEIGHTS, **known))
