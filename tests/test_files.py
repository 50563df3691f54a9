"""What is written is complete or not there: modes, full disks, and what killed processes leave."""

import os
import resource
import signal
import stat
import subprocess
import sys
from contextlib import contextmanager

import pytest
from evaluation_helpers import byte_tokenizer, llama

import prunekit as pk
from prunekit.errors import DiskError, PrunekitError
from prunekit.files import new_file, new_folder, write_text, writing


@pytest.fixture
def umask():
    """Sets the mask of new files' modes; the old one comes back."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@contextmanager
def room_for(n_bytes):
    """A context in which no file can be larger, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def modes(folder):
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_all_files_have_the_mode_of_new_files(mask, mode, umask, tmp_path):
    umask(mask)
    pk.save(llama(), tmp_path / "out", tokenizer=byte_tokenizer())
    pk.prune_checkpoint(tmp_path / "out", tmp_path / "streamed", pk.Magnitude(), 0.2)
    groups = pk.discover(llama())
    pk.score(llama(), groups, pk.Magnitude()).save(tmp_path / "scores.safetensors")
    write_text(tmp_path / "text.txt", "text")
    assert modes(tmp_path / "out") == modes(tmp_path / "streamed") == {mode}
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("scores.safetensors", "text.txt")} == {mode}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~mask


def writers(tmp_path):
    model = llama()
    groups = pk.discover(model)
    scores = pk.score(model, groups, pk.Magnitude())
    plan = pk.plan(groups, scores, 0.2)
    return {
        "weights": (lambda: pk.save(model, tmp_path / "out"), 100),
        "the tokenizer": (
            lambda: pk.save(model, tmp_path / "out", tokenizer=byte_tokenizer(), max_shard_size=1000),
            9000,
        ),
        "scores": (lambda: scores.save(tmp_path / "out"), 100),
        "a plan": (lambda: plan.save(tmp_path / "out"), 100),
        "a report": (lambda: pk.evaluate(model, None, "cost").save(tmp_path / "out"), 100),
        "an adapter": (
            lambda: pk.recover(model, pk.LoRA(max_steps=1), llama_tokens(), output_dir=tmp_path / "out", measure=False),
            3000,
        ),
    }


def llama_tokens():
    import torch

    return torch.randint(258, (4, 16))


@pytest.mark.parametrize("name", ["weights", "the tokenizer", "scores", "a plan", "a report", "an adapter"])
def test_a_full_disk_is_said_by_name_and_nothing_is_left(name, tmp_path):
    write, n_bytes = writers(tmp_path)[name]
    with room_for(n_bytes), pytest.raises(DiskError, match=r"cannot write '.*/out' \(.*large.*nothing was left"):
        write()
    assert not list(tmp_path.iterdir())
    write()


def test_bare_exceptions_that_speak_of_a_disk_are_of_the_disk(tmp_path):
    """The tokenizers package raises them."""
    with pytest.raises(DiskError, match="No space left"), writing(tmp_path):
        raise Exception("No space left on device (os error 28)")
    with pytest.raises(KeyError), writing(tmp_path):
        raise KeyError("x")


@pytest.mark.parametrize("place", ["gone/x.json", "file/x.json", "y" * 300])
def test_where_nothing_can_be_written_is_said(place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="cannot write"):
        write_text(tmp_path / place, "text")
    with pytest.raises(PrunekitError, match="cannot write"), new_folder(tmp_path / "file" / place):
        pass


KILLED = """
import os, signal, sys
from pathlib import Path
from prunekit.files import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    out = tmp_path / "o[u]t"
    done = subprocess.run([sys.executable, "-c", KILLED, str(out)], check=False)
    assert done.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 1
    with new_file(tmp_path / "other") as path:
        path.write_text("of another name")
    assert len(list(tmp_path.iterdir())) == 2
    with new_folder(out) as folder:
        (folder / "whole").write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o[u]t", "other"]


def test_what_another_process_is_writing_stays(tmp_path):
    slow = "import sys, time\nfrom pathlib import Path\nfrom prunekit.files import new_folder\n"
    slow += "with new_folder(Path(sys.argv[1])) as f:\n    print('in', flush=True); sys.stdin.read()\n"
    command = [sys.executable, "-c", slow, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out"):
            assert len(list(tmp_path.iterdir())) == 2
            raise KeyboardInterrupt
        other.stdin.close()
        assert other.wait(60) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
