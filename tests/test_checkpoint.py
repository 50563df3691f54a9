"""What is saved loads again, in another process too, with the same logits; nothing is half-written."""

import json
import random
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, logits, plan_keeping, tokens
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import prunekit as pk
from prunekit import PrunekitError, discover, load, prune, save

SAVEABLE = [name for name in FAMILIES if name != "llama_peft"]


def cut(name, uneven, dtype=torch.float32):
    """A model with half of its heads and channels, or with a different number in each layer."""
    model = FAMILIES[name].model(dtype=dtype)
    groups, rng = discover(model), random.Random(0)
    keep = {}
    for g in groups.of_kind("kv_head", "ffn_channel"):
        n = max(1, g.n_units // 2 - (g.layer if uneven else 0))
        keep[g.name] = sorted(rng.sample(range(g.n_units), n))
    return prune(model, plan_keeping(groups, keep))


@pytest.mark.parametrize("name", SAVEABLE)
@pytest.mark.parametrize("uneven", [False, True])
def test_logits_are_the_same_after_saving_and_loading(name, uneven, tmp_path):
    small = cut(name, uneven)
    save(small, tmp_path / "out")
    again, tokenizer = load(tmp_path / "out")
    assert tokenizer is None and type(again) is type(small) and not again.training
    assert torch.equal(logits(again), logits(small))
    assert not [p.name for p in tmp_path.iterdir() if p.name != "out"]
    assert not list((tmp_path / "out").glob("*.bin"))


@pytest.mark.parametrize(("name", "uneven"), [("llama_gqa", False), ("qwen3", False), ("llama_gqa", True)])
def test_another_process_reads_the_same(name, uneven, tmp_path):
    small = cut(name, uneven)
    save(small, tmp_path / "out")
    save_file({"ids": tokens(), "logits": logits(small)}, tmp_path / "expected.safetensors")
    loader = "AutoModelForCausalLM.from_pretrained(sys.argv[1])" if not uneven else "prunekit.load(sys.argv[1])[0]"
    script = (
        "import sys, torch; from safetensors.torch import load_file; from transformers import AutoModelForCausalLM\n"
        f"{'import prunekit' if uneven else ''}\n"
        "expected = load_file(sys.argv[2])\n"
        f"with torch.no_grad(): found = {loader}.eval()(expected['ids']).logits\n"
        "assert torch.equal(found, expected['logits'])\n"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path / "out"), str(tmp_path / "expected.safetensors")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", ["llama_mha", "llama_tied", "qwen3", "llama_equal"])
def test_an_even_cut_that_the_configuration_can_say_is_a_plain_checkpoint(name, tmp_path):
    small = cut(name, uneven=False)
    save(small, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(plain.eval()), logits(small))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "prunekit" not in config and config["intermediate_size"] == discover(small).of_kind("ffn_channel")[0].n_units


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_ffn_widths_are_said_under_whatever_name_the_family_has(name, tmp_path):
    model = FAMILIES[name].model(dtype=torch.float32)
    groups = discover(model)
    keep = {g.name: list(range(40)) for g in groups.of_kind("ffn_channel")}
    small = prune(model, plan_keeping(groups, keep))
    save(small, tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), logits(small))


