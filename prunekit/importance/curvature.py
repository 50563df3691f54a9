"""Curvature importance: the second-order rise of the loss when a unit is removed and its consumer layer re-fitted."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prunekit.checks import Positive, check_fields
from prunekit.discovery.groups import CoupledGroup
from prunekit.errors import PrunekitError
from prunekit.gradients import frozen, run_backward, source_of
from prunekit.importance.input_statistics import Reader, linear_readers, wide
from prunekit.importance.reconstruction import costs_of_units, one_reader
from prunekit.importance.scores import GradientSource, Scores, SomeGroups, tokens_for
from prunekit.layer_gradients import LayerBackward
from prunekit.models import evaluating

RIDGE = 0.3
HEAVY = 2.0  # times the median; larger token gradients are clipped to this size
BLOCKS = 24  # parts in which the units of a large group are removed; small groups lose one at a time
CAUTION = {"kv_head": 4.0, "query_head": 4.0}


class Sums(NamedTuple):
    """Input and gradient statistics of one linear layer.

    Attributes:
        gram: E[x xᵀ] over calibration tokens, (n_in, n_in), x its input.
        gradients: E[g gᵀ], (n_out, n_out), g the clipped gradient of the summed loss at its output.
    """

    gram: Tensor
    gradients: Tensor


@dataclass(frozen=True)
class Curvature:
    """The rise of the loss in nats per token when a unit is removed and its consumer layer re-fitted.

    With X the inputs of the consumer layer (o_proj, down_proj), W its weights (n_in, n_out), A = E[x xᵀ] with its
    diagonal raised by the ridge, and G = E[g gᵀ] of the gradients by its outputs, the loss has the curvature A ⊗ G
    (K-FAC). Then a unit u costs ½ tr(W_uᵀ [(A⁻¹)_uu]⁻¹ W_u G). The cheapest units of a group go first, a few at a time;
    then W and A⁻¹ are updated. A unit's score is its cost at removal, divided by the share of the group still left.

    All scores are in one unit, so that groups compete: `plan` takes them with `ranking="global"` by default. Early
    layers and layers that write massive activations are spared because of their cost, not their position.

    Attributes:
        ridge: share added to A's diagonal; above 0. It shrinks correlations seen in few tokens.

    Source: LLM Surgeon (van der Ouderaa et al., ICLR 2024), Eq. 6 and 8; K-FAC (Martens and Grosse 2015).
        Differs: one step, not many (on SmolLM2 four steps were no better than one); the ridge is relative to each
        input, not to their mean; gradients of more than twice the median token's size are held to that (on Gemma 3 the
        first token's is 100 to 300 times the median, and would decide alone); costs are divided by the share left, and
        those of heads multiplied by four. The last two are not derived: on SmolLM2 the first took perplexity at 20%
        from 87 to 82, and without the second a plan takes heads that short windows of C4 do not miss and WikiText-2
        does (156).
    """

    ridge: Positive = RIDGE

    def __post_init__(self) -> None:
        check_fields(self)

    needs_calibration = True  # activations and gradients come from a calibration set
    label = "curvature"

    def unit_scores(self, model: nn.Module, groups: SomeGroups, calib: GradientSource) -> dict[str, Tensor]:
        """Group name → (n_units,), from tokens.

        Raises:
            PrunekitError: no tokens, a group that no linear layer or more than one consumes, or activations or
                gradients that are not finite.
        """
        tokens = calib if isinstance(calib, LayerBackward) else tokens_for("Curvature()", calib)
        kinds = {group.name: group.kind for group in groups}
        costs = costs_of_units(
            model,
            groups,
            "Curvature()",
            lambda readers: gather_sums(model, tokens, readers),
            lambda sums, weight, units: costs_in_order(sums, weight, units, self.ridge),
        )
        scores = {name: values * CAUTION.get(kinds[name], 1.0) for name, values in costs.items()}
        return Scores(scores, label=self.label, kinds=kinds, ranking="global")


def applies(model: nn.Module, groups: Iterable[CoupledGroup]) -> bool:
    """Whether each group has one consumer layer, so that `Curvature` can score it."""
    readers = linear_readers(model)
    try:
        for group in groups:
            one_reader(group, readers, "Curvature()")
    except PrunekitError:
        return False
    return True


def gather_sums(model: nn.Module, calib: Tensor | LayerBackward, readers: Mapping[str, Reader]) -> dict[str, Sums]:
    """Input and gradient statistics of linear layers, in one pass over the calibration set.

    No gradient of a weight is computed: the backward pass costs about as much as the forward one.

    Args:
        model: a causal LM; unchanged afterwards.
        calib: integers (n_samples, seq_len); or a backward pass at the layer of the readers, whose factor is
            `summed_over`.
        readers: parameter name → the linear layer with that weight.

    Returns:
        Parameter name → its sums, float32 at least, on the weight's device.

    Raises:
        PrunekitError: bad tokens, or a loss, activation or gradient that is not finite.
    """
    tokens, source = source_of(model, calib, second=False)
    sums: dict[str, Sums] = {}
    with evaluating(model), frozen(model), _watching(model, readers, sums), torch.enable_grad():
        run_backward(model, source, summed_over(tokens))
    for name in readers:
        if name not in sums or not all(bool(total.isfinite().all()) for total in sums[name]):
            raise PrunekitError(f"the inputs or gradients of {name} are not finite, or it never ran; check the weights")
    return {name: Sums(*(total.div_(tokens.numel()) for total in each)) for name, each in sums.items()}


def summed_over(tokens: Tensor) -> int:
    """The factor from a sample's mean loss to its sum over tokens, of tokens (n_samples, seq_len)."""
    return tokens.shape[1] - 1


