"""Block influence: how much a whole layer changes the direction of the residual stream."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunekit.calibration import check_tokens, in_batches
from prunekit.discovery.constants import leaves
from prunekit.discovery.groups import CoupledGroup
from prunekit.errors import PrunekitError
from prunekit.gradients import Gradients
from prunekit.importance.input_statistics import computing_wide, wide
from prunekit.importance.reduction import check_takes_tokens, tokens_for
from prunekit.models import evaluating


@dataclass(frozen=True)
class BlockInfluence:
    """1 − cos(x, f(x)) of a layer f, averaged over calibration tokens; near 0 if the layer hardly changes its input.

    Source: ShortGPT (Men et al. 2024).
    """

    @property
    def needs_calibration(self) -> bool:
        """True: activations come from a calibration set."""
        return True

    @property
    def label(self) -> str:
        """Short name for tables and legends."""
        return "block influence"

    def unit_scores(
        self, model: nn.Module, groups: tuple[CoupledGroup, ...], calib: Tensor | Gradients | None
    ) -> dict[str, Tensor]:
        """Group name → (1,), from tokens.

        Raises:
            PrunekitError: no tokens, a group that is no whole layer, or activations that are not finite.
        """
        tokens = tokens_for("BlockInfluence()", calib)
        for group in groups:
            if group.kind != "layer":
                raise PrunekitError(
                    f"{group.name!r} is not a whole layer, so it has no block influence; choose groups.of_kind('layer')"
                )
        check_takes_tokens(model)
        tokens = check_tokens(tokens, model)
        turned: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for group in groups:
                layer = model.get_submodule(group.name.removesuffix(":layer"))
                stack.callback(layer.register_forward_hook(_adder(turned, group.name), with_kwargs=True).remove)
            for context in (evaluating(model), computing_wide(model), torch.no_grad()):
                stack.enter_context(context)
            for batch in in_batches(tokens):
                model(input_ids=batch, use_cache=False)  # type: ignore[operator]
        for name, total in turned.items():
            if not bool(total.isfinite()):
                raise PrunekitError(
                    f"the input or output of {name.removesuffix(':layer')} is not finite; check the weights"
                )
        return {name: (total / tokens.numel())[None] for name, total in turned.items()}


def _adder(turned: dict[str, Tensor], name: str) -> Any:
    def add(_module: nn.Module, args: tuple, kwargs: dict, result: Any) -> None:
        after = next(tensor for _, tensor in leaves((result,), {}))
        before = next(t for _, t in leaves(args, kwargs) if t.shape == after.shape and t.is_floating_point())
        cosines = torch.cosine_similarity(wide(before), wide(after), dim=-1)
        turned[name] = turned.get(name, torch.zeros((), dtype=torch.float64)) + (1 - cosines).double().sum().cpu()

    return add
