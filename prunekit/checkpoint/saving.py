"""Saves checkpoints, without pickles, and reads them back before they are moved into place.

A cut that the family's own configuration can say is saved as a plain `transformers` checkpoint. Any other is saved
with `model_type: "prunekit"`: the uncut configuration, the units kept, and the widths of each layer in the form of
`transformers`' own `per_layer_config`.
"""

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from prunekit.checkpoint.cards import renumbered, write_texts
from prunekit.checkpoint.config_checks import check_class
from prunekit.checkpoint.cut_checkpoints import FORMAT, MODEL_TYPE, cut_again, layer_widths
from prunekit.checkpoint.folders import Stored, stored_tensors
from prunekit.checkpoint.loading import copy_processors, write_tokenizer_of
from prunekit.checkpoint.plain_checkpoints import is_falsely_tied, load_plain
from prunekit.checks import FilePath, Network, Tokenizer, checked
from prunekit.errors import PrunekitError, reason
from prunekit.files import check_new_folder, new_folder, write_text
from prunekit.models import check_has_weights, empty_model, name_model, own_tensors, shapes_of
from prunekit.names import OWN, PLAIN
from prunekit.pruning import PruningPlan
from prunekit.pruning.configurations import recorded
from prunekit.pruning.cuts import Cuts, drops_layers, tokens_went
from prunekit.pruning.describing import has_same_logits, plain_config, unsaid

if TYPE_CHECKING:
    from prunekit.evaluation import Report

SHARD = "5GB"
SAMPLE = 1024  # numbers compared of each tensor, spread over it


@checked
def save(
    model: Network,
    out: FilePath,
    *,
    tokenizer: Tokenizer | None = None,
    plan: PruningPlan | None = None,
    report: "Report | None" = None,
    files: Mapping[str, str] | None = None,
    max_shard_size: str | int = SHARD,
) -> Path:
    """Saves a model as a checkpoint folder that `load` reads back with the same logits.

    Zeros are stored like other weights. Where the model carries a `sparsity_report`, it is counted again and stands in
    `sparsity.json` and the model card.

    Args:
        model: a model, cut or not; adapters merged.
        out: a folder that does not exist yet. It is complete or not written.
        tokenizer: to save along; by default the one that stands where the model was loaded from.
        plan: by which the model was cut, for `plan.json` and the model card.
        report: evaluation report, for `report.json` and the model card.
        files: more texts for the folder, name → content; one called README.md takes the model card's place.
        max_shard_size: of one safetensors file, in bytes or such as `"500MB"`.

    Returns:
        The folder.

    Raises:
        PrunekitError: `out` exists or cannot be written, adapters are not merged, the model is not what its recorded
            cuts lead to, or what was written does not read back as the model. Nothing is left behind.
    """
    check_saving(model, out, tokenizer, report, files, max_shard_size)
    config = description(model)
    with new_folder(out) as folder:
        if isinstance(config, dict):  # weights under prunekit's own names, of which save_pretrained renames some
            write_configurations(model, config, folder)
            state = {name: tensor.detach().contiguous() for name, tensor in own_tensors(model).items()}
            save_torch_state_dict(state, folder, max_shard_size=max_shard_size)
            check_written(folder, model)
        else:
            write_plain(model, config, folder, max_shard_size)
        write_beside(model, config, folder, tokenizer=tokenizer, plan=plan, report=report, files=files)
    if recorded(model.config):
        name_model(model, str(out))
    return Path(out)


def description(model: Any) -> Any:
    """The content of config.json: the family's own configuration if it is proved, else prunekit's record."""
    said = model.config
    if is_falsely_tied(model):  # such as a head that was trained apart: loading would tie it again
        said = copy.deepcopy(said)
        said.get_text_config().tie_word_embeddings = False
    with _configured(model, said):
        config = plain_config(model)
        return cut_config(model, Cuts.of(model)) if config is None else config


@contextmanager
def _configured(model: Any, config: Any) -> Iterator[None]:
    """A context in which a model has another configuration."""
    mine, model.config = model.config, config
    try:
        yield
    finally:
        model.config = mine


def not_plain(config: Any) -> list[str]:
    """The widths of a configuration or record that the family cannot express."""
    return config.get("not_plain", []) if isinstance(config, dict) else []


def check_saving(
    model: Any, out: FilePath, tokenizer: Any, report: Any, files: Mapping[str, str] | None, max_shard_size: str | int
) -> None:
    """Raise an error for arguments that `save` and `export` cannot use, before anything is computed.

    Such as a model without a configuration, with unmerged adapters, or with weights of a special type.
    """
    check_new_folder(out)
    if not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        raise PrunekitError(f"a {type(model).__name__} cannot be saved; give a causal language model of transformers")
    if hasattr(model, "peft_config"):
        raise PrunekitError("the model still carries adapters; call merge_and_unload() on it and save the result")
    check_class(model)
    check_has_weights(model)
    if report is not None and not (hasattr(report, "to_json") and hasattr(report, "headline")):
        raise PrunekitError(f"report={report!r} is not a Report; give what evaluate() or Report.load() returns")
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise PrunekitError(f"tokenizer={tokenizer!r} is not a tokenizer; give what load() or AutoTokenizer returns")
    for name in files or {}:
        if Path(name).name != name:
            raise PrunekitError(f"files: {name!r} is not a plain file name; give names without folders")
    check_shard_size(max_shard_size)


def check_shard_size(size: str | int) -> None:
    """Raise an error for an invalid file size."""
    known = isinstance(size, str) and re.fullmatch(r"0*[1-9]\d*[KMGT]B", size, re.IGNORECASE)
    if not known and not (type(size) is int and 0 < size < 2**63):
        raise PrunekitError(f"max_shard_size={size!r} is no size; give bytes, or such as '500MB' or '5GB'")