@contextmanager
def _watching(model: Any, readers: Mapping[str, Reader], sums: dict[str, Sums]) -> Iterator[None]:
    """A context in which every backward pass adds to the sums; the graph starts at the embeddings."""

    def begin(_module: nn.Module, _args: Any, result: Tensor) -> Tensor:
        return result.detach().requires_grad_(True)

    def watch(name: str) -> Any:
        def note(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], result: Tensor) -> None:
            (x,) = (*args, *kwargs.values())
            if result.requires_grad:
                x = x.detach().flatten(0, -2)
                result.register_hook(lambda g: _add(sums, name, x, g.detach().flatten(0, -2)))

        return note

    with ExitStack() as hooks:
        hooks.callback(model.get_input_embeddings().register_forward_hook(begin).remove)
        for name, reader in readers.items():
            for module in reader.modules:
                hooks.callback(module.register_forward_hook(watch(name), with_kwargs=True).remove)
        yield


def _add(sums: dict[str, Sums], name: str, x: Tensor, g: Tensor) -> None:
    """Add a batch: inputs (n_tokens, n_in) and gradients (n_tokens, n_out)."""
    x, g = wide(x), _held(wide(g))
    new = Sums(x.T @ x, g.T @ g)
    sums[name] = Sums(*(old.add_(more) for old, more in zip(sums[name], new, strict=True))) if name in sums else new


def _held(g: Tensor) -> Tensor:
    """Gradients (n_tokens, n_out), clipped to `HEAVY` times the median length."""
    sizes = g.norm(dim=1, keepdim=True)
    return g * (HEAVY * sizes.median() / sizes.clamp_min(torch.finfo(g.dtype).tiny)).clamp_max(1)


def costs_in_order(sums: Sums, weight: Tensor, units: Tensor, ridge: float) -> Tensor:
    """Cost of each unit in nats per token, when the cheapest are removed first.

    Args:
        sums: statistics of the consumer layer.
        weight: its weights, (n_in, n_out).
        units: (n_units, width), the inputs of each unit.
        ridge: as in `Curvature`.

    Returns:
        float64 (n_units,) on the CPU; non-decreasing in the order of removal.
    """
    gram, curve = sums.gram.double(), sums.gradients.double()
    width, n = units.shape[1], len(units)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(raised(gram, ridge)))
    order = units.flatten().to(gram.device)  # inputs by unit; inputs of no unit always stay
    inverse, weight = inverse[order][:, order], weight[order].double()
    bent = weight @ curve  # kept up to date like the weight, which is cheaper than a product with G in each step
    left, costs, highest = torch.arange(n), torch.zeros(n, dtype=torch.float64), 0.0
    step = max(1, n // BLOCKS)
    while len(left):
        cost = _costs(inverse, weight, bent, width)
        chosen = cost.argsort(stable=True)[: min(step, len(left))].cpu()
        scaled = cost.cpu()[chosen] * (n / len(left))
        costs[left[chosen]] = scaled.clamp_min(highest)
        highest = float(costs[left[chosen]].max())
        stays = torch.ones(len(left), dtype=torch.bool)
        stays[chosen] = False
        left = left[stays]
        if len(left):
            inverse, weight, bent = _without(inverse, weight, bent, chosen, stays, width)
    return costs


def raised(gram: Tensor, ridge: float) -> Tensor:
    """XᵀX with a share added to its diagonal, so that it is invertible, even for zero inputs."""
    diagonal = gram.diagonal()
    least = torch.finfo(gram.dtype).eps * diagonal.mean().clamp_min(torch.finfo(gram.dtype).tiny ** 0.5)
    return gram + torch.diag(ridge * diagonal + least)


def _costs(inverse: Tensor, weight: Tensor, bent: Tensor, width: int) -> Tensor:
    """½ tr(W_uᵀ [(A⁻¹)_uu]⁻¹ W_u G) of each remaining unit, (n_left,); `bent` is W G."""
    if width == 1:
        return (bent * weight).sum(1) / inverse.diagonal() / 2
    blocks = inverse.unflatten(0, (-1, width)).unflatten(2, (-1, width)).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    rows, turned = (each.unflatten(0, (-1, width)) for each in (weight, bent))  # (n_left, width, n_out)
    within = torch.stack([torch.cholesky_inverse(torch.linalg.cholesky(block)) for block in blocks])
    return ((within @ turned) * rows).sum((1, 2)) / 2


def _without(
    inverse: Tensor, weight: Tensor, bent: Tensor, chosen: Tensor, stays: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A⁻¹, W and W G after removing some units and re-fitting the rest."""
    inputs = torch.arange(len(weight)).view(-1, width)
    gone, rest = inputs[chosen].flatten().to(weight.device), inputs[stays].flatten().to(weight.device)
    lower = torch.linalg.cholesky(inverse[gone][:, gone])
    taken = torch.cholesky_solve(inverse[gone][:, rest], lower).T  # (n_rest, n_gone)
    weight, bent = (each[rest].addmm(taken, each[gone], alpha=-1) for each in (weight, bent))
    return inverse[rest][:, rest].addmm_(taken, inverse[gone][:, rest], alpha=-1), weight, bent
