"""A checkpoint is pruned without being loaded: the same result, little memory, and nothing lost when killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from evaluation_helpers import dense_folder
from families import FAMILIES, logits, plan_keeping, tokens
from other_families import EVERYONE, UNLISTED
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import prunekit as pk
from prunekit import (
    Ablation,
    Activation,
    Curvature,
    HyWIA,
    Magnitude,
    PrunekitError,
    PruningPlan,
    Random,
    Taylor,
    prune_checkpoint,
)
from prunekit.checkpoint import mapped_weights, streaming
from prunekit.checkpoint.folders import stored_tensors
from prunekit.checkpoint.mapped_weights import map_checkpoint
from prunekit.checkpoint.stream_work import Work
from prunekit.cli import main
from prunekit.digests import recorded
from prunekit.importance import Scores

MIXTRAL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MIXTRAL |= {"num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 64}


def write(folder, name="llama_gqa", dtype=torch.float32):
    """A checkpoint of a tiny model in many shards."""
    model = EVERYONE[name].model(dtype=torch.float32)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder


def in_memory(source, out, importance, ratio, calib=None, **options):
    """The same by the functions of the pipe."""
    model, _ = pk.load(source)
    groups = pk.discover(model)
    scores = pk.score(model, groups.of_kind("kv_head", "ffn_channel"), importance, calib)
    plan = pk.plan(groups, scores, ratio, **options)
    small = pk.prune(model, plan)
    pk.save(small, out, plan=plan)
    return small, plan


def card(folder):
    """A model card without what `prune` did to the loss, which is not measured where weights stay on disk."""
    return re.sub(r"What `prune` did: .*\n\n", "", (folder / "README.md").read_text())


@pytest.mark.parametrize(
    ("name", "dtype", "importance", "options"),
    [
        ("llama_gqa", torch.float32, Magnitude(), {"of": "units"}),
        ("llama_gqa", torch.float16, Activation(), {}),
        ("llama_tied", torch.bfloat16, Magnitude(1), {"of": "units", "round_to": 2}),
        ("llama_tied", torch.float32, Activation(), {"ranking": "global"}),
        ("gpt2", torch.float16, Magnitude(), {}),
        ("gpt_neox", torch.float32, Random(3), {"protect_layers": range(1)}),
        ("llama_gqa", torch.float32, Curvature(), {}),
        ("gemma2", torch.float32, Curvature(), {"of": "units"}),
        ("gpt2", torch.float32, Taylor("vector"), {}),
        ("llama_tied", torch.bfloat16, Taylor(order="mixed"), {"of": "units"}),
        ("opt", torch.float32, HyWIA(), {}),
        ("openai_gpt", torch.float32, Taylor(), {"of": "units"}),  # whose layers return lists
    ],
)
def test_it_gives_what_the_pipe_in_memory_gives(name, dtype, importance, options, tmp_path):
    source = write(tmp_path / "in", name, dtype)
    calib = tokens() if importance.needs_calibration else None
    plan = prune_checkpoint(source, tmp_path / "out", importance, 0.2, calib, max_shard_size="40KB", **options)
    small, expected = in_memory(source, tmp_path / "memory", importance, 0.2, calib, **options)
    again, _ = pk.load(tmp_path / "out")
    assert plan.keep == expected.keep and pk.PruningPlan.load(tmp_path / "out" / "plan.json") == plan
    assert torch.equal(logits(again), logits(small)) and {p.dtype for p in again.parameters()} == {dtype}
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "out" / file).read_text() == (tmp_path / "memory" / file).read_text()
    assert card(tmp_path / "out") == card(tmp_path / "memory")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "memory", "out"]
    assert not list((tmp_path / "out").glob(".*"))


def test_an_even_cut_is_a_plain_checkpoint(tmp_path):
    prune_checkpoint(write(tmp_path / "in", "qwen3"), tmp_path / "out", Magnitude(), 0.25, of="units")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(plain), logits(pk.load(tmp_path / "out")[0]))


def test_a_cut_checkpoint_is_cut_again(tmp_path):
    prune_checkpoint(write(tmp_path / "in"), tmp_path / "one", Magnitude(), 0.2)
    prune_checkpoint(tmp_path / "one", tmp_path / "two", Magnitude(), 0.2)
    small, _ = in_memory(tmp_path / "one", tmp_path / "memory", Magnitude(), 0.2)
    assert torch.equal(logits(pk.load(tmp_path / "two")[0]), logits(small))


@pytest.mark.parametrize("kind", ["layer", "block", "hidden"])
def test_whole_parts_go_and_parameters_are_cut_both_ways(kind, tmp_path):
    source = write(tmp_path / "in", dtype=torch.float16)
    groups = pk.discover(pk.load(source)[0])
    name, channels = groups.of_kind(kind)[0].name, groups.of_kind("ffn_channel")[1]
    keep = {name: list(range(groups[name].n_units // 2)), channels.name: list(range(1, 50))}
    plan = pk.PruningPlan(keep, {n: groups[n].n_units for n in keep}, groups.n_parameters, groups.n_parameters)
    counted = prune_checkpoint(source, tmp_path / "out", plan, max_shard_size="30KB")
    small = pk.prune(pk.load(source)[0], plan)
    assert torch.equal(logits(pk.load(tmp_path / "out")[0]), logits(small))
    assert counted.n_parameters_kept == sum(p.numel() for p in small.parameters()) < groups.n_parameters


def test_a_plan_is_taken_as_it_is(tmp_path):
    source = write(tmp_path / "in")
    small, plan = in_memory(source, tmp_path / "memory", Magnitude(), 0.3)
    prune_checkpoint(source, tmp_path / "out", plan, notes={"made by": "hand"})
    assert torch.equal(logits(pk.load(tmp_path / "out")[0]), logits(small))
    assert pk.PruningPlan.load(tmp_path / "out" / "plan.json").notes["made by"] == "hand"


def test_a_tokenizer_of_tokens_that_went_does_not_travel_along(dense, tmp_path):
    groups = pk.discover(pk.load(dense)[0])
    for n_left in (200, 258):
        plan = plan_keeping(groups, {"vocabulary": list(range(n_left))})
        prune_checkpoint(dense, tmp_path / str(n_left), plan)
        model, tokenizer = pk.load(tmp_path / str(n_left))
        assert model.config.vocab_size == n_left and (tokenizer is None) == (n_left < 258)


def interrupt_while_writing(monkeypatch, with_what=KeyboardInterrupt):
    """A keyboard interrupt, or an error, in place of a shard."""

    def stop(*_, **__):
        raise with_what

    monkeypatch.setattr(mapped_weights, "save_file", stop)


def test_scores_are_those_of_score_and_are_not_made_twice(tmp_path, monkeypatch):
    source, work = write(tmp_path / "in"), tmp_path / ".out.partial"
    interrupt_while_writing(monkeypatch)
    with pytest.raises(KeyboardInterrupt, match=r"what is finished lies in .*\.out\.partial'; the same call goes on"):
        prune_checkpoint(source, tmp_path / "out", Magnitude(), 0.2)
    assert not (tmp_path / "out").exists() and not (work / "checkpoint" / "config.json").exists()
    model, _ = pk.load(source)
    expected = pk.score(model, pk.discover(model).of_kind("kv_head", "ffn_channel"), Magnitude())
    found = Scores.load(work / "scores.safetensors")
    assert list(found) == list(expected) and found.label == expected.label and found.kinds == expected.kinds
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    for name in ("checkpoint/plan.json", "written.json"):  # as if killed between the two
        (work / name).unlink()
    monkeypatch.undo()
    monkeypatch.setattr(Magnitude, "unit_scores", lambda *_: pytest.fail("scored again"))
    prune_checkpoint(source, tmp_path / "out", Magnitude(), 0.2)
    assert pk.load(tmp_path / "out") and not work.exists()


def test_a_full_disk_is_said_and_costs_nothing_that_is_finished(tmp_path, monkeypatch):
    source = write(tmp_path / "in")
    interrupt_while_writing(monkeypatch, OSError(28, "No space left on device"))
    with pytest.raises(PrunekitError, match="No space left on device.*what is finished lies in"):
        prune_checkpoint(source, tmp_path / "out", Magnitude(), 0.2)
    monkeypatch.undo()
    assert prune_checkpoint(source, tmp_path / "out", Magnitude(), 0.2) and pk.load(tmp_path / "out")


def test_the_dtype_is_that_of_the_files_whatever_the_configuration_says(tmp_path):
    source = write(tmp_path / "in")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    prune_checkpoint(source, tmp_path / "out", Magnitude(), 0.2)
    assert {p.dtype for p in pk.load(tmp_path / "out")[0].parameters()} == {torch.float32}


SLOW = """
import sys, time
import prunekit as pk
from prunekit.checkpoint import mapped_weights, streaming
from prunekit.checkpoint.folders import stored_tensors
from prunekit.importance import Scores

