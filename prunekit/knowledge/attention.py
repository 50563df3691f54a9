"""The attention pattern of one head on one text."""

from contextlib import ExitStack
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from prunekit.checks import Model, Tokenizer, Whole, checked
from prunekit.discovery.parts import outermost_elements
from prunekit.errors import PrunekitError
from prunekit.evaluation.likelihood import check_tokens_fit
from prunekit.evaluation.multiple_choice import encode
from prunekit.knowledge.asking import check_prompt
from prunekit.models import device_of, evaluating, max_positions, written_out

LONGEST = 256  # tokens of a text: the pattern has the square of that many entries


@checked
def attention_pattern(model: Model, tokenizer: Tokenizer, text: str, layer: Whole, head: Whole) -> pd.DataFrame:
    """The attention weights of one query head: how much each token of a text reads from each token before it.

    The eager implementation of attention is used for this call alone, since others do not return weights.

    Args:
        model: a causal language model of transformers; unchanged afterwards.
        tokenizer: the model's own tokenizer.
        text: a text of at most 256 tokens.
        layer: number of the layer, from 0.
        head: number of the query head in that layer, from 0. With grouped-query attention, several query heads share a
            KV head.

    Returns:
        A square table of weights in [0, 1]: one row per token that reads, one column per token that is read. Rows sum
        to 1. Labels are position and token, such as `"3 Anna"`.

    Raises:
        PrunekitError: an empty or too long text, no such layer or head, or a layer that returns no attention weights.
    """
    check_prompt(text)
    ids = encode(tokenizer, text, special=True)
    check_tokens_fit(model, max(ids))
    limit = min(LONGEST, max_positions(model) or LONGEST)
    if len(ids) > limit:
        raise PrunekitError(f"the text has {len(ids)} tokens, and at most {limit} are shown; shorten it")
    weights = _weights(model, torch.tensor([ids], device=device_of(model)), layer)
    if head >= len(weights):
        raise PrunekitError(f"head={head} is not in layer {layer}, whose query heads are 0 to {len(weights) - 1}")
    names = token_labels(tokenizer, ids)
    index, columns = pd.Index(names, name="reads"), pd.Index(names, name="is read")
    return pd.DataFrame(weights[head].numpy(), index=index, columns=columns)


def token_labels(tokenizer: Any, ids: list[int]) -> list[str]:
    """Position and text of each token, such as `"3 Anna"`; no two labels are equal."""
    return [f"{place} {tokenizer.decode([token]).strip() or '␣'}" for place, token in enumerate(ids)]


def _weights(model: nn.Module, ids: Tensor, layer: int) -> Tensor:
    """Attention weights (heads, seq, seq) of one layer, float32 on the CPU."""
    layers = outermost_elements(model)
    if layer >= len(layers):
        raise PrunekitError(f"layer={layer} is not in the model, whose layers are 0 to {len(layers) - 1}")
    found: list[Tensor] = []

    def attend(_module: nn.Module, _args: Any, result: Any) -> None:
        for value in result if isinstance(result, tuple) else ():
            if isinstance(value, Tensor) and value.ndim == 4 and value.shape[-2:] == (ids.shape[1], ids.shape[1]):
                found.append(value[0].detach().float().cpu())

    with ExitStack() as stack:
        for context in (evaluating(model), written_out(model), torch.no_grad()):
            stack.enter_context(context)
        for part in model.get_submodule(layers[layer]).modules():
            stack.callback(part.register_forward_hook(attend).remove)
        model(input_ids=ids, use_cache=False)
    if not found:
        raise PrunekitError(
            f"layer {layer} of this {type(model).__name__} returns no attention weights: it has no attention, or its "
            "family does not return them; choose another layer or model"
        )
    return found[0]
