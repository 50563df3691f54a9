"""Scores by gradients of one layer at a time, for a model that is larger than memory."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from prunekit.calibration import check_finite, check_tokens
from prunekit.discovery.parts import layer_of, outermost_elements
from prunekit.errors import PrunekitError
from prunekit.gradients import batches_of, frozen
from prunekit.importance.curvature import Curvature, summed_over
from prunekit.importance.fusion import HyWIA
from prunekit.importance.input_statistics import linear_readers
from prunekit.importance.reconstruction import one_reader
from prunekit.importance.scores import SomeGroups
from prunekit.importance.taylor import Taylor
from prunekit.layer_gradients import LayerBackward
from prunekit.models import evaluating

OF_GRADIENTS = (Curvature, Taylor, HyWIA)


def layers_of(model: nn.Module, groups: SomeGroups, importance: Any) -> dict[str, str]:
    """Group name → the path of its layer, for an importance that is computed by gradients.

    Args:
        model: whose weights are not read and may stand on the meta device.
        groups: to score.
        importance: one of `OF_GRADIENTS`.

    Raises:
        PrunekitError: a group that does not lie in one layer alone, or whose weights other layers share; a loss that
            routers add to; or what `Curvature` cannot score.
    """
    config: Any = model.config
    if getattr(config.get_text_config(), "output_router_logits", False):
        raise PrunekitError(
            "config.output_router_logits adds to the loss what the routers of all layers say, so its gradients are not "
            "computed layer by layer; set it to False"
        )
    layers, readers = {*outermost_elements(model)}, linear_readers(model)
    uses: dict[int, set[str | None]] = {}  # parameter → the layers that use it
    for path, parameter in model.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), set()).add(layer_of(path, layers))
    found = {}
    for group in groups:
        layer, *others = set().union(*(uses[id(model.get_parameter(m.parameter))] for m in group.members))
        if layer is None or others:
            raise PrunekitError(
                f"{group.name!r} does not lie in one layer alone, and {importance!r} is computed layer by layer here; "
                "leave out its kind, or take Activation() or Magnitude()"
            )
        if isinstance(importance, Curvature):
            one_reader(group, readers, "Curvature()")
        found[group.name] = layer
    return found


def scores_by_layer(
    model: nn.Module, groups: SomeGroups, importance: Any, calib: Tensor, folder: Path
) -> Iterator[Mapping[str, Tensor]]:
    """Scores of the groups of a layer by gradients of its own, from the last layer to the first.

    Args:
        model: a causal LM; its weights may be views of mapped files.
        groups: to score.
        importance: one of `OF_GRADIENTS`.
        calib: integers (n_samples, seq_len).
        folder: for what the layers read.

    Raises:
        PrunekitError: as `layers_of` and `LayerBackward`, bad tokens, or weights that are not finite.
    """
    where, tokens = layers_of(model, groups, importance), check_tokens(calib, model)
    check_finite(model)
    second = getattr(importance, "order", "first") != "first"
    factor = summed_over(tokens) if isinstance(importance, Curvature) else 1
    with evaluating(model), frozen(model):
        backward = LayerBackward(model, batches_of(tokens, second), folder, factor)
        left = {*where.values()}
        for layer in tqdm(backward, total=len(backward.layers), desc="scoring", unit="layer", leave=False, delay=1):
            if layer in left:
                yield importance.unit_scores(model, tuple(g for g in groups if where[g.name] == layer), backward)
                left.remove(layer)
            if not left:
                return
