"""Writes a LLaMA as a GGUF file for llama.cpp, and reads it back.

An even model is written as GGUF's `llama`, which transformers reads too. One with other numbers of heads or channels in
each layer is written as `deci`, the architecture of Llama-Nemotron: it computes the same and has a list for each width.
A rope that scales frequencies, as LLaMA 3's does, is a tensor of factors, by which llama.cpp divides.
"""

import copy
import io
import re
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from prunekit.checkpoint.gguf import FILE, add_vocabulary, gguf_package
from prunekit.discovery.groups import kind_in
from prunekit.errors import PrunekitError, reason
from prunekit.pruning.cuts import Cuts
from prunekit.pruning.describing import relative_difference, tolerance

FAMILY, BY_LAYER = "llama", "deci"  # architectures of GGUF; the first is transformers' name too
ACTIVATION = "silu"
ROPES = ("default", "linear", "llama3")  # others change with the length of the text, or scale the scores
_FACTORS = "rope_freqs.weight"
_PARTS = r"\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj|(input|post_attention)_layernorm)\.weight"
_PLAIN_INSTEAD = "export with layout='plain' (in a shell: --layout plain)"
_WIDTHS = {"kv_head", "query_head", "ffn_channel", "hidden", "vocabulary"}  # kinds whose cut changes these and no more
_KINDS = {  # dtype → GGUF's name for a matrix, and for a file, of it
    torch.float32: ("F32", "ALL_F32"),
    torch.float16: ("F16", "MOSTLY_F16"),
    torch.bfloat16: ("BF16", "MOSTLY_BF16"),
}

_FIELDS = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")  # as in _widths
_ROTATED = ("q_proj", "k_proj")  # whose rows GGUF has in another order


def write_gguf(model: Any, folder: Path, *, plain: bool) -> list[str]:
    """Write `model.gguf`, with the vocabulary of the tokenizer that stands in the folder already.

    Args:
        model: whose weights to write.
        folder: to write into.
        plain: transformers reads it back; else its weights are put into a copy of the model.

    Returns:
        Remarks on the file: why it has no vocabulary, which is also a warning.

    Raises:
        PrunekitError: the gguf package is missing, GGUF cannot hold this model, or what is read back gives other
            logits.
    """
    gguf, widths = gguf_package("layout='gguf'"), _widths(model)
    even = all(len(set(counts)) == 1 for counts in widths)
    architecture = FAMILY if even else BY_LAYER
    if not plain:
        _check_parts(model, architecture)
    writer = gguf.GGUFWriter(folder / FILE, architecture)
    _add_sizes(writer, model, [counts[0] if even else counts for counts in widths])
    writer.add_file_type(gguf.LlamaFileType[_KINDS[model.dtype][1]])
    remarks = add_vocabulary(gguf, writer, folder, model)
    names = _names(gguf, model)
    for name, tensor in model.named_parameters():
        rows = _interleaved(tensor, model.config.head_dim) if _is_rotated(name) else tensor
        _add_tensor(gguf, writer, names[name], name, rows)
    if rope_type(model.config) != ROPES[0]:
        factors = _frequencies(model) / model.model.rotary_emb.inv_freq.cpu()
        writer.add_tensor(_FACTORS, factors.float().numpy())
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    _prove(model, folder, _read_by_transformers if plain else _read_by_tensors)
    return remarks


def check_family(model: Any) -> None:
    """Raise an error for a model that GGUF's `llama` cannot express, whatever its widths.

    Raises:
        PrunekitError: another family, a rope, an activation function or a dtype that cannot be said.
    """
    config = model.config
    if config.model_type != FAMILY or rope_type(config) not in ROPES:
        what = f"{config.model_type!r} with rope {rope_type(config)!r}"
        ropes = ", ".join(map(repr, ROPES))
        raise PrunekitError(
            f"a GGUF file is written of {FAMILY!r} with a rope of {ropes} only, and this is {what}; {_PLAIN_INSTEAD}"
        )
    if config.hidden_act != ACTIVATION:
        raise PrunekitError(
            f"GGUF's {FAMILY!r} has hidden_act={ACTIVATION!r}, and this model has {config.hidden_act!r}; "
            f"{_PLAIN_INSTEAD}"
        )
    if model.dtype not in _KINDS:
        known = ", ".join(map(str, _KINDS))
        raise PrunekitError(f"GGUF has no {model.dtype}; convert the model to one of {known}")


def rope_type(config: Any) -> str | None:
    """How a family's rotary embedding is scaled, in transformers' words."""
    found: str | None = (config.to_dict().get("rope_parameters") or {}).get("rope_type")
    return found


def _frequencies(model: Any) -> Tensor:
    """Of the rope before it is scaled, (head size / 2,)."""
    size = model.config.head_dim
    exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    return 1.0 / float(model.config.rope_parameters["rope_theta"]) ** exponents


