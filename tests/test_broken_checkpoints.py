"""Checkpoints broken each in its own way: a clear refusal, in Python and from the shell, and nothing touched."""

import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import cut, digest, same_cut
from evaluation_helpers import byte_tokenizer, llama
from families import FAMILIES, plan_keeping
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

import prunekit as pk
from prunekit import PrunekitError
from prunekit.checkpoint.loading import load_structure
from prunekit.cli import main

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Three sound folders: a plain checkpoint, a sharded one, and one of an uneven cut."""
    root = tmp_path_factory.mktemp("good")
    pk.save(llama(), root / "plain", tokenizer=byte_tokenizer())
    pk.save(llama(), root / "sharded", max_shard_size="20KB")
    pk.save(same_cut("llama_gqa", True), root / "cut")
    for folder in root.iterdir():
        pk.load(folder)
    return root


# --- ways to break a folder -------------------------------------------------------------------------------------------


def config(**changes):
    return lambda folder: edit(folder / "config.json", changes)


def base(**changes):
    def change(folder):
        whole = json.loads((folder / "config.json").read_text())["base_config"]
        edit(folder / "config.json", {"base_config": {**whole, **changes}})

    return change


def edit(path, changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def text(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def gone(name):
    return lambda folder: (folder / name).unlink()


def link(name, target):
    def change(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return change


def directory(name):
    def change(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def tensors(change):
    def apply(folder):
        weights = load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, folder / WEIGHTS, {"format": "pt"})

    return apply


def index(change):
    def apply(folder):
        content = json.loads((folder / INDEX).read_text())
        change(content["weight_map"])
        (folder / INDEX).write_text(json.dumps(content))

    return apply


def torn(name, part):
    def change(folder):
        path = next(folder.glob(name))
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * part)])

    return change


def stages(change):
    def apply(folder):
        content = json.loads((folder / "config.json").read_text())
        edit(folder / "config.json", {"stages": change(content["stages"])})

    return apply


def stage(**keep):
    named = {f"model.layers.0.{name.replace('__', ':')}": units for name, units in keep.items()}
    return stages(lambda old: [{**old[0], **named}])


def encoder(folder):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    shutil.rmtree(folder)
    BertForMaskedLM(BertConfig(vocab_size=40, **sizes)).save_pretrained(folder)


def remote_code(folder):
    edit(folder / "config.json", {"model_type": "theirs", "auto_map": {"AutoModelForCausalLM": "theirs.Model"}})
    (folder / "theirs.py").write_text("import pathlib\npathlib.Path(__file__).with_name('ran').write_text('')\n")


def adapter_only(folder):
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "theirs"}')


def written_by_save_pretrained(folder):
    shutil.rmtree(folder)
    small = cut("llama_gqa", uneven=True)
    type(small).save_pretrained(small, folder)  # its own refuses


def pickled(folder):
    (folder / WEIGHTS).unlink()
    torch.save({"w": torch.zeros(2)}, folder / "pytorch_model.bin")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def two_shards_with_one_tensor(folder):
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    weights = load_file(first)
    weights |= dict(list(load_file(second).items())[:1])
    save_file(weights, first, {"format": "pt"})


def a_link_to_itself(folder):
    shutil.rmtree(folder)
    folder.symlink_to(folder.name)


def a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("")


HEADER = struct.pack("<Q", 2) + b"{]"
LOAD = {
    # the folder
    "a file in its place": ("plain", a_file, ["is a file", "give the folder"]),
    "a link to itself": ("plain", a_link_to_itself, ["link that leads nowhere"]),
    "an adapter alone": ("plain", adapter_only, ["holds an adapter only", "merge_and_unload"]),
    # config.json
    "no configuration": ("plain", gone("config.json"), ["has no config.json"]),
    "a folder called config.json": ("plain", directory("config.json"), ["config.json", "it is a folder"]),
    "a configuration linked nowhere": ("plain", link("config.json", "gone"), ["config.json", "No such file"]),
    "a configuration linked to itself": (
        "plain",
        link("config.json", "config.json"),
        ["config.json", "Too many levels"],
    ),
    "a configuration that is not JSON": ("plain", text("config.json", b"{'a': 1}"), ["config.json", "is not JSON"]),
    "a configuration that is not text": ("plain", text("config.json", b"\xff\xfe"), ["config.json", "as text"]),
    "a configuration nested too deep": ("plain", text("config.json", b"[" * 200_000), ["config.json", "is not JSON"]),
    "a configuration that is a list": ("plain", text("config.json", b"[1]"), ["holds no JSON object but a list"]),
    "a configuration that says nothing": ("plain", text("config.json", b"{}"), ["cannot load", "model_type"]),
    "an unknown kind of model": ("plain", config(model_type="mystery"), ["cannot load", "mystery"]),
    "an encoder": ("plain", encoder, ["BertForMaskedLM", "no causal language model"]),
    "code of its own": ("plain", remote_code, ["cannot load", "theirs"]),
    "quantized weights": ("plain", config(quantization_config={"quant_method": "awq"}), ["is quantized"]),
    "a cut written by save_pretrained": ("plain", written_by_save_pretrained, ["was cut by prunekit", "prunekit.save"]),
    "another vocabulary": ("plain", config(vocab_size=300), ["wrong shape", "embed_tokens"]),
    "KV heads that do not divide the heads": ("plain", config(num_key_value_heads=3), ["wrong shape", "k_proj"]),
    "a width below zero": ("plain", config(intermediate_size=-8), ["cannot load", "intermediate_size=-8"]),
    "a width that is a word": ("plain", config(intermediate_size="wide"), ["cannot load", "intermediate_size"]),
    "a width beyond all memory": ("plain", config(intermediate_size=10**9), ["asks for", "parameters", "hold"]),
    "a billion layers": (
        "plain",
        config(num_hidden_layers=10**9),
        ["num_hidden_layers=1,000,000,000"],
    ),
    # weights
    "no weights": ("plain", gone(WEIGHTS), ["has no safetensors weights", "none"]),
    "a pickle": ("plain", pickled, ["pytorch_model.bin", "reads no pickles"]),
    "a pickle by another name": ("plain", text(WEIGHTS, pickle.dumps(Bomb())), [WEIGHTS, "a pickle by another name"]),
    "weights cut short": ("plain", torn(WEIGHTS, 0.5), [WEIGHTS, "cannot be read"]),
    "weights without a byte": ("plain", text(WEIGHTS, b""), [WEIGHTS, "cannot be read"]),
    "a header longer than the file": ("plain", text(WEIGHTS, struct.pack("<Q", 2**40)), [WEIGHTS, "cannot be read"]),
    "a header that is not JSON": ("plain", text(WEIGHTS, HEADER), [WEIGHTS, "cannot be read"]),
    "a folder called weights": ("plain", directory(WEIGHTS), ["neither", WEIGHTS]),
    "weights linked nowhere": ("plain", link(WEIGHTS, "gone"), ["neither", WEIGHTS]),
    "weights linked to themselves": ("plain", link(WEIGHTS, WEIGHTS), ["neither", WEIGHTS]),
    "a tensor missing": ("plain", tensors(lambda w: w.pop(UP)), ["lacks weights", UP]),
    "a tensor of another shape": (
        "plain",
        tensors(lambda w: w.update({UP: w[UP].T.contiguous()})),
        ["wrong shape", UP],
    ),
    "whole numbers": ("plain", tensors(lambda w: w.update({UP: w[UP].int()})), [UP, "stored as I32"]),
    "eight bits": ("plain", tensors(lambda w: w.update({UP: w[UP].to(torch.float8_e4m3fn)})), [UP, "F8_E4M3", "BF16"]),
    # the index of shards
    "an index that is not JSON": ("sharded", text(INDEX, b"{"), [INDEX, "is not JSON"]),
    "an index without a map": ("sharded", text(INDEX, b"{}"), [INDEX, "no weight_map"]),
    "an index that maps to numbers": ("sharded", index(lambda m: m.update({UP: 3})), [INDEX, "no weight_map"]),
    "a shard that is not there": (
        "sharded",
        index(lambda m: m.update({UP: "x.safetensors"})),
        ["x.safetensors", "No such"],
    ),
    "a tensor in another shard": ("sharded", index(lambda m: m.update({UP: m["lm_head.weight"]})), ["seeks", UP]),
    "a tensor in no shard": ("sharded", index(lambda m: m.update(more=m[UP])), ["'more'", "no file"]),
    "a shard outside the folder": (
        "sharded",
        index(lambda m: m.update({UP: "../plain/" + WEIGHTS})),
        ["../plain", "same"],
    ),
    "a shard by its whole path": (
        "sharded",
        index(lambda m: m.update({UP: "/x.safetensors"})),
        ["/x.safetensors", "same"],
    ),
    "a shard that is a pickle": ("sharded", index(lambda m: m.update({UP: "x.bin"})), ["x.bin", "only a safetensors"]),
    "a tensor in two shards": ("sharded", two_shards_with_one_tensor, ["stands in", "00002-of"]),
    "a shard cut short": ("sharded", torn("model-00002*", 0.7), ["00002-of", "cannot be read"]),
    "a shard missing": ("sharded", lambda f: next(f.glob("model-00002*")).unlink(), ["00002-of", "No such file"]),
    # what is said of a cut
    "a format of the future": ("cut", config(format=2), ["has format 2", "reads 1"]),
    "no format": ("cut", config(format=None), ["has format None"]),
    "stages that are no list": ("cut", config(stages={}), ["stages", "a list of group name"]),
    "biases that are no names": ("cut", config(biases=[3]), ["biases", "list of names"]),
    "a bias of what is no layer": ("cut", config(biases=["model.norm.bias"]), ["no linear layer", "model.norm.bias"]),
    "a bias that is not stored": (
        "cut",
        config(biases=["model.layers.0.mlp.up_proj.bias"]),
        ["lacks the weights of model.layers.0.mlp.up_proj.bias"],
    ),
    "units that are words": ("cut", stage(mlp__ffn_channel=["all"]), ["stages", "units kept"]),
    "a group that is not there": ("cut", stage(mlp__nose=[0]), ["no group is called 'model.layers.0.mlp:nose'"]),
    "a unit that is not there": ("cut", stage(mlp__ffn_channel=[0, 96]), ["ffn_channel", "0 to 95"]),
    "units out of order": ("cut", stage(mlp__ffn_channel=[5, 3]), ["ffn_channel", "ascending"]),
    "a unit twice": ("cut", stage(mlp__ffn_channel=[3, 3]), ["ffn_channel", "distinct"]),
    "nothing kept": ("cut", stage(mlp__ffn_channel=[]), ["ffn_channel", "non-empty"]),
    "more kept than stored": ("cut", stage(mlp__ffn_channel=list(range(60))), ["do not fit"]),
    "a stage too many": (
        "cut",
        stages(lambda s: [*s, {"model.layers.0.mlp:ffn_channel": [0, 1]}]),
        ["do not fit"],
    ),
    "no base": ("cut", config(base_config=None), ["must have base_config, an object"]),
    "a base of no known kind": ("cut", base(model_type="mystery"), ["does not lead to a model", "mystery"]),
    "a base that its family refuses": ("cut", base(num_attention_heads=7), ["does not lead to a model"]),
    "a base beyond all memory": ("cut", base(hidden_size=8 * 10**9), ["asks for", "parameters", "hold"]),
    "a base of a billion layers": ("cut", base(num_hidden_layers=10**9), ["num_hidden_layers=1,000,000,000"]),
    "a cut tensor missing": ("cut", tensors(lambda w: w.pop(UP)), ["lacks the weights of", UP]),
    "a tensor too many": ("cut", tensors(lambda w: w.update(more=w[UP].clone())), ["holds 'more'", "knows nothing of"]),
    "a cut tensor of another shape": ("cut", tensors(lambda w: w.update({UP: w[UP][1:]})), ["do not fit", UP]),
    "whole numbers in a cut": ("cut", tensors(lambda w: w.update({UP: w[UP].int()})), [UP, "stored as I32"]),
    "cut weights cut short": ("cut", torn(WEIGHTS, 0.9), [WEIGHTS, "cannot be read"]),
    # what stands beside
    "a broken tokenizer": ("plain", text("tokenizer.json", b"{"), ["cannot load the tokenizer"]),
    "a broken generation config": (
        "cut",
        text("generation_config.json", b"{"),
        ["generation_config.json", "is not JSON"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LOAD)
def test_load_refuses_by_name_and_touches_nothing(case, good, tmp_path, monkeypatch):
    kind, change, expected = LOAD[case]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(good / kind, tmp_path / "broken")
    change(tmp_path / "broken")
    before, memory = digest(tmp_path), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PrunekitError) as caught:
        pk.load(tmp_path / "broken")
    assert all(part in str(caught.value) for part in expected), caught.value
    assert digest(tmp_path) == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000  # KiB; nothing huge was built


SHELL = ["code of its own", "a pickle by another name", "a shard cut short", "a unit that is not there", "an encoder"]


@pytest.mark.parametrize("case", SHELL)
@pytest.mark.parametrize("command", ["discover", "prune --importance l2 --pruning-ratio 0.2 --out out"])
def test_the_shell_says_it_in_one_line(case, command, good, tmp_path, monkeypatch, capsys):
    kind, change, expected = LOAD[case]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(good / kind, tmp_path / "broken")
    change(tmp_path / "broken")
    before, (name, *options) = digest(tmp_path), command.split()
    assert main([name, "broken", *options]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prunekit: ")]
    assert len(told) == 1 and all(part in told[0] for part in expected)
    assert digest(tmp_path) == before


def test_there_are_enough_ways():
    assert len(LOAD) >= 40 and len({tuple(words) for _, _, words in LOAD.values()}) > 40


# --- saving and exporting ---------------------------------------------------------------------------------------------


def hidden_cut():
    model = FAMILIES["llama_mha"].model(dtype=torch.float32)
    return pk.prune(model, plan_keeping(pk.discover(model), {"hidden": list(range(60))}))


def changed(**attributes):
    def make():
        small = cut("llama_gqa", uneven=True)
        for name, value in attributes.items():
            setattr(small.config, name, value)
        return small

    return make


def on_meta():
    return llama().to("meta")


SAVE = {
    "a place that is taken": (llama, {"out": "taken"}, ["exists; choose a new folder"]),
    "a place under a file": (llama, {"out": "taken/file/x"}, ["cannot write to"]),
    "what is no model": (lambda: torch.nn.Linear(2, 2), {}, ["a Linear cannot be saved"]),
    "a model without weights": (on_meta, {}, ["has no weights in", "embed_tokens"]),
    "a record of nonsense": (changed(prunekit={"stages": 3}), {}, ["cannot be built anew from its cuts"]),
    "a record of another cut": (changed(prunekit={"stages": [{}]}), {}, ["changed by other means"]),
    "a size of no sense": (llama, {"max_shard_size": "much"}, ["max_shard_size='much'", "'5GB'"]),
    "a size of nothing": (llama, {"max_shard_size": 0}, ["max_shard_size=0"]),
    "a text outside the folder": (llama, {"files": {"../x": ""}}, ["'../x'", "names without folders"]),
    "a tokenizer's name": (llama, {"tokenizer": "gpt2"}, ["tokenizer='gpt2'"]),
}
EXPORT = {
    "an unknown layout": (llama, {"layout": "onnx"}, ["layout='onnx'", "'padded'"]),
    "uneven as plain": (lambda: same_cut("opt", True), {}, ["OPTForCausalLM", "layout='padded'"]),
    "heads that no field says": (lambda: same_cut("gpt2", False), {}, ["GPT2LMHeadModel", "layout='padded'"]),
    "norms that count zeros": (hidden_cut, {"layout": "padded"}, ["cannot be padded", "logits would change"]),
    "GGUF of another family": (lambda: same_cut("qwen3", False), {"layout": "gguf"}, ["'qwen3'"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", [*SAVE, *EXPORT])
def test_save_and_export_refuse_and_leave_nothing(case, tmp_path):
    make, options, expected = {**SAVE, **EXPORT}[case]
    model = make()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    before, weights = digest(tmp_path), {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(PrunekitError) as caught:
        (pk.export if case in EXPORT else pk.save)(model, **{"out": tmp_path / "out", **inside(tmp_path, options)})
    assert all(part in str(caught.value) for part in expected), caught.value
    assert digest(tmp_path) == before
    assert all(p.is_meta or torch.equal(p, weights[n]) for n, p in model.named_parameters())


def inside(root, options):
    return {**options, "out": root / options["out"]} if "out" in options else options


# --- disks and permissions --------------------------------------------------------------------------------------------

# What is run as a process of its own: saves and loads where the system refuses it, and tells what was said.
REFUSING = """
import json, os, resource, sys
import prunekit as pk
place, small_disk, *sources = sys.argv[1:]
said = {}

