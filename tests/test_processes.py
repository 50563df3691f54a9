"""Several processes, as `torchrun` and `accelerate launch` start them: what one process gives, and one model in all.

gloo joins processes on CPUs. accelerate offers FSDP on GPUs alone (on a CPU it says nothing and does not shard), so a
script says that its CPUs are GPUs.
"""

import json
import os
import shutil
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch
from shared import run_script
from test_importance import tiny_llama
from test_recovery import counting, uneven_llama

import prunekit as pk
from prunekit import PrunekitError, world
from prunekit.cli import main
from prunekit.evaluation import sequence_scores
from prunekit.knowledge.question_spans import Runner
from prunekit.processes import check_alike, is_first, n_sharing, own_share, split_work
from prunekit.recovery import RecoveryLog, training

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo to join processes"),
]
SIX = {"max_steps": 6, "batch_size": 8}
LORA = pk.LoRA(r=4, dropout=0.0, learning_rate=2e-2, **SIX)
FULL = pk.FullTuning(learning_rate=5e-3, **SIX)
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone")
SETTLED = ("--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0")
SHARDS = ("--use_fsdp", "--fsdp_version=2", "--fsdp_cpu_ram_efficient_loading=false")
FSDP = ("-m", "accelerate.commands.launch", "--num_processes=2", *SHARDS, *SETTLED)


def sparse():
    return pk.sparsify(tiny_llama(), None, "magnitude", 0.5, measure=False)


def adapted(folder):
    out = folder and folder.with_name(f"{folder.name} out")
    return pk.recover(uneven_llama(), LORA, counting(), keep_zeros=False, folder=folder, output_dir=out)


def distilled(folder):
    teacher = tiny_llama(n_heads=4, n_kv=2)
    return pk.recover(uneven_llama(), pk.Distillation(teacher, LORA), counting(), keep_zeros=False, folder=folder)


def progressive(folder):
    return pk.prune_progressively(tiny_llama(), 0.2, counting(), LORA, n_periods=3, folder=folder).model


WORK = {  # name → of a folder for checkpoints, or None, a trained model
    "lora": adapted,
    "full": lambda folder: pk.recover(uneven_llama(), FULL, counting(), keep_zeros=False),
    "distillation": distilled,
    "lora, zeros kept": lambda folder: pk.recover(sparse(), LORA, counting()),
    "full, zeros kept": lambda folder: pk.recover(sparse(), FULL, counting()),
    "progressive": progressive,
}
SHARDED = ["lora", "full", "distillation"]  # the others need each weight whole
STOPPED = ["progressive", "lora"]
SCRIPT = "import sys, test_processes; test_processes.work(*sys.argv[1:])"


def said(model):
    """What a process says of a model that it trained."""
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    total = sum(p.double().abs().sum().item() for p in model.parameters())
    return {"losses": list(model.recovery_log.losses), "total": total, "zeros": zeros}


def work(folder, how, *names):
    """What each process does."""
    place, rank = Path(folder), int(os.environ["RANK"])
    if how == "stopped":
        share_until_interrupted(place)
        stop_before(4, names[-1], rank)
    if how == "sharded":
        pretend()
    for name in names:
        try:
            found = said(WORK[name](None if how == "sharded" else place / name))
        except KeyboardInterrupt:
            continue
        except PrunekitError as error:
            found = {"refused": str(error)}
        (place / f"{name} {rank}.json").write_text(json.dumps(found))
    if how == "together":
        share(place, rank)
        options = {"data": "world", "out": place / "cli", "max-steps": 2, "batch-size": 2, "seq-len": 16, "r": 2}
        assert main(["recover", "world", *(f"--{name}={value}" for name, value in options.items())]) == 0


def asked(folder):
    """What several processes find out together."""
    model, tokenizer = pk.load("world")
    groups = pk.discover(model).of_kind("kv_head", "block")
    scores = pk.score(model, groups, pk.Magnitude())
    tasks = [world.tasks()[name] for name in ("piqa", "facts_rare")]
    given = {"tasks": tasks, "text": {"read": "the cat sat on the mat " * 40}, "limit": 12}
    path = folder and folder / "known.safetensors"
    known = pk.knowledge_distribution(model, tokenizer, groups, scores, ratios=(0.5, 1.0), path=path, **given)
    return {
        "perplexity": pk.perplexity(model, tokenizer, "world"),
        "answers": pk.zero_shot(model, tokenizer, tasks, limit=30).questions["log_likelihoods"].tolist(),
        "hit": known.hit.tolist(),
        "loss": known.loss.tolist(),
        "unfinished": known.unfinished,
    }


def share_until_interrupted(place):
    """Interrupts a measurement of knowledge in each process."""
    ordinary, begun = Runner.sums, []

    def sums(*given):
        begun.append(given)
        if len(begun) == 12:
            raise KeyboardInterrupt
        return ordinary(*given)

    with mock.patch.object(Runner, "sums", sums), pytest.raises(KeyboardInterrupt), split_work():
        asked(place)


def share(place, rank):
    """What processes do that share work, in Python and in a shell; texts of their own are refused."""
    with split_work():
        found = asked(place)
        model, tokenizer = pk.load("world")
        with pytest.raises(PrunekitError, match="2 processes that share the work have different texts"):
            pk.perplexity(model, tokenizer, "the cat sat on the mat " * 30 + f"{rank}")
        packs = mock.patch.object(sequence_scores, "_packs", lambda *_: rank == 0)
        with packs, pytest.raises(PrunekitError, match="different batches, since a test of packing"):
            pk.zero_shot(model, tokenizer, [world.tasks()["hellaswag"]], limit=40)
        model.lm_head.weight.data += rank
        with pytest.raises(PrunekitError, match="different models; give all of them the same"):
            pk.perplexity(model, tokenizer, "the cat sat on the mat " * 30)
    (place / f"shared {rank}.json").write_text(json.dumps(found))
    assert main(["evaluate", "world", "--metrics", "perplexity"]) == 0
    given = ["--kinds", "block", "--importance", "l2", "--text", f"read={place / 'read.txt'}"]
    assert main(["knowledge", "world", *given, "--out", str(place / "map")]) == 0


