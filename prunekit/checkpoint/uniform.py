"""Whether a cut model can be said in its family's own configuration, proved by building it from there."""

import copy
from collections.abc import Iterable
from typing import Any

import torch

from prunekit.checkpoint.building import empty_model, shapes_of
from prunekit.checkpoint.widths import Cuts, with_width
from prunekit.discovery import CoupledGroup
from prunekit.models import evaluating
from prunekit.pruning.recording import written_out


def plain_config(model: Any, cuts: Cuts | None = None) -> Any:
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


def narrowed(cuts: Cuts) -> Any:
    """The uncut configuration, with each width that the family can say as wide as the widest layer left."""
    config = cuts.config
    for name, groups in cuts.roles.items():
        config = with_width(config, cuts.fields[name], max(cuts.n_left(group) for group in groups))
    return config


def unsaid(cuts: Cuts) -> list[str]:
    """What of a cut its family has no words for, such as `"ffn_channel: 396 to 397 of 512 in each layer"`.

    A width that differs between layers, that no field says, or whose value the family refuses, blocks that went, and
    biases that came. Where each can be said and only all together cannot, all are named.
    """
    gone = [name for name, units in cuts.left.items() if not units]
    widths = [groups for name, groups in cuts.roles.items() if not _can_say(cuts, name)]
    added = [f"bias: {len(cuts.biases)} linear layers were given one"] if cuts.biases else []
    widths = widths if widths or gone or added else list(cuts.roles.values())
    kinds = [name.rpartition(":")[0].rpartition(".")[2] if name.endswith(":block") else "layer" for name in gone]
    told = [_width(cuts, [group for group in groups if not _inside(group, gone)]) for groups in widths]
    return list(dict.fromkeys([*told, *(f"{kind}: {kinds.count(kind)} went" for kind in kinds), *added]))


def _can_say(cuts: Cuts, name: str) -> bool:
    counts, fields = {cuts.n_left(group) for group in cuts.roles[name]}, cuts.fields[name]
    return len(counts) == 1 and bool(fields) and reads_back(with_width(cuts.config, fields, counts.pop()))


def _inside(group: CoupledGroup, gone: Iterable[str]) -> bool:
    return any(f"{group.name.partition(':')[0]}.".startswith(f"{name.rpartition(':')[0]}.") for name in gone)


def _width(cuts: Cuts, groups: list[CoupledGroup]) -> str:
    left, whole = ({n(group) for group in groups} for n in (cuts.n_left, lambda group: group.n_units))
    of_layers = len({group.layer for group in groups}) == len(groups)
    where = "" if len(groups) == 1 else f" in each {'layer' if of_layers else 'group'}"
    return f"{groups[0].kind}: {_span(left)} of {_span(whole)}{where}"


def _span(counts: set[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def reads_back(config: Any) -> bool:
    """False where the family checks its fields when they are read, as LLaMA wants heads that divide the hidden size."""
    try:
        type(config).from_dict(config.to_dict())
        return True
    except Exception:  # a value the family refuses: any exception of any validator
        return False


def _same_model(model: Any, config: Any) -> bool:
    try:
        built = empty_model(config)
    except Exception:  # a value the family refuses: any exception of any validator
        return False
    if shapes_of(built) != shapes_of(model) or not reads_back(config):
        return False
    return has_same_logits(built, model)


def has_same_logits(built: Any, model: Any) -> bool:
    """Whether an empty model, given the weights of another, computes the same."""
    built.load_state_dict(model.state_dict(), assign=True, strict=False)
    built.tie_weights()
    return torch.equal(first_logits(built.to(next(model.parameters()).device)), first_logits(model))


@torch.no_grad()
def first_logits(model: Any) -> torch.Tensor:
    """Logits (1, 8, vocabulary) on the first eight tokens of the vocabulary, attention and experts written out."""
    tokens = torch.arange(8, device=next(model.parameters()).device)[None] % model.config.vocab_size
    with evaluating(model), written_out(model):
        return model(tokens, use_cache=False).logits
