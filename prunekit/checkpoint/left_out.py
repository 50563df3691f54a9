"""Checks that nothing of a checkpoint is left out for which its model should have a place."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn

from prunekit.errors import PrunekitError


def check_left_out(source: str, model: Any, unexpected: Iterable[str]) -> None:
    """Raise an error for stored weights that belong to a layer, or a module, of which the configuration has less.

    Others are left out as `transformers` does, such as those of a part for pictures.
    """
    modules, base = dict(model.named_modules()), f"{model.base_model_prefix}."
    for key in sorted(map(str, unexpected)):
        if any(map(partial(_belongs, modules), (key, base + key, key.removeprefix(base)))):
            raise PrunekitError(
                f"{source!r} holds {key!r}, for which the model of its config.json has no place (too few layers, or no "
                "biases); restore both from one source"
            )


def check_ties(source: str, model: Any) -> None:
    """Raise an error where a configuration ties two matrices that are stored with different values.

    `transformers` leaves them untied then, so that the model is not what its configuration says.
    """
    if is_falsely_tied(model):
        raise PrunekitError(
            f"config.json of {source!r} says tie_word_embeddings, but two different matrices are stored; set it to "
            "false, or restore both from one source"
        )


def is_falsely_tied(model: Any) -> bool:
    """Whether the configuration ties the embedding and the head, and they are two matrices."""
    named, head = "tie_word_embeddings", model.get_output_embeddings()
    asked = getattr(model.config.get_text_config(), named, getattr(model.config, named, False))
    tied = asked and getattr(model, "_tied_weights_keys", None) and head is not None
    return bool(tied) and head.weight is not model.get_input_embeddings().weight


def _belongs(modules: dict[str, nn.Module], key: str) -> bool:
    """Whether a tensor would stand behind the last element of a list of the model, or in one of its linear layers."""
    parts = key.split(".")
    for place, part in enumerate(parts):
        above = modules.get(".".join(parts[:place]))
        if part.isdecimal() and isinstance(above, nn.ModuleList) and int(part) >= len(above):
            return True
    owner = modules.get(".".join(parts[:-1]))
    return owner is not None and not owner._modules and parts[-1] in ("weight", "bias") and bool(owner._parameters)