def stop_before(step, last, rank):
    """Interrupts each training before a step; in the last, the second process is killed."""
    ordinary, begun = training.progress, []

    def progress():
        callback = ordinary()
        begun.append(callback)

        def on_step_begin(args, state, control, **_):
            if state.global_step != step:
                return
            if len(begun) < len(STOPPED):
                raise KeyboardInterrupt
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)

        callback.on_step_begin = on_step_begin
        return callback

    training.progress = progress


def pretend():
    """Makes accelerate take processes on CPUs for processes on GPUs, and sees that weights are shared out."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    ordinary, bring_back = PartialState.__init__, training._bring_back

    def begin(state, *given, **named):
        ordinary(state, *given, **named)
        if state.distributed_type == DistributedType.MULTI_CPU:
            state._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    def bring(shards, model):
        assert all(isinstance(p, training.DTensor) for p in shards.parameters())
        bring_back(shards, model)

    PartialState.__init__, training._bring_back = begin, bring


@pytest.fixture(scope="module")
def alone():
    """What one process says, uninterrupted."""
    return {name: said(make(None)) for name, make in WORK.items()}


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "work.py"
    path.write_text(SCRIPT)
    return path


def found(folder, name):
    """What the two processes say, which is the same."""
    first, second = (json.loads((folder / f"{name} {rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    return first


def check_same(here, there):
    assert here["losses"] == pytest.approx(there["losses"], rel=2e-4)
    assert here["total"] == pytest.approx(there["total"], rel=1e-5)
    assert here["zeros"] == there["zeros"]


def test_two_processes_give_what_one_gives_and_go_on_after_one_was_killed(script, tmp_path, alone):
    stopped = run_script(script, str(tmp_path), "stopped", *STOPPED, launcher=TORCHRUN)
    assert stopped.returncode != 0 and not list(tmp_path.glob("*.json"))
    assert all(list((tmp_path / name).glob("checkpoint-*")) for name in STOPPED), stopped.stderr
    begun = pk.KnowledgeDistribution.load(tmp_path / "known.safetensors")
    assert begun.unfinished > 0 and len(begun.loss) > 0
    (tmp_path / "one").mkdir()
    shutil.copy(tmp_path / "known.safetensors", tmp_path / "one")
    (tmp_path / "read.txt").write_text("the cat sat on the mat " * 40)
    done = run_script(script, str(tmp_path), "together", *WORK, launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr
    for name in WORK:
        check_same(found(tmp_path, name), alone[name])
    assert (tmp_path / "cli" / "recovery.json").is_file() and done.stdout.count("weights trained") == 1
    assert found(tmp_path, "shared") == asked(None) == asked(tmp_path / "one")
    assert done.stdout.count("18,934 tokens") == 1 and (tmp_path / "map" / "knowledge.png").is_file()
    assert RecoveryLog.load(tmp_path / "lora out" / "recovery_log.json").losses


def test_processes_without_a_launcher_are_refused(monkeypatch, capsys):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "-1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["evaluate", "world", "--metrics", "perplexity"]) == 2
    assert "start them by accelerate launch or torchrun, or unset WORLD_SIZE" in capsys.readouterr().err


def test_outside_the_context_each_process_works_for_itself(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert n_sharing() == 1 and [*own_share("abc")] == ["a", "b", "c"] and is_first()
    check_alike(1, "texts")


def test_weights_that_fsdp_shares_out_come_back_whole(script, tmp_path, alone):
    done = run_script(script, str(tmp_path), "sharded", *WORK, launcher=FSDP)
    assert done.returncode == 0, done.stderr
    for name in SHARDED:
        check_same(found(tmp_path, name), alone[name])
    for name in WORK.keys() - SHARDED:
        assert "FSDP shares them out; give --multi_gpu" in found(tmp_path, name)["refused"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed's shards cannot be put together"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP's first version"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            "--fsdp_cpu_ram_efficient_loading false",
        ),
    ],
)
def test_shards_that_cannot_come_back_are_refused_before_anything(asked, message, monkeypatch):
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("prunekit.recovery.fine_tuning.check_finite", None)
    with pytest.raises(PrunekitError, match=message):
        pk.recover(tiny_llama(), LORA, counting())


def test_a_command_for_one_process_is_refused_in_several(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["discover", "world"]) == 2
    assert "2 processes were started (WORLD_SIZE), and discover is the work of one" in capsys.readouterr().err


def test_steps_are_those_of_the_windows_that_processes_take(monkeypatch):
    """Else a run with checkpoints, which counts its steps beforehand, would read the data again and again."""
    method = pk.LoRA(batch_size=8, epochs=2)
    assert method.n_steps(160) == 40
    for n, steps in ((2, 40), (3, 54), (16, 20)):  # of which each takes 4, 2 and 1 windows a step
        monkeypatch.setenv("WORLD_SIZE", str(n))
        assert method.n_steps(160) == steps


def test_a_spread_model_is_not_trained_by_several_processes(monkeypatch):
    model = tiny_llama()
    model.hf_device_map = {"model": 0, "lm_head": 1}
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PrunekitError, match="the model is spread over 0, 1, and 2 processes were started"):
        pk.recover(model, pk.LoRA(max_steps=1), torch.zeros(4, 8, dtype=torch.long))