def told(name, work, folder):
    try:
        work()
    except pk.PrunekitError as error:
        said.setdefault(name, []).append([str(error), os.listdir(folder)])

models = [pk.load(source)[0] for source in sources]
os.mkdir(place + "/limited")
before = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
for model in models:
    told("limited", lambda: pk.save(model, place + "/limited/out"), place + "/limited")
resource.setrlimit(resource.RLIMIT_FSIZE, before)
if small_disk:
    told("full", lambda: pk.save(pk.load("world")[0], small_disk + "/out"), small_disk)
os.seteuid(65534) if os.geteuid() == 0 else None  # root may read and write everything
for model in models:
    told("closed", lambda: pk.save(model, place + "/closed/out"), place + "/closed")
for name in ("config", "model"):
    told("unread", lambda: pk.load(place + "/" + name), place)
os.seteuid(os.getuid())
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def refused(good):
    """What is said, and what is there then: of files that may not grow, a full disk, and folders of other users."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        place.chmod(0o755)  # other users may enter it, unlike pytest's own
        for name in ("config.json", WEIGHTS):
            copy = shutil.copytree(good / "plain", place / name.partition(".")[0])
            copy.chmod(0o755)
            (copy / name).chmod(0o000)
        for name in ("closed", "disk"):
            (place / name).mkdir()
        (place / "closed").chmod(0o555)
        mount = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o size=1m tmpfs {place}/disk && exec "$@"', "sh"]
        may_mount = shutil.which("unshare") and not subprocess.run([*mount, "true"], capture_output=True).returncode
        command = [*(mount if may_mount else ()), sys.executable, "-c", REFUSING, folder]
        command += [str(place / "disk") if may_mount else "", str(good / "plain"), str(good / "cut")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        (place / "closed").chmod(0o755)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "n", "why"),
    [("limited", 2, "File too large"), ("full", 1, "No space left"), ("closed", 2, "Permission denied")],
)
def test_what_the_system_does_not_let_be_written_is_told_and_leaves_nothing(name, n, why, refused):
    if name == "full" and name not in refused:
        pytest.skip("may not mount a small tmpfs here; the test with limited files stands in")
    assert len(refused[name]) == n
    assert all("cannot write" in said and why in said and left == [] for said, left in refused[name])


@pytest.mark.slow
def test_files_that_may_not_be_read_are_told(refused):
    assert len(refused["unread"]) == 2
    for name, (said, _) in zip(("config.json", WEIGHTS), refused["unread"], strict=True):
        assert name in said and "Permission denied" in said


def test_an_implementation_that_a_checkpoint_names_is_not_fetched(good, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(good / "cut", folder)
    described = json.loads((folder / "config.json").read_text())
    described["base_config"] |= dict.fromkeys(("attn_implementation", "_attn_implementation"), "somebody/kernel")
    (folder / "config.json").write_text(json.dumps(described))
    loaded, _ = pk.load(folder)
    assert loaded.config._attn_implementation == load_structure(folder).config._attn_implementation == "sdpa"


def test_what_does_not_fit_its_configuration_is_not_discovered(good, tmp_path):
    folder = shutil.copytree(good / "plain", tmp_path / "plain")
    described = json.loads((folder / "config.json").read_text())
    described["intermediate_size"] -= 8
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(PrunekitError, match="wrong shape"):
        load_structure(folder)