def test_an_uneven_cut_is_never_mistaken_for_a_plain_checkpoint(tmp_path):
    save(cut("llama_mha", uneven=True), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "prunekit"
    with pytest.raises(ValueError, match="prunekit"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_loaded_cut_can_be_cut_saved_and_loaded_again(tmp_path):
    save(cut("gpt2", uneven=True), tmp_path / "one")
    model, _ = load(tmp_path / "one")
    groups = discover(model)
    keep = {g.name: list(range(1, g.n_units)) for g in groups.of_kind("ffn_channel")}
    small = prune(model, plan_keeping(groups, keep))
    save(small, tmp_path / "two")
    assert torch.equal(logits(load(tmp_path / "two")[0]), logits(small))


def test_cuts_of_overlapping_groups_are_made_again_in_order(tmp_path):
    once = prune(
        FAMILIES["llama_gqa"].model(dtype=torch.float32),
        plan_keeping(discover(FAMILIES["llama_gqa"].model()), {"model.layers.0.self_attn:kv_head": [1, 2, 3]}),
    )
    small = prune(once, plan_keeping(discover(once), {"model.layers.0.self_attn:query_head": [1, 3, 5]}))
    save(small, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")[0]), logits(small))


def test_a_model_changed_by_other_means_is_not_saved(tmp_path):
    small = cut("llama_mha", uneven=True)
    small.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 99, bias=False)
    with pytest.raises(PrunekitError, match="changed by other means"):
        save(small, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_dtype_is_the_checkpoints_unless_told(tmp_path):
    save(cut("llama_mha", uneven=True, dtype=torch.float16), tmp_path / "out")
    assert {p.dtype for p in load(tmp_path / "out")[0].parameters()} == {torch.float16}
    for dtype in (torch.float32, "float32"):
        again = load(tmp_path / "out", dtype=dtype)[0]
        assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert {b.dtype for b in load(tmp_path / "out")[0].buffers()} == {torch.float32}
    assert load("world", dtype=torch.float16)[0].dtype == torch.float16
    with pytest.raises(PrunekitError, match="dtype='float99' is not known"):
        load(tmp_path / "out", dtype="float99")


def test_the_tokenizer_travels_along(tmp_path):
    model, tokenizer = load("world")
    save(model, tmp_path / "out")
    _, again = load(tmp_path / "out")
    assert again("anna")["input_ids"] == tokenizer("anna")["input_ids"]


def test_an_output_folder_that_exists_is_refused_and_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(PrunekitError, match="exists; choose a new folder"):
        save(FAMILIES["llama_mha"].model(), tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    model = FAMILIES["llama_mha"].model()

    def broken(folder):
        (folder / "half").write_text("written")
        raise OSError("disk full")

    monkeypatch.setattr(model, "save_pretrained", broken)
    with pytest.raises(OSError, match="disk full"):
        save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_unmerged_adapters_are_refused(tmp_path):
    wrapped = get_peft_model(FAMILIES["llama_mha"].model(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(PrunekitError, match="merge_and_unload"):
        save(wrapped, tmp_path / "out")


def test_a_cut_made_under_adapters_loads_after_merging(tmp_path):
    wrapped = FAMILIES["llama_peft"].model(dtype=torch.float32)
    groups = discover(wrapped)
    keep = {g.name: list(range(g.n_units // 2 + g.layer)) for g in groups.of_kind("ffn_channel")}
    merged = prune(wrapped, plan_keeping(groups, keep)).merge_and_unload()
    save(merged, tmp_path / "out")
    assert torch.allclose(logits(load(tmp_path / "out")[0]), logits(merged))


def _broken(tmp_path, change):
    folder = tmp_path / "broken"
    save(cut("llama_mha", uneven=True), folder)
    change(folder)
    return folder


def _drop_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors")


def _widen_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(99, 64)
    save_file(weights, folder / "model.safetensors")


def _change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "reads no pickles"),
        (lambda f: (f / "model.safetensors").write_bytes(b"short"), "cannot be read"),
        (_drop_a_weight, "lacks the weights of model.layers.0.mlp.up_proj.weight"),
        (_widen_a_weight, "do not fit its config.json"),
        (lambda f: _change_config(f, format=99), "has format 99"),
        (lambda f: _change_config(f, stages=[{"nowhere:kv_head": [0]}]), "no group is called 'nowhere:kv_head'"),
    ],
)
def test_a_broken_checkpoint_is_refused_by_name(change, message, tmp_path):
    with pytest.raises(PrunekitError, match=message):
        load(_broken(tmp_path, change))


def test_a_path_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(PrunekitError, match="does not exist; give a checkpoint folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(PrunekitError, match="is no checkpoint: it has no config.json"):
        load(tmp_path)


def test_a_plain_checkpoint_with_missing_weights_is_refused(tmp_path):
    save(FAMILIES["llama_mha"].model(), tmp_path / "out")
    _drop_a_weight(tmp_path / "out")
    with pytest.raises(PrunekitError, match="lacks weights"):
        load(tmp_path / "out")


def test_the_public_vocabulary_is_whole_and_opens_no_room_unasked():
    assert all(hasattr(pk, name) for name in pk.__all__) and set(pk.__all__) <= set(dir(pk))
    assert sorted(name for names in pk._ROOMS.values() for name in names) == sorted(pk.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nowhere'"):
        pk.nowhere  # noqa: B018
    quick = "import sys, prunekit.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", quick], timeout=60).returncode == 0
