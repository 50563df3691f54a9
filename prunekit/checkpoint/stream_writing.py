"""Writes a cut checkpoint shard by shard, from a model whose parameters are views of mapped files."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from prunekit.checkpoint.cards import renumbered, texts_beside
from prunekit.checkpoint.folders import INDEX
from prunekit.checkpoint.reading_back import check_names, check_shard
from prunekit.checkpoint.saving import (
    description,
    layout_of,
    not_plain,
    write_configurations,
    write_texts,
    write_tokenizer,
)
from prunekit.compat import TorchDispatchMode
from prunekit.digests import record, recorded
from prunekit.errors import PrunekitError
from prunekit.files import write_text
from prunekit.models import own_tensors
from prunekit.pruning import PruningPlan
from prunekit.pruning.describing import describe
from prunekit.pruning.surgery import cut
from prunekit.pruning.weights import copied

aten = torch.ops.aten
_POSTPONED = (aten.index_select.default, aten.clone.default)  # what slicing a parameter comes to


@dataclass(frozen=True)
class Piece:
    """A slice of a parameter that is not copied yet.

    Attributes:
        whole: the parameter, a view of a mapped file.
        cuts: (dimension, indices that stay), one after the other.
    """

    whole: Tensor
    cuts: tuple[tuple[int, Tensor], ...] = ()

    def take(self) -> Tensor:
        """The values that stay, in memory where anything was cut."""
        tensor = self.whole.detach()
        for dim, index in self.cuts:
            tensor = tensor.index_select(dim, index)
        return tensor


class Postponed(TorchDispatchMode):
    """A context in which slicing a parameter gives a stand-in of the right shape without memory.

    Attributes:
        pieces: address of a parameter or of a stand-in → what it stands for.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.pieces = {p.data_ptr(): Piece(p) for p in model.parameters() if p.numel()}
        self._stand_ins: list[Tensor] = []  # they live on, so that no address is given to another

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        piece = self.pieces.get(args[0].data_ptr()) if func in _POSTPONED else None
        if piece is None or args[0].shape != self._shape(piece):
            return func(*args, **(kwargs or {}))
        cut = (args[1], args[2]) if func is aten.index_select.default else None
        return args[0].detach() if cut is None else self._stand_in(Piece(piece.whole, (*piece.cuts, cut)))

    @staticmethod
    def _shape(piece: Piece) -> torch.Size:
        shape = list(piece.whole.shape)
        for dim, index in piece.cuts:
            shape[dim] = len(index)
        return torch.Size(shape)

    def _stand_in(self, piece: Piece) -> Tensor:
        tensor = torch.zeros((), dtype=piece.whole.dtype)
        self.pieces[tensor.data_ptr()] = piece
        self._stand_ins.append(tensor)
        return tensor.expand(self._shape(piece))


def cut_without_weights(model: nn.Module, plan: PruningPlan) -> tuple[Any, Postponed]:
    """The smaller model as `prune` proves it, with stand-ins for what was sliced, and what they stand for."""
    sharing: Any = copied(model, {id(p): p for p in model.parameters()})
    with Postponed(model) as postponed:
        return cut(sharing, plan), postponed


def write_shards(small: nn.Module, postponed: Postponed, folder: Path, max_shard_size: str | int, note: Path) -> None:
    """Slice the weights into new shards; one that is finished already is left as it is.

    Args:
        small: the smaller model with stand-ins.
        postponed: what they stand for.
        folder: each shard is written beside its place in it, read back, and moved there when it is right.
        max_shard_size: of a shard, as `"1GB"`; a shard is what memory must hold.
        note: of finished files.

    Raises:
        PrunekitError: weights that are NaN or infinite, or that do not read back as they were.
    """
    state = own_tensors(small)
    shapes = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in state.items()}
    layout = split_torch_state_dict_into_shards(shapes, max_shard_size=max_shard_size)
    for file, names in tqdm(layout.filename_to_tensors.items(), desc="writing", unit="shard", leave=False, delay=1):
        if file not in recorded(note):
            pieces = {name: postponed.pieces.get(state[name].data_ptr(), Piece(state[name])) for name in names}
            _write_shard({name: piece.take() for name, piece in pieces.items()}, folder / file)
            record([folder / file], note)
    if layout.is_sharded:
        index = {"metadata": layout.metadata, "weight_map": layout.tensor_to_filename}
        write_text(folder / INDEX, json.dumps(index, indent=2))


def _write_shard(tensors: dict[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.is_floating_point() and not bool(torch.stack(tensor.aminmax()).isfinite().all()):
            raise PrunekitError(
                f"{name} has NaN or infinite weights: the checkpoint is damaged, or overflowed float16; "
                "restore it from its source, or convert it from one in bfloat16 or float32"
            )
    beside = path.with_name(f".{path.name}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, metadata={"format": "pt"})
    check_shard(beside, tensors)
    beside.replace(path)


def write_the_rest(small: Any, folder: Path, plan: PruningPlan) -> None:
    """Write the files besides the shards: configuration, tokenizer, plan and card, as `save` does.

    The configuration is the family's own where that is proved. The proof is that of `save`: a model built from it
    gives the same logits, here with the shards just written, mapped.
    """
    check_names(folder, small)
    for shard in sorted(folder.glob("model*.safetensors")):
        small.load_state_dict(load_file(shard), strict=False, assign=True)
    small.tie_weights()
    describe(small, plan.groups)
    config = description(small)
    write_configurations(small, config, folder)
    write_tokenizer(small, folder, None)
    remarks = renumbered(small, plan, None)
    made = texts_beside(small, layout_of(config), plan, None, unsaid=not_plain(config), remarks=remarks)
    write_texts(folder, made, {})