def slowed(function):
    def slow(*args, **options):
        found = function(*args, **options)
        time.sleep(0.3)
        return found
    return slow

Scores.save = slowed(Scores.save)
mapped_weights.save_file = slowed(mapped_weights.save_file)
pk.prune_checkpoint(sys.argv[1], sys.argv[2], pk.Magnitude(), 0.2, max_shard_size="40KB")
"""


def kill_when(script, arguments, reached):
    """SIGKILL a process as soon as `reached()`."""
    process = subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], stderr=subprocess.DEVNULL)
    while not reached():
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def shards_in(note):
    return [name for name in recorded(note) if name.startswith("model")]


@pytest.mark.slow
def test_killed_twice_it_goes_on_to_the_same_bytes(tmp_path):
    source, out, work = write(tmp_path / "in"), tmp_path / "out", tmp_path / ".out.partial"
    shards = work / "checkpoint"
    kill_when(SLOW, (source, out), lambda: (work / "scores.safetensors").exists())
    assert 0 < len(Scores.load(work / "scores.safetensors")) < 4 and not list(shards.glob("model*"))
    assert (tmp_path / ".out.partial.lock").exists()
    # A shard that was killed between its move into place and its record is written again.
    kill_when(SLOW, (source, out), lambda: len(shards_in(work / "written.json")) == 2)
    before = {name: (shards / name).stat().st_mtime_ns for name in shards_in(work / "written.json")}
    assert not out.exists()
    prune_checkpoint(source, out, Magnitude(), 0.2, max_shard_size="40KB")
    prune_checkpoint(source, tmp_path / "whole", Magnitude(), 0.2, max_shard_size="40KB")
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
    }
    assert len(list(out.glob("*.safetensors"))) > 4 and not work.exists()


MEASURED = """
import re, sys, threading, time
import torch
import prunekit as pk
from prunekit.checkpoint import streaming

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024

