"""Writes the configuration of a cut model as far as its family can express it, and checks it by building the model."""

import copy
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

import torch

from prunekit.discovery import CoupledGroup, Groups
from prunekit.errors import PrunekitError
from prunekit.models import configurations_of, empty_model, evaluating, logits_alone, shapes_of, written_out
from prunekit.pruning.configurations import RECORD, base_of, configurations, recorded
from prunekit.pruning.cuts import HEAD_SIZE, Cuts, Fields, with_fields

_SAVE = "save_pretrained"
ROUNDING = 64  # units in the last place: more zeros in a sum change its order and nothing else
COARSE = 0.03  # half precision: what is wrong differs far more


def describe(model: Any, groups: Groups | None = None) -> None:
    """Write the remaining widths into a cut model's configuration, in place.

    A width that is the same in every layer, and that the family has a field for, is written there. Where the family
    builds the very model from its configuration, `transformers` can save it; where not, `save_pretrained` refuses.

    Args:
        model: with a record of its cuts, or without, which is left alone.
        groups: of the uncut model, where they are at hand.
    """
    adapted, model = base_of(model) is not model, base_of(model)
    if not recorded(getattr(model, "config", None)):
        return
    vars(model).pop(_SAVE, None)
    try:
        cuts = Cuts.of(model, groups=None if adapted else groups)
    except PrunekitError as error:
        vars(model)[_SAVE] = partial(_refuse, type(model).__name__, str(error))
        return
    _write_widths(model, cuts)
    _share_again(model)
    built = _built(model, _without_record(model.config))
    if built is None:
        vars(model)[_SAVE] = partial(_refuse, type(model).__name__, "; ".join(unsaid(cuts)))
    elif not adapted:
        _remember_alike(model, built)


def _refuse(family: str, why: str, *_: Any, **__: Any) -> NoReturn:
    """Replaces `save_pretrained` of a model that `transformers` could not load again."""
    raise PrunekitError(
        f"save_pretrained would write a folder that does not load: the configuration of {family} cannot express this "
        f"cut ({why}); use prunekit.save(model, folder)"
    )


def _write_widths(model: Any, cuts: Cuts) -> None:
    """The widths that can be said, in every configuration that the model holds."""
    said, uncut = model.config.get_text_config(), cuts.config.get_text_config()
    size = {HEAD_SIZE: uncut.head_dim} if getattr(uncut, HEAD_SIZE, None) != getattr(said, HEAD_SIZE, None) else {}
    values = _sayable(with_fields(_without_record(model.config), size), cuts)
    old = {field: getattr(said, field, None) for field in (*size, *values)}
    held = [part for part in configurations(*configurations_of(model)) if type(part) is type(said)]
    before, computed = [dict(vars(part)) for part in held], _logits_if_any(model)
    if computed is None:
        return
    for part in held:
        for field, value in {**size, **values}.items():
            if getattr(part, field, None) == old[field]:
                setattr(part, field, value)
    if torch.equal(first_logits(model), computed):  # else some module reads these fields for something else
        record = recorded(model.config)
        uncut_values = {field: getattr(uncut, field) for field in values}
        model.config.prunekit = {**record, "before": {**uncut_values, **record.get("before", {})}}
        return
    for part, own in zip(held, before, strict=True):
        vars(part).clear()
        vars(part).update(own)


def _share_again(model: Any) -> None:
    """Let modules that say the same as the model's configuration hold that, so that later settings reach them too."""
    held = {id(part): part for part in configurations(model.config)}
    for module in model.modules():
        own = vars(module).get("config")
        alike = (part for part in held.values() if type(part) is type(own) and _said(part) == _said(own))
        if own is not None and id(own) not in held:
            module.config = next(alike, own)


def _said(config: Any) -> dict[str, Any]:
    """Fields of a configuration, but for those that only the model's own has."""
    return {name: value for name, value in vars(config).items() if name not in (RECORD, "_name_or_path")}


