"""Whether a cut model can be said in its family's own configuration, proved by building it from there."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from prunekit.checkpoint.building import empty_model, shapes_of
from prunekit.checkpoint.widths import Cuts, with_width
from prunekit.discovery.preparing import evaluating
from prunekit.discovery.remembered import WRITTEN_OUT


def plain_config(model: Any, cuts: Cuts | None = None) -> Any:  # noqa: ANN401
    """A configuration from which plain `transformers` builds this very model, or None.

    An uncut model has its own. For a cut one, the fields that say its widths are found by trying. The result
    counts only if the model built from it has every parameter's shape and, given the same weights, the same
    logits.

    Args:
        model: as returned by `prune`.
        cuts: what was cut from it, where that is known already.
    """
    if getattr(model.config, "prunekit", None) is None:
        return copy.deepcopy(model.config)
    config = narrowed(cuts or Cuts.of(model))
    return config if _same_model(model, config) else None


def narrowed(cuts: Cuts) -> Any:  # noqa: ANN401
    """The uncut configuration, with each width that the family can say as wide as the widest layer left."""
    config = cuts.config
    for name, groups in cuts.roles.items():
        config = with_width(config, cuts.fields[name], max(cuts.n_left(group) for group in groups))
    return config


def reads_back(config: Any) -> bool:  # noqa: ANN401
    """False where the family checks its fields when they are read, as LLaMA wants heads that divide the hidden size."""
    try:
        type(config).from_dict(config.to_dict())
        return True
    except Exception:  # a value the family refuses: any exception of any validator
        return False


def _same_model(model: Any, config: Any) -> bool:  # noqa: ANN401
    try:
        built = empty_model(config)
    except Exception:  # a value the family refuses: any exception of any validator
        return False
    if shapes_of(built) != shapes_of(model) or not reads_back(config):
        return False
    return has_same_logits(built, model)


def has_same_logits(built: Any, model: Any) -> bool:  # noqa: ANN401
    """Whether an empty model, given the weights of another, computes the same."""
    built.load_state_dict(model.state_dict(), assign=True, strict=False)
    built.tie_weights()
    return torch.equal(first_logits(built.to(next(model.parameters()).device)), first_logits(model))


@torch.no_grad()
def first_logits(model: Any) -> torch.Tensor:  # noqa: ANN401
    """Logits (1, 8, vocabulary) on the first eight tokens of the vocabulary, attention and experts written out."""
    tokens = torch.arange(8, device=next(model.parameters()).device)[None] % model.config.vocab_size
    with evaluating(model), written_out(model):
        return model(tokens, use_cache=False).logits


@contextmanager
def written_out(model: nn.Module) -> Iterator[None]:
    """While open, attention and experts run written out, which is one arithmetic for every width, dtype and device."""
    configs = _configurations(model)
    before = [{name: config[name] for name in WRITTEN_OUT if name in config} for config in configs]
    try:
        for config, names in zip(configs, before, strict=True):
            config.update(dict.fromkeys(names, "eager"))
        yield
    finally:
        for config, names in zip(configs, before, strict=True):
            config.update(names)


def _configurations(model: nn.Module) -> list[dict[str, Any]]:
    """What the configurations of a model's modules hold; a cut layer has one of its own."""
    found = [vars(module).get("config") for module in model.modules()]
    return list({id(config): vars(config) for config in found if hasattr(config, "__dict__")}.values())