def sample():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.005)

calib = torch.arange(32)[None]
how = {"activation": pk.Activation(), "taylor": pk.Taylor()}[sys.argv[3]]
model = pk.load("world")[0]  # what torch sets up once
pk.score(model, pk.discover(model), how, calib)
before = anonymous()
peak = [before]
threading.Thread(target=sample, daemon=True).start()
streaming.prune_checkpoint(sys.argv[1], sys.argv[2], how, 0.2, calib, max_shard_size="20MB", of="units")
print(peak[0] - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A float16 checkpoint of 390 MB."""
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2752,
        num_hidden_layers=16,
        num_attention_heads=16,
        head_dim=64,
        num_key_value_heads=4,
        vocab_size=8000,
        dtype=torch.float16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).half()
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.uniform_(-0.05, 0.05)
    folder = tmp_path_factory.mktemp("large") / "in"
    model.save_pretrained(folder, max_shard_size="100MB")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("importance", ["activation", "taylor"])  # which compute: magnitude reads weights alone
def test_memory_is_that_of_a_few_parameters(importance, large, tmp_path):
    arguments = [sys.executable, "-c", MEASURED, str(large), str(tmp_path / "out"), importance]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    size = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    assert size > 380e6 and 0 < int(done.stdout.split()[-1]) < size / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"how": Ablation()}, r"Ablation.* ablates units in memory.*take Curvature\(\), Taylor\(\), Activation\(\)"),
        ({"how": "l2"}, "how='l2' is not allowed; give an importance"),
        ({"ratio": None}, "give pruning_ratio, such as 0.2"),
        ({"how": Activation()}, "needs a calibration set"),
        ({"source": "some/hub-id"}, "'some/hub-id' is not a folder on this machine"),
        ({"max_shard_size": "large"}, "max_shard_size='large' is no size"),
        ({"ratio": 0.99}, "pruning_ratio=0.99 cannot be met"),
        ({"ranking": "sideways"}, "ranking='sideways' is unknown"),
        ({"kinds": ["expert"]}, "no groups of the kind 'expert'; it has kv_head, "),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(changes, message, tmp_path, monkeypatch):
    monkeypatch.setattr(Magnitude, "unit_scores", lambda *_: pytest.fail("scored before it was refused"))
    given = {"source": write(tmp_path / "in"), "how": Magnitude(), "ratio": 0.2} | changes
    source, how, ratio = (given.pop(name) for name in ("source", "how", "ratio"))
    with pytest.raises(PrunekitError, match=message):
        prune_checkpoint(source, tmp_path / "out", how, ratio, **given)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("position", "value", "named"),
    [(0, 3, "source=3"), (1, None, "out=None"), (3, "much", "pruning_ratio='much'"), (4, [[1, 2]], "calib=")],
)
def test_arguments_of_another_type_are_refused_by_name(position, value, named, tmp_path):
    arguments = [write(tmp_path / "in"), tmp_path / "out", Magnitude(), 0.2, None]
    arguments[position] = value
    with pytest.raises(PrunekitError, match=rf"{re.escape(named)}.* is not allowed; give "):
        prune_checkpoint(*arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_second_run_at_the_same_output_is_refused_while_the_first_is_at_work(tmp_path, monkeypatch):
    source, seen = write(tmp_path / "in"), []

    def meanwhile(*arguments):
        with pytest.raises(PrunekitError, match=r"another run is at work in .*\.out\.partial'; wait until it ends"):
            prune_checkpoint(source, tmp_path / "out", Magnitude(), 0.2)
        seen.append(arguments)
        return cut(*arguments)

    cut = streaming.cut_without_weights
    monkeypatch.setattr(streaming, "cut_without_weights", meanwhile)
    prune_checkpoint(source, tmp_path / "out", Magnitude(), 0.2)
    assert seen and {path.name for path in tmp_path.iterdir()} == {"in", "out"} and pk.load(tmp_path / "out")


def test_what_came_to_stand_in_the_outputs_place_meanwhile_is_left_alone(tmp_path, monkeypatch):
    source, out = write(tmp_path / "in"), tmp_path / "out"

    def meanwhile(*arguments):
        out.mkdir()
        (out / "mine").write_text("precious")
        return write_the_rest(*arguments)

    write_the_rest = streaming.write_the_rest
    monkeypatch.setattr(streaming, "write_the_rest", meanwhile)
    with pytest.raises(PrunekitError, match=r"out' exists; choose a new folder, or remove it first"):
        prune_checkpoint(source, out, Magnitude(), 0.2)
    assert [path.name for path in out.iterdir()] == ["mine"]
    monkeypatch.undo()
    (out / "mine").unlink()
    monkeypatch.setattr(mapped_weights, "save_file", lambda *_, **__: pytest.fail("written again"))
    assert prune_checkpoint(source, out, Magnitude(), 0.2) and pk.load(out)


def test_a_lock_that_a_killed_run_left_blocks_nobody(tmp_path):
    (tmp_path / ".out.partial.lock").touch()
    prune_checkpoint(write(tmp_path / "in"), tmp_path / "out", Magnitude(), 0.2)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


@pytest.mark.slow
def test_a_system_without_such_locks_streams_too(tmp_path):
    script = "import sys; sys.modules['fcntl'] = None; import prunekit as pk; "
    script += "pk.prune_checkpoint(sys.argv[1], sys.argv[2], pk.Magnitude(), 0.2)"
    arguments = [sys.executable, "-c", script, str(write(tmp_path / "in")), str(tmp_path / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"} and pk.load(tmp_path / "out")


def test_damaged_notes_of_an_unfinished_run_are_named(tmp_path):
    source, notes = write(tmp_path / "in"), tmp_path / ".out.partial" / "scoring.json"
    notes.parent.mkdir()
    notes.write_text("{")
    with pytest.raises(PrunekitError, match=r"scoring\.json' is not JSON"):
        prune_checkpoint(source, tmp_path / "out", Magnitude(), 0.2)


def test_an_unfinished_run_of_other_arguments_is_not_taken_over(tmp_path, monkeypatch):
    source, out = write(tmp_path / "in"), tmp_path / "out"
    interrupt_while_writing(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(source, out, Magnitude(), 0.2)
    for how, ratio, options, what in (
        (Magnitude(1), 0.2, {}, "importance"),
        (Magnitude(), 0.3, {}, "pruning_ratio: 0.2, now 0.3"),
        (Magnitude(), 0.2, {"max_shard_size": "1KB"}, "max_shard_size"),
        (Magnitude(), 0.2, {"ranking": "global"}, "options"),
    ):
        with pytest.raises(PrunekitError, match=f"unfinished run with another {what}.*remove that folder"):
            prune_checkpoint(source, out, how, ratio, **options)
    os.utime(next(source.glob("*.safetensors")), (1, 1))
    with pytest.raises(PrunekitError, match="another files"):
        prune_checkpoint(source, out, Magnitude(), 0.2)


def write_experts(folder, name):
    """A checkpoint in the hub's form, which stores experts one by one; transformers stacks them on loading."""
    model = {**FAMILIES, **UNLISTED}[name].model(dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size="60KB")
    assert not set(stored_tensors(folder)) >= {n for n, _ in model.named_parameters()}
    return folder


@pytest.mark.parametrize(
    ("name", "importance", "kind"),
    [
        ("mixtral", Magnitude(), "expert"),
        ("mixtral", Activation(), "ffn_channel"),
        ("qwen3_moe", Activation(), "expert"),
        ("glm4_moe", Magnitude(), "ffn_channel"),
    ],
)
def test_experts_that_are_stored_one_by_one_are_streamed(name, importance, kind, tmp_path):
    source = write_experts(tmp_path / "in", name)
    calib = tokens() if importance.needs_calibration else None
    options = {"of": "units", "kinds": [kind]}
    plan = prune_checkpoint(source, tmp_path / "out", importance, 0.25, calib, max_shard_size="40KB", **options)
    model, _ = pk.load(source)
    groups = pk.discover(model)
    expected = pk.plan(groups, pk.score(model, groups.of_kind(kind), importance, calib), 0.25, **options)
    assert plan.keep == expected.keep and plan.n_parameters_kept < plan.n_parameters
    again, _ = pk.load(tmp_path / "out")
    assert torch.equal(logits(again), logits(pk.prune(model, expected)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_a_converted_copy_is_made_once_and_after_the_order_was_checked(tmp_path, monkeypatch):
    source, out, made = write_experts(tmp_path / "in", "mixtral"), tmp_path / "out", []
    convert = streaming.convert
    monkeypatch.setattr(streaming, "convert", lambda *args: (made.append(args), convert(*args)))
    for how, ratio, why in (
        (Magnitude(), {"rank": 0.5}, "no groups of the kind 'rank'"),
        (pk.PruningPlan({"here": [0]}, {"here": 2}, 9, 5), None, "plan is for another model"),
    ):
        with pytest.raises(PrunekitError, match=why):
            prune_checkpoint(source, out, how, ratio, **({} if ratio is None else {"of": "units"}))
    assert not made and not list(tmp_path.glob(".out*"))
    monkeypatch.setattr(streaming, "write_the_rest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(source, out, Magnitude(), 0.2)
    (Work(out).root / ".source.abc").mkdir()  # as a killed run leaves it
    monkeypatch.undo()
    monkeypatch.setattr(streaming, "convert", lambda *_: pytest.fail("converted twice"))
    prune_checkpoint(source, out, Magnitude(), 0.2)
    assert len(made) == 1 and sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_what_transformers_does_not_write_in_the_form_of_the_model_is_refused(tmp_path, monkeypatch):
    source = write_experts(tmp_path / "in", "mixtral")
    whole = MixtralForCausalLM.save_pretrained
    monkeypatch.setattr(MixtralForCausalLM, "save_pretrained", lambda self, out, **_: whole(pk.load(source)[0], out))
    with pytest.raises(PrunekitError, match="cannot be streamed: transformers puts its tensors together in memory"):
        prune_checkpoint(source, tmp_path / "out", Magnitude(), 0.2)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_a_weight_that_is_not_finite_is_refused(name, tmp_path):
    source = write(tmp_path / "in")
    for shard in source.glob("*.safetensors"):
        weights = load_file(shard)
        if name in weights:
            weights = {n: t.clone() for n, t in weights.items()}
            weights[name][0, 0] = float("nan")
            save_file(weights, shard, metadata={"format": "pt"})
    with pytest.raises(PrunekitError, match="not finite|NaN or infinite"):
        prune_checkpoint(source, tmp_path / "out", Magnitude(), 0.2)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux' list of mapped files")
def test_a_cut_checkpoint_stays_mapped(tmp_path):
    """Where a plain load copies it to memory of torch's own."""
    family = FAMILIES["llama_gqa"]
    groups = family.groups()
    keep = {groups.of_kind("ffn_channel")[0].name: list(range(17))}
    pk.save(pk.prune(family.model(), plan_keeping(groups, keep)), tmp_path / "cut")
    for load_it, of_files in ((map_checkpoint, True), (pk.load, False)):
        model, _ = load_it(tmp_path / "cut")
        lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
        spans = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
        mapped = [any(low <= p.data_ptr() < high for low, high in spans) for p in model.parameters()]
        assert set(mapped) == {of_files}
        del model


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return dense_folder(tmp_path_factory.mktemp("models"), max_shard_size="60KB")


def run(*arguments):
    return main(["prune", *map(str, arguments)])


def test_from_a_shell_with_and_without_streaming(dense, tmp_path, capsys):
    options = ("--pruning-ratio", "0.2", "--importance", "activation", "--n-samples", "4", "--seq-len", "16")
    options += ("--calibration", dense.parent / "text.txt", "--max-shard-size", "50KB")
    assert run(dense, *options, "--streaming", "--out", tmp_path / "a") == 0
    assert run(dense, *options, "--no-streaming", "--out", tmp_path / "b") == 0
    a, b = (pk.load(tmp_path / name) for name in "ab")
    assert torch.equal(logits(a[0]), logits(b[0])) and a[1] is not None
    assert card(tmp_path / "a") == card(tmp_path / "b")
    assert "4 windows of 16 tokens" in (tmp_path / "a" / "README.md").read_text()
    plan = tmp_path / "a" / "plan.json"
    assert run(dense, "--plan", plan, "--streaming", "--out", tmp_path / "c") == 0
    assert torch.equal(logits(pk.load(tmp_path / "c")[0]), logits(a[0]))


def test_a_checkpoint_larger_than_the_free_memory_is_streamed_unasked(dense, tmp_path, capsys, monkeypatch):
    options = ("--pruning-ratio", "0.2", "--importance", "l2")
    run(dense, *options, "--out", tmp_path / "a")
    assert "streaming" not in capsys.readouterr().err
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr("prunekit.load", lambda *_: pytest.fail("loaded"))
    assert run(dense, *options, "--out", tmp_path / "b") == 0
    assert "GB of free memory: streaming" in capsys.readouterr().err
    options = ("--pruning-ratio", "0.2", "--n-samples", "4", "--seq-len", "16")
    assert run(dense, *options, "--out", tmp_path / "c") == 2
    assert "reads text; give --calibration" in capsys.readouterr().err
    options += ("--calibration", dense.parent / "text.txt")
    assert run(dense, *options, "--out", tmp_path / "c") == 0
    monkeypatch.undo()
    assert run(dense, *options, "--compensate", "none", "--out", tmp_path / "d") == 0
    streamed, loaded = (PruningPlan.load(tmp_path / name / "plan.json") for name in "cd")
    assert streamed.keep == loaded.keep and streamed.notes["importance"] == loaded.notes["importance"] == "curvature"


def test_what_curvature_cannot_score_is_scored_by_taylor_on_disk_too(dense, tmp_path, capsys):
    """Experts that are stored one by one, and stacked in the model."""
    model = MixtralForCausalLM(MixtralConfig(**MIXTRAL, vocab_size=len(AutoTokenizer.from_pretrained(dense))))
    model.save_pretrained(tmp_path / "in")
    AutoTokenizer.from_pretrained(dense).save_pretrained(tmp_path / "in")
    options = ("--pruning-ratio", "0.2", "--n-samples", "4", "--seq-len", "16", "--of", "units")
    options += ("--calibration", dense.parent / "text.txt", "--compensate", "none")
    for name, more in {"a": ["--no-streaming"], "b": ["--streaming"]}.items():
        given = options[:-2] if name == "b" else options  # nothing is re-fitted there
        assert run(tmp_path / "in", *given, *more, "--out", tmp_path / name) == 0
        assert "scored by taylor" in capsys.readouterr().err
    plans = [PruningPlan.load(tmp_path / name / "plan.json") for name in "ab"]
    assert plans[0].keep == plans[1].keep and plans[0].gone


def test_an_interrupt_from_a_shell_says_where_to_go_on(dense, tmp_path, capsys, monkeypatch):
    interrupt_while_writing(monkeypatch)
    options = ("--pruning-ratio", "0.2", "--importance", "l2", "--streaming", "--out", tmp_path / "out")
    assert run(dense, *options) == 130
    assert ".out.partial" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(dense, *options) == 0 and pk.load(tmp_path / "out")


def test_the_embedded_model_is_not_streamed(tmp_path, capsys):
    options = ("--pruning-ratio", "0.2", "--importance", "activation", "--streaming", "--out", tmp_path / "out")
    assert run("world", *options) == 2
    assert "'world' is not a folder on this machine" in capsys.readouterr().err


def test_a_disk_without_locks_streams_too(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("prunekit.checkpoint.stream_work.fcntl.flock", refused)
    with Work(tmp_path / "out").alone():
        pass


def test_a_lock_that_is_of_no_file_any_more_is_none(tmp_path, monkeypatch):
    """Another run ended, and took the file away, between our opening and locking it."""
    lock = tmp_path / ".out.partial.lock"
    monkeypatch.setattr("prunekit.checkpoint.stream_work.fcntl.flock", lambda *_: lock.unlink())
    with pytest.raises(PrunekitError, match="another run is at work"), Work(tmp_path / "out").alone():
        pass


def test_a_plan_leaves_nothing_else_to_say(tmp_path):
    plan = PruningPlan({}, {}, 10, 10)
    with pytest.raises(PrunekitError, match=r"the plan gives the removed units already; leave out round_to=8"):
        prune_checkpoint("anywhere", tmp_path / "out", plan, round_to=8)