def write_plain(model: Any, config: Any, folder: Path, max_shard_size: str | int) -> None:
    """A plain checkpoint of a model under another configuration, in the form of the hub's if that reads back.

    Where `transformers` writes what it does not read, such as packed weights of a model that it unpacked on loading,
    the weights are written as the model holds them.

    Raises:
        PrunekitError: neither reads back.
    """
    with _configured(model, config):
        for original in (True, False):
            model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=original)
            try:
                return check_written(folder, model)
            except PrunekitError as error:
                why = error
            for file in folder.glob("*.safetensors*"):
                file.unlink()
    raise PrunekitError(
        f"transformers cannot read back this {type(model).__name__} as it wrote it: {why}; update transformers"
    )


def cut_config(model: Any, cuts: Cuts) -> dict[str, Any]:
    """The config.json of a cut model, checked by building it again.

    Where a family computes something from a layer's number, the record is that of the model with all its layers.

    Raises:
        PrunekitError: the record does not lead to this model.
    """
    try:
        return _record(model, cuts)
    except PrunekitError:
        if not drops_layers(recorded(model.config)["stages"]):
            raise
    return _record(model, Cuts.of(model, all_layers=True))


def _record(model: Any, cuts: Cuts) -> dict[str, Any]:
    described = cuts.described() | {"architectures": [type(model).__name__]}
    try:
        uncut = empty_model(AutoConfig.for_model(**described))
        rebuilt = cut_again(uncut, cuts.groups, cuts.stages, cuts.biases)
    except Exception as error:  # code that came with a checkpoint, or a configuration its family refuses
        raise PrunekitError(
            f"cannot save this cut model: it cannot be built anew from its cuts ({reason(error)})"
        ) from error
    if shapes_of(rebuilt) != shapes_of(model):
        raise PrunekitError(
            "this model's shapes are not those of its recorded cuts; it was changed by other means: make such changes "
            "to the whole model, save that, load it, and cut it again"
        )
    if drops_layers(recorded(model.config)["stages"]) and not has_same_logits(rebuilt, model):
        raise PrunekitError(
            "built again from its record, this model gives other logits: its family computes something from a layer's "
            "number; keep all layers, or give prunekit.export(layout='padded') a model whose layers all stand"
        )
    record = {"model_type": MODEL_TYPE, "format": FORMAT, "stages": cuts.stages, "base_config": described}
    record |= {"biases": list(cuts.biases)} if cuts.biases else {}
    return record | {"not_plain": unsaid(cuts)} | layer_widths(cuts)


def write_configurations(model: Any, config: Any, folder: Path) -> None:
    """config.json, from a configuration or a record, and that of generation."""
    if isinstance(config, dict):
        write_text(folder / "config.json", json.dumps(config, indent=1))
    else:
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def write_beside(
    model: Any, config: Any, folder: Path, *, tokenizer: Any = None, plan: PruningPlan | None = None,
    report: "Report | None" = None, files: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """The files besides weights and configurations: the tokenizer, the card, the plan, the report and the user's."""
    layout, remarks = OWN if isinstance(config, dict) else PLAIN, renumbered(model, plan, tokenizer)
    write_tokenizer(model, folder, tokenizer)
    write_texts(model, folder, layout, plan, report, files, unsaid=not_plain(config), remarks=remarks)


def write_tokenizer(model: Any, folder: Path, tokenizer: Any) -> None:
    """The tokenizer, by default the one where the model was loaded from, and what prepares pictures there."""
    source = getattr(model.config, "name_or_path", "") or getattr(model, "cut_from", "")
    known = bool(source) and Path(source).is_dir() and not tokens_went(model)  # which it would number wrongly
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    elif known:
        write_tokenizer_of(source, folder)
    if known:
        copy_processors(source, folder)


def check_written(folder: Path, model: Any) -> None:
    """Compare names, shapes and a sample of the values in a folder with the model that was written there.

    Where tensors have other names in the files, as in most families with experts, the model is loaded from these.

    Raises:
        PrunekitError: something is missing or differs.
    """
    expected, stored = own_tensors(model), stored_tensors(folder)
    if stored.keys() == expected.keys():
        check_stored(stored, expected)
    else:
        _check_alike(own_tensors(load_plain(str(folder))), expected)


def check_names(folder: Path, model: Any) -> None:
    """As `check_written`, names and shapes alone, which cost nothing."""
    stored = {name: tensor.shape for name, tensor in stored_tensors(folder).items()}
    expected = {name: tuple(tensor.shape) for name, tensor in own_tensors(model).items()}
    _refuse(name for name in {**expected, **stored} if stored.get(name) != expected.get(name))


def check_stored(stored: dict[str, Stored], expected: dict[str, Tensor]) -> None:
    """As `check_written`, for tensors of files by their own names."""
    files = {tensor.file for tensor in stored.values()}
    _check_alike({name: tensor for file in files for name, tensor in load_file(file).items()}, expected)


def _check_alike(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    _refuse(name for name in expected if name not in found or not _alike(found[name], expected[name]))


def _refuse(wrong: Iterable[str]) -> None:
    for name in wrong:
        raise PrunekitError(f"{name} is not read back as it was")


def _alike(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    step = max(1, expected.numel() // SAMPLE)
    a, b = (tensor.detach().reshape(-1)[::step].cpu() for tensor in (found, expected))
    return bool(((a == b) | (a.isnan() & b.isnan())).all())
