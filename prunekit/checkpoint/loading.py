"""Loading checkpoints, without pickles.

A cut checkpoint of `model_type: "prunekit"` holds the uncut configuration and the units kept, cut after cut. It loads
by building the uncut model without weights and cutting it the same way, so it can never be mistaken for a plain one.
"""

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from prunekit.discovery import Groups, discover
from prunekit.errors import PrunekitError
from prunekit.pruning import PruningPlan, prune
from prunekit.world import load as load_world

MODEL_TYPE = "prunekit"
FORMAT = 1


def load(
    source: str | Path, *, dtype: torch.dtype | str = "auto", trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer, in evaluation mode on the CPU.

    Args:
        source: `"world"` for the embedded model, a folder (an existing one wins), or a hub id.
        dtype: of the weights; the checkpoint's own by default.
        trust_remote_code: run code that comes with the checkpoint; off unless you turn it on.

    Returns:
        The model, and its tokenizer or None where the folder has none.

    Raises:
        PrunekitError: there is no checkpoint, or only a pickled one.
    """
    if str(source) == "world" and not Path(source).exists():
        model, tokenizer = load_world()
        return _in_dtype(model, dtype), tokenizer
    folder = Path(source)
    if folder.exists():
        _check_folder(folder)
        if json.loads((folder / "config.json").read_text()).get("model_type") == MODEL_TYPE:
            model = _load_cut(folder, dtype).eval()
            return model, load_tokenizer(str(source), trust_remote_code, model.config)
    elif folder.is_absolute() or str(source).startswith(".") or str(source).count("/") > 1:
        raise PrunekitError(f"{str(source)!r} does not exist; give a checkpoint folder, a hub id or 'world'")
    return _load_plain(str(source), dtype, trust_remote_code).eval(), load_tokenizer(str(source), trust_remote_code)


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise PrunekitError(f"{str(folder)!r} is no checkpoint: it has no config.json; give the folder that holds it")
    try:
        json.loads((folder / "config.json").read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PrunekitError(
            f"{str(folder / 'config.json')!r} is not JSON ({error}); restore it from its source"
        ) from None
    if not list(folder.glob("*.safetensors")):
        pickled = ", ".join(p.name for p in folder.glob("*.bin")) or "none"
        raise PrunekitError(
            f"{str(folder)!r} has no safetensors weights (pickled ones: {pickled}); prunekit reads no pickles, "
            "so convert them to safetensors first"
        )


def _load_plain(source: str, dtype: torch.dtype | str, trust_remote_code: bool) -> nn.Module:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # transformers, the hub client and safetensors each raise kinds of their own
        raise PrunekitError(
            f"cannot load {source!r} as a causal language model ({type(error).__name__}: {_first_line(error)}); "
            "give a folder with config.json and safetensors, or a hub id that can be reached"
        ) from error
    if info["missing_keys"] or info["mismatched_keys"]:
        names = ", ".join(str(name) for name in [*info["missing_keys"], *info["mismatched_keys"]][:4])
        raise PrunekitError(
            f"{source!r} lacks weights, or has some of the wrong shape: {names}; restore it from its source"
        )
    return model


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def load_tokenizer(source: str, trust_remote_code: bool, config: Any = None) -> Any:  # noqa: ANN401
    """The tokenizer of a folder or hub id; None where a folder has none."""
    if Path(source).is_dir() and not list(Path(source).glob("tokenizer*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(source, config=config, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise PrunekitError(f"cannot load the tokenizer of {source!r} ({type(error).__name__}: {error})") from error


def _load_cut(folder: Path, dtype: torch.dtype | str) -> Any:  # noqa: ANN401
    saved = json.loads((folder / "config.json").read_text())
    if saved.get("format") != FORMAT:
        raise PrunekitError(f"{str(folder)!r} has format {saved.get('format')!r}; this prunekit reads {FORMAT}")
    model = cut_again(saved["base_config"], saved["stages"])
    _fill(model, folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.config.name_or_path = str(folder)
    return _in_dtype(model, dtype)


def cut_again(base_config: dict[str, Any], stages: list[dict[str, list[int]]]) -> Any:  # noqa: ANN401
    """The uncut model, built without weights, with every recorded cut made again in order."""
    with init_empty_weights():
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**base_config))
    model.tie_weights()
    for keep in stages:
        model = prune(model, _recorded_plan(discover(model), keep), inplace=True)
    return model


def _in_dtype(model: nn.Module, dtype: torch.dtype | str) -> nn.Module:
    """Weights in another dtype; buffers, such as rotary frequencies, keep their own, as in a plain load."""
    if dtype != "auto":
        wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if not isinstance(wanted, torch.dtype):
            raise PrunekitError(f"dtype={dtype!r} is not known; give 'auto' or one such as torch.float32 or 'float16'")
        for p in model.parameters():
            p.data = p.data.to(wanted)
    return model


def _recorded_plan(groups: Groups, keep: dict[str, list[int]]) -> PruningPlan:
    return PruningPlan(keep, {name: groups[name].n_units for name in keep}, groups.n_parameters, groups.n_parameters)


def _fill(model: Any, folder: Path) -> None:  # noqa: ANN401
    """Give an empty model its weights; tied ones are stored once."""
    state: dict[str, torch.Tensor] = {}
    try:
        for shard in sorted(folder.glob("*.safetensors")):
            state |= load_file(shard)
        model.load_state_dict(state, strict=False, assign=True)
    except SafetensorError as error:
        raise PrunekitError(f"the weights in {str(folder)!r} cannot be read ({error}); restore them") from None
    except RuntimeError as error:
        raise PrunekitError(f"the weights in {str(folder)!r} do not fit its config.json: {error}") from None
    model.tie_weights()
    empty = [name for name, p in model.named_parameters() if p.is_meta]
    if empty:
        raise PrunekitError(f"{str(folder)!r} lacks the weights of {', '.join(empty[:4])}; restore it from its source")
