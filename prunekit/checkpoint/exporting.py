"""Exports a model for other programs: plain, padded with zeros to even widths, or as a GGUF file."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from prunekit.calibration import check_finite
from prunekit.checkpoint.cards import renumbered, write_texts
from prunekit.checkpoint.gguf_writing import ROPES, check_family, fits_by_layer, rope_type, write_gguf
from prunekit.checkpoint.saving import SHARD, check_saving, write_plain, write_tokenizer
from prunekit.checks import FilePath, Network, Tokenizer, checked
from prunekit.discovery import Groups, discover
from prunekit.errors import PrunekitError
from prunekit.files import new_folder
from prunekit.models import empty_model, own_tensors
from prunekit.names import GGUF, PADDED
from prunekit.pruning import PruningPlan
from prunekit.pruning.cuts import Cuts, with_width
from prunekit.pruning.describing import plain_config, reads_back, relative_difference, tolerance, unsaid
from prunekit.pruning.removal import remaining

if TYPE_CHECKING:
    from prunekit.evaluation import Report

KEEP = "keep the checkpoint that prunekit saves, or re-fit with fit='weights', which adds none"


@checked
def export(
    model: Network,
    out: FilePath,
    *,
    layout: Literal["plain", "padded", "gguf"] = "plain",
    tokenizer: Tokenizer | None = None,
    plan: PruningPlan | None = None,
    report: "Report | None" = None,
    files: Mapping[str, str] | None = None,
    max_shard_size: str | int = SHARD,
) -> Path:
    """Exports a model to a folder that other programs load without prunekit, with the same logits.

    Args:
        model: a model, cut or not; adapters merged.
        out: a folder that does not exist yet. It is complete or not written.
        layout: `"plain"` for a checkpoint that plain `transformers` loads, for cuts that the family's configuration
            can say. `"padded"` fills any other up to even widths with zeros. `"gguf"` writes `model.gguf` of a LLaMA
            for llama.cpp, whose layers may have different numbers of heads and channels.
        tokenizer: as for `save`, and so are `plan`, `report`, `files` and `max_shard_size`.
        plan: by which the model was cut.
        report: evaluation report of the model.
        files: more texts for the folder.
        max_shard_size: of one safetensors file.

    Returns:
        The folder.

    Raises:
        PrunekitError: the layout is unknown or cannot hold this model, or what `save` raises. Nothing is left behind.
    """
    check_saving(model, out, tokenizer, report, files, max_shard_size)
    check_finite(model)
    if layout == GGUF:
        check_family(model)
    remarks = renumbered(model, plan, tokenizer)
    even, config, filled = _even(model, layout)
    with new_folder(out) as folder:
        write_tokenizer(model, folder, tokenizer)
        if layout == GGUF:
            remarks += write_gguf(even, folder, plain=config is not None)
        else:
            write_plain(even, config, folder, max_shard_size)
        write_texts(even, folder, layout, plan, report, files, unsaid=filled, remarks=remarks)
    return Path(out)


def _even(model: Any, layout: str) -> tuple[Any, Any, list[str]]:
    """The model to write, the configuration that transformers reads, and what is filled up, or said by GGUF alone."""
    config = plain_config(model)
    scaled = [f"rope {rope_type(model.config)!r}"] if layout == GGUF and rope_type(model.config) != ROPES[0] else []
    if config is not None:
        return model, None if scaled else config, scaled
    cuts = Cuts.of(model)
    if layout == PADDED:
        padded = padded_model(model, cuts)
        return padded, padded.config, unsaid(cuts)
    if cuts.biases:
        raise PrunekitError(f"{type(model).__name__} has biases, for which its configuration has no field; {KEEP}")
    if layout == GGUF and fits_by_layer(cuts):
        return model, None, unsaid(cuts) + scaled
    raise PrunekitError(
        f"the configuration of {type(model).__name__} has no fields for these widths ({'; '.join(unsaid(cuts))}); "
        "export with layout='padded' (in a shell: --layout padded), or keep the checkpoint that prunekit saves"
    )


def padded_model(model: Any, cuts: Cuts) -> Any:
    """A padded copy that plain `transformers` loads and that computes the same as `model`.

    Every width is that of the widest layer, or the next that the family takes; where its configuration has no
    field for a width, the uncut one. What `model` lacks there is zero: a head whose values are zero adds nothing,
    nor does a channel that nothing reads.

    Args:
        model: as returned by `prune`.
        cuts: what was cut from it.

    Raises:
        PrunekitError: zeros would change what it computes, as where a norm's statistics span what was cut.
    """
    if cuts.biases:
        raise _refusal("some of its layers were given biases, others not; re-fit with fit='weights', which adds none")
    padded = empty_model(_roomy(cuts))
    survivors, like = _survivors(discover(padded), cuts), next(model.parameters())
    state = {name: torch.zeros(p.shape, dtype=like.dtype, device=like.device) for name, p in padded.named_parameters()}
    shapes = {name: t.shape for name, t in own_tensors(padded).items()}
    state |= {name: _spread(name, t.detach(), shapes[name], survivors) for name, t in own_tensors(model).items()}
    padded.load_state_dict(state, strict=False, assign=True)
    padded.tie_weights()
    padded.generation_config = model.generation_config
    padded.to(like.device).eval()
    difference = relative_difference(padded, model)
    if not difference <= tolerance(next(model.parameters()).dtype):
        raise _refusal(
            f"its logits would change by a factor of {difference:.1g}: zeros cannot replace the removed units, as "
            "where a norm spans it or each head has a norm of its own"
        )
    return padded


def _roomy(cuts: Cuts) -> Any:
    config = cuts.config
    for name, groups in cuts.roles.items():
        widest = max(cuts.n_left(group) for group in groups)
        tried = (with_width(config, cuts.fields[name], width) for width in range(widest, groups[0].n_units + 1))
        config = next(filter(reads_back, tried), config)
    return config


def _survivors(groups: Groups, cuts: Cuts) -> dict[tuple[str, int], Tensor]:
    """(parameter, dim) of the padded model → the indices that are not filling.

    Units stand where they stood where the width is the uncut one, because a place may mean something (ALiBi's slopes).
    """
    gone: dict[tuple[str, int], list[Tensor]] = {}
    for name, units in cuts.left.items():
        if name not in groups:
            raise _refusal(f"with even widths it has no {name}")
        group = groups[name]
        kept = units if group.n_units == cuts.groups[name].n_units else list(range(len(units)))
        filling = sorted(set(range(group.n_units)) - set(kept))
        for member in group.members:
            gone.setdefault((member.parameter, member.dim), []).append(member.owned_by(filling))
    return {site: remaining(groups.shapes[site[0]][site[1]], torch.cat(parts)) for site, parts in gone.items()}


def _spread(name: str, tensor: Tensor, shape: torch.Size, survivors: dict[tuple[str, int], Tensor]) -> Tensor:
    """A padded tensor: the remaining values in place, zeros elsewhere."""
    for dim, size in enumerate(shape):
        if tensor.shape[dim] == size:
            continue
        index = survivors.get((name, dim), torch.empty(0))
        if len(index) != tensor.shape[dim]:
            raise _refusal(
                f"where the units left of {name} (dimension {dim}) belong is unknown; save it with prunekit.save "
                "instead"
            )
        wider = tensor.new_zeros([*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]])
        tensor = wider.index_copy_(dim, index.to(tensor.device), tensor)
    return tensor


def _refusal(why: str) -> PrunekitError:
    return PrunekitError(f"this model cannot be padded: {why}; save it with prunekit.save, which keeps uneven widths")