def fits_by_layer(cuts: Cuts) -> bool:
    """Whether a cut LLaMA differs from an uncut one by widths that GGUF can say layer by layer."""
    return {kind_in(name) for name in cuts.left} <= _WIDTHS


def _names(gguf: Any, model: Any) -> dict[str, str | None]:
    """Parameter → its name in GGUF, which is the same in both architectures; None where it has none."""
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, len(model.model.layers))
    return {name: known.get_name(name, (".weight", ".bias")) for name, _ in model.named_parameters()}


def _widths(model: Any) -> list[list[int]]:
    """Query heads, KV heads and FFN channels of each layer, from the shapes of a model."""
    layers, size = model.model.layers, model.config.head_dim
    return [
        [layer.self_attn.q_proj.out_features // size for layer in layers],
        [layer.self_attn.k_proj.out_features // size for layer in layers],
        [layer.mlp.up_proj.out_features for layer in layers],
    ]


def _check_parts(model: Any, architecture: str) -> None:
    """Raise an error for a parameter of a layer that has no place, such as a bias."""
    for name, _ in model.model.layers.named_parameters():
        if not re.fullmatch(_PARTS, name):
            raise PrunekitError(
                f"GGUF's {architecture!r} has no layers.{name}; export with layout='padded' (in a shell: --layout "
                "padded), or keep the checkpoint that prunekit saves"
            )


def _add_sizes(writer: Any, model: Any, widths: list[Any]) -> None:
    """The sizes in the header; widths are lists with a number a layer, or the number that all layers have."""
    config, (heads, kv_heads, channels) = model.config, widths
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(len(model.model.layers))
    writer.add_embedding_length(model.get_input_embeddings().weight.shape[1])
    writer.add_feed_forward_length(channels)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(config.head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _is_rotated(name: str) -> bool:
    return name.split(".")[-2] in _ROTATED


def _interleaved(tensor: Tensor, size: int) -> Tensor:
    """Query or key rows in llama.cpp's order: rotary pairs stand side by side, not half a head apart."""
    halves = tensor.unflatten(0, (-1, 2, size // 2))
    return halves.transpose(1, 2).flatten(0, 2)  # (head, half, pair) → (head, pair, half)


def _halved(tensor: Tensor, size: int) -> Tensor:
    """The reverse of `_interleaved`."""
    pairs = tensor.unflatten(0, (-1, size // 2, 2))
    return pairs.transpose(1, 2).flatten(0, 2)  # (head, pair, half) → (head, half, pair)


def _add_tensor(gguf: Any, writer: Any, wanted: str | None, name: str, tensor: Tensor) -> None:
    if wanted is None:
        raise PrunekitError(f"GGUF's {FAMILY!r} has no place for {name}; {_PLAIN_INSTEAD}")
    kind = gguf.GGMLQuantizationType[_KINDS[tensor.dtype][0] if tensor.dim() > 1 else "F32"]
    data = gguf.quants.quantize(tensor.detach().float().cpu().numpy(), kind)
    writer.add_tensor(wanted, data, raw_dtype=kind)


def _prove(model: Any, folder: Path, read: Any) -> None:
    try:
        again = read(model, folder)
    except Exception as error:  # whatever the reader refuses
        raise PrunekitError(f"the GGUF file cannot be read back ({reason(error)}); {_PLAIN_INSTEAD}") from error
    difference = relative_difference(again, model)
    if not difference <= tolerance(model.dtype):
        raise PrunekitError(
            f"read back from GGUF this model gives other logits (by a factor of {difference:.1g}): it has parts that "
            f"GGUF's {FAMILY!r} does not know, such as biases; {_PLAIN_INSTEAD}"
        )


def _read_by_transformers(_: Any, folder: Path) -> Any:
    with redirect_stderr(io.StringIO()):  # the reader's own progress
        return AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)


def _read_by_tensors(model: Any, folder: Path) -> Any:
    """A copy of the model with the weights that stand in the file, whose widths must be the model's."""
    gguf = gguf_package("layout='gguf'")
    reader = gguf.GGUFReader(folder / FILE)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    architecture, n_layers = reader.fields["general.architecture"].contents(), len(model.model.layers)
    told = [reader.fields[f"{architecture}.{key}"].contents() for key in _FIELDS]
    if [counts if isinstance(counts, list) else [counts] * n_layers for counts in told] != _widths(model):
        raise PrunekitError("its widths are not the model's")
    again, state = copy.deepcopy(model).float(), {}
    for name, wanted in _names(gguf, model).items():
        found = torch.from_numpy(gguf.dequantize(stored[wanted].data, stored[wanted].tensor_type).copy())
        state[name] = _halved(found, model.config.head_dim) if _is_rotated(name) else found
    again.load_state_dict(state, strict=False)
    if _FACTORS in stored:
        factors = torch.from_numpy(stored[_FACTORS].data.copy())
        again.model.rotary_emb.inv_freq = (_frequencies(model) / factors).to(model.device)
    return again
