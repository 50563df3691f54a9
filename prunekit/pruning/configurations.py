"""What a cut writes into configurations: its record, new numbers of tokens, and how experts are run."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import nn
from transformers import PreTrainedConfig

from prunekit.account import set_aside
from prunekit.compat import EXPERTS_IMPLEMENTATION as EXPERTS
from prunekit.discovery import Groups
from prunekit.models import name_model
from prunekit.pruning.plans import PruningPlan

RECORD = "prunekit"  # the configuration field with the record of cuts
Stages = list[dict[str, list[int]]]
ONE = ("_token_id", "_token_ids", "_token_index")  # how fields end that hold a token, or a list of some
SOME = ("suppress_tokens", "begin_suppress_tokens")  # any of these tokens
SEQUENCES = ("bad_words_ids", "force_words_ids")  # tokens in a row, or choices between such
BIASES = "sequence_bias"  # pairs of tokens in a row and a number
NO_TOKEN = -1  # where a family wants a number: no token has this one
ROW = 16  # bytes that a row must be a multiple of in torch's grouped products
_GROUPED = "grouped_mm"


def own_configurations(model: nn.Module) -> None:
    """Give a model configurations that no other model holds, in place.

    Modules that shared one share its copy, and what stands inside another stands inside that one's copy.
    """
    copies: dict[int, Any] = {}
    for module in model.modules():
        own = vars(module)
        for name, value in own.items():
            if name == "config" or isinstance(value, PreTrainedConfig):
                own[name] = copy.deepcopy(value, copies)


def record(model: nn.Module, groups: Groups, plan: PruningPlan) -> None:
    """Record a cut in the configuration, so that it can be made again on an empty model.

    The record has `stages`, group name → units kept, one for each cut, and `before`, the uncut values of the fields
    that say something else now.
    """
    vars(model).pop("sparsity_report", None)  # its matrices are no longer these
    set_aside(model)
    config = getattr(model, "config", None)
    if config is None:
        return
    adapters, base = hasattr(model, "get_base_model"), base_of(model)
    path = next(path for path, module in model.named_modules() if module is base)  # adapters go as they are merged
    cut = {
        name.removeprefix(f"{path}." if path else ""): list(units)
        for name, units in plan.keep.items()
        if len(units) < groups[name].n_units and not (adapters and groups[name].kind == "rank")
    }
    earlier = recorded(config) or {"stages": [], "before": {}}
    tokens = [("vocab_size", groups[name].n_units) for name in plan.keep if groups[name].kind == "vocabulary"]
    if cut:
        config.prunekit = {"stages": [*earlier["stages"], cut], "before": {**dict(tokens), **earlier["before"]}}
        if getattr(base.config, "name_or_path", ""):  # it is no longer what lies there, but its tokenizer does
            base.cut_from = base.config.name_or_path
            name_model(base, "")


def recorded(config: Any) -> dict[str, Any]:
    """The record of cuts in a configuration; empty for an uncut model."""
    return getattr(config, RECORD, None) or {}


def base_of(model: Any) -> Any:
    """The model under an adapter wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


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


def usable(model: Any) -> Any:
    """The model, set to run experts one after the other if grouped products do not support their widths.

    Args:
        model: whose configurations are its own; they change in place. Its setting for experts stays,
            where that is anything but grouped products.
    """
    for config in (vars(module.config) for module in model.modules() if _has_odd_experts(module)):
        if config[EXPERTS] == _GROUPED:
            config[EXPERTS] = "eager"
    return model


def fit_for_grouped(model: nn.Module) -> bool:
    """Whether grouped products take the widths of a model's experts; True where it has none."""
    return not any(_has_odd_experts(module) for module in model.modules())


def _has_odd_experts(module: nn.Module) -> bool:
    """Stacked weights of a module that chooses how to run them, (expert, out, in) or (expert, in, out)."""
    if EXPERTS not in getattr(vars(module).get("config"), "__dict__", {}):
        return False
    stacked = [p for p in module.parameters(recurse=False) if p.dim() == 3]
    return any(size * p.element_size() % ROW for p in stacked for size in p.shape[1:])
