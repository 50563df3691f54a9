"""Updates token ids in configurations after tokens are removed."""

from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn
from transformers import PreTrainedConfig

ONE = ("_token_id", "_token_ids", "_token_index")  # how fields end that hold a token, or a list of some
SOME = ("suppress_tokens", "begin_suppress_tokens")  # any of these tokens
SEQUENCES = ("bad_words_ids", "force_words_ids")  # tokens in a row, or choices between such
BIASES = "sequence_bias"  # pairs of tokens in a row and a number
NO_TOKEN = -1  # where a family wants a number: no token has this one


def renumber_tokens(model: nn.Module, kept: list[int], n_tokens: int) -> None:
    """Write the new vocabulary size and the new numbers of special tokens, in place.

    A special token that is not kept is None from then on, or -1 where the family takes no None; a sequence that it
    stands in is dropped.

    Args:
        model: its embeddings are cut already, or about to be; its configurations are its own.
        kept: ascending token ids that stay; a token's new id is its position here.
        n_tokens: size of the vocabulary before.
    """
    new = {old: position for position, old in enumerate(kept)}
    done: set[int] = set()
    for module in model.modules():
        own = vars(module)
        if own.get("vocab_size") == n_tokens:
            own["vocab_size"] = len(kept)
        if isinstance(module, nn.Embedding) and module.num_embeddings == len(kept) and module.padding_idx is not None:
            own["padding_idx"] = new.get(module.padding_idx)
        for config in configurations(own.get("config"), own.get("generation_config")):
            if id(config) not in done:
                done.add(id(config))
                renumber(config, new, n_tokens, len(kept))


def configurations(*held: Any) -> Iterator[Any]:
    """Configurations, and those that stand inside them."""
    for config in held:
        if hasattr(config, "__dict__"):
            yield config
            yield from configurations(*(c for c in vars(config).values() if isinstance(c, PreTrainedConfig)))


def renumber(config: Any, new: Mapping[int, int], n_before: int, n_after: int) -> None:
    """Write new numbers of tokens into one configuration, in place.

    Args:
        config: of a model, or of its generation.
        new: token id before → token id after; what is not there went.
        n_before: size of the vocabulary before.
        n_after: and after.
    """
    own = vars(config)
    if getattr(config, "vocab_size", None) == n_before:
        config.vocab_size = n_after
    for name, value in list(own.items()):
        if name.endswith(ONE) and type(value) is int:
            _name(config, name, new.get(value))
        elif name.endswith(ONE) or name in (*SOME, *SEQUENCES):
            _name(config, name, _listed(value, new, name in SEQUENCES) if isinstance(value, list) else value)
        elif name == BIASES and value:
            pairs = value.items() if isinstance(value, Mapping) else value
            own[name] = [[[new[t] for t in row], bias] for row, bias in pairs if all(t in new for t in row)] or None


def _name(config: Any, field: str, tokens: Any) -> None:
    """Set a field to these tokens, or to None."""
    try:
        setattr(config, field, tokens)
    except StrictDataclassFieldValidationError:
        vars(config)[field] = NO_TOKEN


def _listed(value: list[Any], new: Mapping[int, int], in_a_row: bool) -> list[Any] | None:
    """A list of tokens, or of lists of them; None if all are removed."""
    if any(isinstance(entry, list) for entry in value):
        return [entry for inner in value if (entry := _listed(inner, new, in_a_row))] or None
    found = [new[token] for token in value if token in new]
    return None if not found or (in_a_row and len(found) < len(value)) else found
