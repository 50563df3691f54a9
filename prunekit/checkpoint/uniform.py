"""Whether a cut model can be said in its family's own configuration, found by trying, not by a table of names."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM

Shapes = dict[str, tuple[int, ...]]


def plain_config(model: Any) -> Any | None:  # noqa: ANN401
    """A configuration from which plain `transformers` builds this very model, or None.

    An uncut model has its own. For a cut one, head counts are set by their standard names and the field
    that says the FFN width is found by trying each integer field on one empty layer. The candidate counts
    only if the model built from it has every parameter's shape and, given the same weights, the same logits.

    Args:
        model: as returned by `prune`.
    """
    record = getattr(model.config, "prunekit", None)
    config = copy.deepcopy(model.config)
    if record is None:
        return config
    del config.prunekit
    left = {name: units for stage in record["stages"] for name, units in stage.items()}
    widths = _even_widths(left, config.num_hidden_layers)
    shapes = _shapes(model)
    for candidate in _candidates(config, widths, shapes):
        if _same_model(model, candidate):
            return candidate
    return None


def _even_widths(keep: dict[str, list[int]], n_layers: int) -> dict[str, int] | None:
    """Units left a layer, for each kind that was cut; None where layers differ."""
    widths: dict[str, list[int]] = {}
    for name, units in keep.items():
        widths.setdefault(name.rsplit(":")[-1].split("#")[0], []).append(len(units))
    if any(len(found) != n_layers or len(set(found)) > 1 for found in widths.values()):
        return None
    return {kind: found[0] for kind, found in widths.items()}


def _candidates(config: Any, widths: dict[str, int] | None, shapes: Shapes) -> Iterator[Any]:  # noqa: ANN401
    if widths is None or not set(widths) <= {"kv_head", "ffn_channel"}:
        return
    heads = copy.deepcopy(config)
    if "kv_head" in widths and not _set_heads(heads, widths["kv_head"]):
        return
    if "ffn_channel" not in widths:
        yield heads
        return
    for field in _integer_fields(heads):
        candidate = copy.deepcopy(heads)
        setattr(candidate, field, widths["ffn_channel"])
        if _fits_one_layer(candidate, shapes):
            yield candidate


def _set_heads(config: Any, n_kv_heads: int) -> bool:  # noqa: ANN401
    """Head counts by their standard names; False where the family has no head size of its own."""
    queries, keys = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if queries is None or getattr(config, "head_dim", None) is None:
        return False
    if keys is not None:
        config.num_key_value_heads = n_kv_heads
    config.num_attention_heads = n_kv_heads * (queries // (keys or queries))
    return True


def _integer_fields(config: Any) -> list[str]:  # noqa: ANN401
    return [name for name, value in config.to_dict().items() if value is None or type(value) is int]


def _empty(config: Any) -> nn.Module | None:  # noqa: ANN401
    try:
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
        return model
    except Exception:  # a value the family refuses: any exception of any validator
        return None


def _shapes(model: nn.Module) -> Shapes:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def _fits_one_layer(config: Any, shapes: Shapes) -> bool:  # noqa: ANN401
    small = copy.deepcopy(config)
    small.num_hidden_layers = 1
    built = _empty(small)
    return built is not None and all(shapes.get(name) == shape for name, shape in _shapes(built).items())


def _reads_back(config: Any) -> bool:  # noqa: ANN401
    """False where the family checks its fields when they are read, as LLaMA wants heads that divide the hidden size."""
    try:
        type(config).from_dict(config.to_dict())
        return True
    except Exception:  # a value the family refuses: any exception of any validator
        return False


def _same_model(model: Any, config: Any) -> bool:  # noqa: ANN401
    built: Any = _empty(config)
    if built is None or _shapes(built) != _shapes(model) or not _reads_back(config):
        return False
    built.load_state_dict(model.state_dict(), assign=True)
    built.tie_weights()
    device = next(model.parameters()).device
    tokens = torch.arange(8, device=device)[None] % config.vocab_size
    with torch.no_grad():
        return bool(torch.equal(built.eval().to(device)(tokens).logits, model.eval()(tokens).logits))
