"""Opens a checkpoint as a model whose parameters are views of mapped files, and writes it cut, shard by shard."""

import json
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig

from prunekit.calibration import all_finite
from prunekit.checkpoint.cut_checkpoints import MODEL_TYPE, load_cut
from prunekit.checkpoint.folders import FLOATS, INDEX, Stored, check_dtypes, header_of, read_config, stored_tensors
from prunekit.checkpoint.loading import load, load_tokenizer
from prunekit.checkpoint.origins import resolve
from prunekit.checkpoint.plain_checkpoints import check_plain_size, load_plain
from prunekit.checkpoint.saving import check_names, check_stored, description, write_beside, write_configurations
from prunekit.compat import TorchDispatchMode
from prunekit.digests import record, recorded
from prunekit.errors import PrunekitError
from prunekit.files import new_folder, write_text
from prunekit.models import empty_model, own_tensors, shapes_of
from prunekit.pruning import PruningPlan
from prunekit.pruning.describing import describe
from prunekit.pruning.removal import copied
from prunekit.pruning.surgery import cut

aten = torch.ops.aten
_POSTPONED = (aten.index_select.default, aten.clone.default)  # what slicing a parameter comes to


def map_checkpoint(source: str | Path) -> tuple[Any, Any]:
    """A model whose parameters are views of the checkpoint's mapped shards, and its tokenizer or None.

    It is an ordinary model in the checkpoint's own dtype. What is read of it is file cache, which the system drops
    when memory is wanted elsewhere; nothing is copied, unless `to_convert` says so.

    Args:
        source: a folder with config.json and safetensors, or GGUF as `load` takes it.

    Raises:
        PrunekitError: no such folder, or no safetensors.
    """
    folder = local_folder(source)
    config, stored = read_config(folder), stored_tensors(folder)
    check_dtypes(folder, stored)
    dtype = _common_dtype(stored.values())
    if config.get("model_type") == MODEL_TYPE:
        return load_cut(folder, dtype, mapped=True), load_tokenizer(str(folder), False)
    return load(folder, dtype=dtype)


def local_folder(source: str | Path) -> Path:
    """The folder of a checkpoint; of a GGUF file, the one that it is converted to.

    Raises:
        PrunekitError: it is not on this machine.
    """
    folder = Path(resolve(source))
    if not folder.is_dir():
        raise PrunekitError(
            f"{str(source)!r} is not a folder on this machine, and only those are streamed; download the checkpoint, "
            "and give the folder that holds config.json and safetensors"
        )
    read_config(folder)
    return folder


def n_bytes(folder: Path) -> int:
    """Size of a checkpoint's weight files in bytes."""
    return sum(file.stat().st_size for file in {tensor.file for tensor in stored_tensors(folder).values()})


def _common_dtype(stored: Iterable[Stored]) -> torch.dtype | str:
    """The dtype of most weights: asking for another, as a configuration may, would copy them."""
    sizes: Counter[str] = Counter()
    for tensor in stored:
        sizes[tensor.dtype] += torch.Size(tensor.shape).numel()
    return FLOATS.get(sizes.most_common(1)[0][0], "auto")


def to_convert(folder: Path) -> Any:
    """The empty model of a folder whose tensors `transformers` would merge, split or turn while it loads them.

    None where every parameter finds a stored tensor of its shape that no other one took, so that all can be mapped.
    """
    if read_config(folder).get("model_type") == MODEL_TYPE:
        return None
    stored = stored_tensors(folder)
    check_plain_size(folder, stored)
    left = Counter(tensor.shape for tensor in stored.values())
    try:
        model = empty_model(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except Exception:  # any error; the load that follows reports it
        return None
    for shape in shapes_of(model).values():
        if not left[shape]:
            return model
        left[shape] -= 1
    return None


def convert(folder: Path, out: Path, max_shard_size: str | int) -> None:
    """Write a checkpoint anew with the model's own tensors, with memory for the parts of one of them and for a shard.

    Args:
        folder: with tensors in another form, such as experts stored one by one.
        out: a new folder, which is complete or not written.
        max_shard_size: of the shards written.

    Raises:
        PrunekitError: it does not load, or `transformers` does not write all that the model has.
    """
    dtype = _common_dtype(stored_tensors(folder).values())
    with new_folder(out) as beside:
        offloaded = beside / "offloaded"
        model = load_plain(str(folder), dtype, device_map={"": "disk"}, offload_folder=str(offloaded))
        with warnings.catch_warnings(action="ignore"):  # of a default size of shards that is not asked for here
            model.save_pretrained(beside, save_original_format=False, max_shard_size=max_shard_size)
        shutil.rmtree(offloaded, ignore_errors=True)
        if to_convert(beside) is not None:
            raise PrunekitError(
                f"{str(folder)!r} cannot be streamed: transformers puts its tensors together in memory; if the model "
                "fits there, load it, prune it and save it"
            )


@dataclass(frozen=True)
class Piece:
    """A slice of a parameter that is not copied yet.

    Attributes:
        whole: the parameter, a view of a mapped file.
        shown: the parameter itself, or its stand-in, which lives on so that no other tensor gets its address.
        cuts: (dimension, indices that stay), one after the other.
    """

    whole: Tensor
    shown: Tensor
    cuts: tuple[tuple[int, Tensor], ...] = ()


class Postponed(TorchDispatchMode):
    """A context in which slicing a parameter gives a stand-in of the right shape without memory.

    Attributes:
        pieces: address of a parameter or of a stand-in → what it stands for.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.pieces = {p.data_ptr(): Piece(p, p) for p in model.parameters() if p.numel()}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        piece = self.pieces.get(args[0].data_ptr()) if func in _POSTPONED else None
        if piece is None or args[0].shape != piece.shown.shape:
            return func(*args, **(kwargs or {}))
        if func is aten.clone.default:
            return args[0].detach()
        _, dim, index = args
        shape = [len(index) if d == dim else n for d, n in enumerate(args[0].shape)]
        stand_in = torch.zeros((), dtype=piece.whole.dtype).expand(shape)
        self.pieces[stand_in.data_ptr()] = Piece(piece.whole, stand_in, (*piece.cuts, (dim, index)))
        return stand_in

    def values_of(self, tensor: Tensor) -> Tensor:
        """The values that a parameter or a stand-in stands for, in memory where anything was cut."""
        piece = self.pieces.get(tensor.data_ptr(), Piece(tensor, tensor))
        values = piece.whole.detach()
        for dim, index in piece.cuts:
            values = values.index_select(dim, index)
        return values


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
            _write_shard({name: postponed.values_of(state[name]) for name in names}, folder / file)
            record([folder / file], note)
    if layout.is_sharded:
        index = {"metadata": layout.metadata, "weight_map": layout.tensor_to_filename}
        write_text(folder / INDEX, json.dumps(index, indent=2))


def _write_shard(tensors: dict[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise PrunekitError(
                f"{name} has NaN or infinite weights: the checkpoint is damaged, or overflowed float16; "
                "restore it from its source, or convert it from one in bfloat16 or float32"
            )
    beside = path.with_name(f".{path.name}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, metadata={"format": "pt"})
    check_stored(header_of(beside), tensors)
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
    write_beside(small, config, folder, plan=plan)