def _logits_if_any(model: Any) -> torch.Tensor | None:
    """A model's logits; None where it has no weights, or does not run as it lies, so that nothing can be compared."""
    with suppress(Exception):  # of whatever code moves its weights about
        computed = first_logits(model)
        return None if computed.is_meta else computed
    return None


def _sayable(config: Any, cuts: Cuts) -> Fields:
    """Field → value of each width equal in all layers: all of them if they read back, else each that reads back."""
    widths = [_fields_of(cuts, name) for name in cuts.roles]
    values = {field: value for fields in widths for field, value in fields.items()}
    if reads_back(with_fields(config, values)):
        return values
    taken: Fields = {}
    for fields in widths:
        taken |= fields if reads_back(with_fields(config, taken | fields)) else {}
    return taken


def _fields_of(cuts: Cuts, role: str) -> Fields:
    counts = {cuts.n_left(group) for group in cuts.roles[role]}
    return {field: next(iter(counts)) * n for field, n in cuts.fields[role].items()} if len(counts) == 1 else {}


def _remember_alike(model: Any, built: Any) -> None:
    """Integers that modules remember, as the family's own code sets them; the cut solved those of one trace only."""
    right = dict(built.named_modules())
    for path, module in model.named_modules():
        own = vars(module)
        for name, value in vars(right[path]).items() if path in right else ():  # a module may have been added
            if type(value) is int and type(own.get(name)) is int:
                own[name] = value


def plain_config(model: Any) -> Any:
    """The configuration from which plain `transformers` builds this very model, or None.

    An uncut model has its own. That of a cut one counts only if the model built from it has every parameter's shape
    and, given the same weights, the same logits.
    """
    config = _without_record(model.config)
    if not recorded(model.config):
        return config
    known = _SAVE in vars(model)  # that it cannot: nothing but another cut changes that
    return config if not known and _built(model, config) is not None else None


def _without_record(config: Any) -> Any:
    plain = copy.copy(config)
    vars(plain).pop(RECORD, None)  # before the deep copy, for it has a number for each unit that is left
    return copy.deepcopy(plain)


def unsaid(cuts: Cuts) -> list[str]:
    """Widths that the family's configuration cannot express, such as `"ffn_channel: 396 to 397 of 512 in each layer"`.

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
    fields = _fields_of(cuts, name)
    return bool(fields) and reads_back(with_fields(cuts.config, fields))


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


def _built(model: Any, config: Any) -> Any:
    """The model of a configuration, if it is this very one; None if not. Under adapters only shapes are compared."""
    found, adapted = shapes_of(model), False
    with suppress(Exception):  # a value that the family refuses, or does not run with: any exception of any code
        built = empty_model(config)
        shapes = shapes_of(built)
        if found.keys() != shapes.keys():  # adapters, perhaps
            found = {name.replace(".base_layer.", "."): shape for name, shape in found.items() if ".lora_" not in name}
            adapted = True
        if found == shapes and reads_back(config) and (adapted or has_same_logits(built, model)):
            return built
    return None


def has_same_logits(built: Any, model: Any) -> bool:
    """Whether an empty model, given the weights of another, computes the same."""
    built.load_state_dict(model.state_dict(), assign=True, strict=False)
    built.tie_weights()
    return torch.equal(first_logits(built.to(next(model.parameters()).device)), first_logits(model))


@torch.no_grad()
def first_logits(model: Any) -> torch.Tensor:
    """Logits (1, 8, vocabulary) on the first eight tokens, with eager attention and experts."""
    tokens = torch.arange(8, device=next(model.parameters()).device)[None] % model.config.get_text_config().vocab_size
    with evaluating(model), written_out(model):
        return model(tokens, **logits_alone(model)).logits


def relative_difference(a: Any, b: Any) -> float:
    """‖a − b‖ / ‖b‖ of two models' logits on the same tokens."""
    found, expected = first_logits(a).double(), first_logits(b).double()
    return float((found - expected).norm() / expected.norm())


def tolerance(dtype: torch.dtype) -> float:
    """Allowed relative difference of two computations of the same logits."""
    return min(ROUNDING * torch.finfo(dtype).eps, COARSE)
