"""LoRA recovery: trains low-rank updates of the projections and merges them at the end."""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor, nn

from prunekit.annotations import Rule, is_integer, is_texts
from prunekit.checks import Count, Epochs, Length, NotNegative, Positive, Seed, Share
from prunekit.discovery.parts import uses_of
from prunekit.errors import PrunekitError
from prunekit.recovery.settings import TrainingSettings
from prunekit.sparsity.zero_masks import plain_lora_weight

if TYPE_CHECKING:
    from peft import PeftModel

Rank = Annotated[int, Rule(lambda value: is_integer(value) and 1 <= value <= 2**16, "an integer from 1 to 2**16")]
Targets = Annotated[tuple[str, ...], Rule(is_texts, "names of modules, such as ('q_proj', 'v_proj')")]


@dataclass(frozen=True)
class LoRA(TrainingSettings):
    """Settings of low-rank adaptation: W + (alpha / r)·B·A, with A and B trained.

    Rank, alpha, dropout and targets are LLM-Pruner's. Learning rate, batch and warm-up suit small models
    and some hundred thousand tokens; `LoRA.paper()` has the paper's, for billions of parameters.

    Attributes:
        r: rank of the update.
        alpha: the update's scale is alpha / r.
        dropout: on the input of A, in [0, 1).
        targets: module names (or their ends, such as `"q_proj"`) to adapt; None takes every linear
            projection except the head, which on LLaMA are the paper's seven.
        learning_rate: peak, reached after warm-up and then falling linearly to 0.
        batch_size: windows an optimiser step; None takes 8, or fewer where the data would give less than 32
            steps an epoch.
        epochs: passes over the data.
        max_steps: stop after this many optimiser steps, and repeat the data to get there; by default `epochs` say it.
        warmup: optimiser steps of warm-up (1 or more), or their share of all steps (below 1).
        seq_len: tokens a window, where the data is text.
        seed: initial A, dropout, order of the data.

    Raises:
        PrunekitError: a value that cannot be.

    Source: LLM-Pruner, section 4.1 and its released `post_training.py`.
    """

    r: Rank = 8
    alpha: Positive = 16
    dropout: Share = 0.05
    targets: Targets | None = None
    learning_rate: Positive = 3e-3
    batch_size: Count | None = None
    epochs: Epochs = 2
    max_steps: Count | None = None
    warmup: NotNegative = 0.05
    seq_len: Length = 128
    seed: Seed = 0

    @classmethod
    def paper(cls, seed: int = 0) -> "LoRA":
        """LLM-Pruner's own settings, for models of billions of parameters and 50,000 instructions.

        Source: LLM-Pruner's `post_training.py`: learning rate 1e-4, batch 64, 2 epochs, warm-up 100 steps,
            cut-off 256 tokens. Differs: windows of the joined text, where the reference pads each example.
        """
        return cls(learning_rate=1e-4, batch_size=64, epochs=2, warmup=100, seq_len=256, seed=seed)


def attach(model: nn.Module, method: LoRA) -> "PeftModel":
    """Wrap a model's projections in LoRA pairs, in place; B starts at 0, so the output does not change yet.

    Raises:
        PrunekitError: no such target, a target that shares its weight, or a model that has adapters already.
    """
    from peft import LoraConfig, get_peft_model  # seconds to import, so only where it is used
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise PrunekitError("the model carries adapters already: merge_and_unload() them before recovery")
    targets = find_targets(model, method.targets)
    layers = map(model.get_submodule, targets)
    config = LoraConfig(
        r=method.r,
        lora_alpha=method.alpha,  # type: ignore[arg-type]
        lora_dropout=method.dropout,
        target_modules=targets,
        fan_in_fan_out=not all(isinstance(layer, nn.Linear) for layer in layers),  # but GPT-2's Conv1D
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # set right for each module by peft
        warnings.filterwarnings("ignore", category=FutureWarning)  # peft asks transformers by an old name
        return get_peft_model(model, config)  # type: ignore[arg-type]


def find_targets(model: nn.Module, wanted: tuple[str, ...] | None = None) -> list[str]:
    """Full names of the projections to adapt, found by their type.

    Args:
        model: a causal LM, its layers as uneven as they may be.
        wanted: names or ends of names; None takes all but the head.

    Returns:
        At least one name, in the order of the model.

    Raises:
        PrunekitError: a wanted name that no projection has, or one whose weight another module shares.
    """
    from transformers.pytorch_utils import Conv1D

    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head}
    ends, uses = wanted or (), uses_of(model)
    for end in ends:
        if not any(_ends(name, end) for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise PrunekitError(f"no projection is called {end!r}; this model has {', '.join(known)}")
    names = [name for name in linear if wanted is None or any(_ends(name, end) for end in ends)]
    if not names:
        raise PrunekitError("the model has no linear projection that LoRA can adapt")
    for name in names if wanted is not None else ():
        if uses[id(linear[name].weight)] > 1:  # a merge would change its other users too
            raise PrunekitError(f"{name} shares its weight with another module: leave it out of targets")
    return names


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)


def detach(adapted: "PeftModel", *, merge: bool) -> nn.Module:
    """The model without LoRA pairs: their product added to the weights, or dropped."""
    with torch.no_grad():
        return adapted.merge_and_unload() if merge else adapted.unload()  # type: ignore[operator]


@dataclass(frozen=True)
class LoraPair:
    """A weight and its LoRA pair, which updates it by γ·B·A.

    Attributes:
        weight: the parameter that the pair updates.
        a: (r, in).
        b: (out, r).
        scale: γ, alpha / r.
        transposed: whether the weight is stored (in, out).
    """

    weight: nn.Parameter
    a: nn.Parameter
    b: nn.Parameter
    scale: float
    transposed: bool

    def update(self, dim: int, index: Tensor) -> Tensor:
        """γ·B·A at some indices along a dimension of the weight, (n, size of the other dimension)."""
        if (dim == 0) != self.transposed:
            return self.scale * (self.b[index] @ self.a)
        return self.scale * (self.b @ self.a[:, index]).T

    @torch.no_grad()
    def merge(self) -> None:
        """Merge the update into the weight; the model's function stays the same."""
        whole = self.scale * (self.b @ self.a)
        self.weight.add_((whole.T if self.transposed else whole).to(self.weight.dtype))
        self.b.zero_()


def lora_pairs(model: nn.Module) -> dict[str, LoraPair]:
    """Every LoRA pair of a peft model, by the name of the weight that it updates.

    Raises:
        PrunekitError: a model without LoRA, with more than one adapter, merged ones, or a kind of LoRA whose update is
            not γ·B·A alone.
    """
    from peft.tuners.lora import LoraLayer

    names = {parameter: name for name, parameter in model.named_parameters()}
    found: dict[str, LoraPair] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            weight = plain_lora_weight(path, layer)
            adapter = layer.active_adapters[0]
            if names[weight] in found:
                raise PrunekitError(f"{path} shares its weight with another adapted module: leave one out of targets")
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            transposed = bool(getattr(layer, "fan_in_fan_out", False))
            found[names[weight]] = LoraPair(weight, a, b, layer.scaling[adapter], transposed)
    if not found:
        raise PrunekitError("the model carries no LoRA: attach it first, with recovery.lora.attach or peft")
    return found
