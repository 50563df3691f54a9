"""Writing a cut checkpoint shard by shard, from a model whose parameters are views of mapped files."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from prunekit.checkpoint.building import own_tensors
from prunekit.checkpoint.cards import OWN, PLAIN, texts_beside
from prunekit.checkpoint.folders import INDEX
from prunekit.checkpoint.saving import cut_config, is_cut, write_beside
from prunekit.checkpoint.uniform import plain_config
from prunekit.checkpoint.widths import Cuts
from prunekit.discovery.partition import find_groups
from prunekit.discovery.tracing import trace
from prunekit.errors import PrunekitError
from prunekit.files import write_text
from prunekit.pruning import PruningPlan, prune
from prunekit.pruning.surgery import _check_plan, _cut, _per_parameter

Kept = dict[str, dict[int, Tensor]]
"""Parameter → dimension → ascending indices that stay."""


def cut_without_weights(model: nn.Module, plan: PruningPlan) -> tuple[Any, Kept]:
    """The smaller model on the meta device, proved as by `prune`, and what stays of each parameter."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False) for p in model.parameters()
    }
    empty = copy.deepcopy(model, memo)
    before = trace(empty)
    groups = find_groups(before)
    _check_plan(groups, plan)
    kept = _per_parameter(_cut(empty, before, groups, plan).keep)
    return prune(empty, plan, inplace=True), kept


def write_shards(small: nn.Module, model: nn.Module, kept: Kept, folder: Path, max_shard_size: str | int) -> None:
    """Slice the weights into new shards; one that is there already is left as it is.

    Args:
        small: the smaller model without weights, which says what is written in which order.
        model: the full one.
        kept: what stays of each parameter.
        folder: each shard is written beside its place in it and moved there when it is whole.
        max_shard_size: of a shard, as `"1GB"`; a shard is what memory must hold.

    Raises:
        PrunekitError: weights that are NaN or infinite.
    """
    layout = split_torch_state_dict_into_shards(own_tensors(small), max_shard_size=max_shard_size)
    full = own_tensors(small) | dict(model.named_parameters())
    for file, names in tqdm(layout.filename_to_tensors.items(), desc="writing", unit="shard", leave=False, delay=1):
        if not (folder / file).is_file():
            tensors = {name: _slice(name, full[name], kept.get(name, {})) for name in names}
            save_file(tensors, folder / f".{file}", metadata={"format": "pt"})
            (folder / f".{file}").replace(folder / file)
            tensors.clear()  # before the next shard is made
    if layout.is_sharded:
        index = {"metadata": layout.metadata, "weight_map": layout.tensor_to_filename}
        write_text(folder / INDEX, json.dumps(index, indent=2))


def _slice(name: str, tensor: Tensor, keep: dict[int, Tensor]) -> Tensor:
    tensor = tensor.detach()
    for dim, index in keep.items():
        tensor = tensor.index_select(dim, index)
    if tensor.is_floating_point() and tensor.numel() and not bool(torch.stack(tensor.aminmax()).isfinite().all()):
        raise PrunekitError(f"{name} has NaN or infinite weights: the checkpoint is damaged, or overflowed float16")
    return tensor.contiguous()


def write_the_rest(small: Any, folder: Path, plan: PruningPlan, tokenizer: Any) -> None:  # noqa: ANN401
    """What stands beside the shards: configuration, tokenizer, plan and card, as `save` writes them.

    The configuration is the family's own where that is proved. The proof is that of `save`: a model built from it
    gives the same logits, here with the shards just written, mapped.
    """
    for shard in sorted(folder.glob("model*.safetensors")):
        small.load_state_dict(load_file(shard), strict=False, assign=True)
    small.tie_weights()
    cuts = Cuts.of(small) if is_cut(small) else None
    config = plain_config(small, cuts)
    if config is None and cuts is not None:
        write_text(folder / "config.json", json.dumps(cut_config(small, cuts), indent=1))
    else:
        config.architectures = [type(small).__name__]
        config.save_pretrained(folder)
    if getattr(small, "generation_config", None) is not None:
        small.generation_config.save_pretrained(folder)
    write_beside(small, folder, tokenizer, texts_beside(small, OWN if config is None else PLAIN, plan, None))
