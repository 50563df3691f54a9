"""What else changes when tokens go: their new numbers stand in configurations."""

import copy
from typing import Any

from torch import nn


def renumber_tokens(model: nn.Module, kept: list[int], n_tokens: int) -> None:
    """Write the new vocabulary size and the new numbers of special tokens, in place; configurations are copied first.

    A special token that is not kept is None from then on.

    Args:
        model: its embeddings are cut already, or about to be.
        kept: ascending token ids that stay; a token's new id is its position here.
        n_tokens: size of the vocabulary before.
    """
    new = {old: position for position, old in enumerate(kept)}
    configs: dict[int, Any] = {}
    for module in model.modules():
        own = vars(module)
        if own.get("vocab_size") == n_tokens:
            own["vocab_size"] = len(kept)
        if isinstance(module, nn.Embedding) and module.num_embeddings == len(kept) and module.padding_idx is not None:
            own["padding_idx"] = new.get(module.padding_idx)
        for holder in ("config", "generation_config"):
            config = vars(module).get(holder)
            if config is not None:
                if id(config) not in configs:
                    configs[id(config)] = _renumbered(copy.copy(config), new, n_tokens)
                setattr(module, holder, configs[id(config)])


def _renumbered(config: Any, new: dict[int, int], n_tokens: int) -> Any:  # noqa: ANN401
    if getattr(config, "vocab_size", None) == n_tokens:
        config.vocab_size = len(new)
    for name, value in list(vars(config).items()):
        if name.endswith("_token_id") and isinstance(value, int):
            vars(config)[name] = new.get(value)  # past families that want a number there
        elif name.endswith("_token_id") and isinstance(value, list):
            vars(config)[name] = [new[token] for token in value if token in new] or None
    return config
