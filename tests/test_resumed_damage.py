"""Runs that go on from files that were changed, cut short or removed meanwhile: the file is named by the error."""

import os

import pytest
from test_progressive import sheared
from test_streaming import interrupt_while_writing, write

from prunekit import Magnitude, PrunekitError, prune_checkpoint
from prunekit.checkpoint import mapped_weights
from prunekit.digests import check_recorded, record


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A streamed run that was stopped after its first shards."""
    root = tmp_path_factory.mktemp("stopped")
    source, written = write(root / "in"), []
    plain = mapped_weights.save_file

    def stop(*arguments, **options):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(plain(*arguments, **options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapped_weights, "save_file", stop)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(source, root / "out", Magnitude(), 0.2, max_shard_size="60KB")
    return root


def copied(stopped, tmp_path):
    for path in stopped.rglob("*"):
        if path.is_file() and "in" not in path.relative_to(stopped).parts:
            target = tmp_path / path.relative_to(stopped)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path / ".out.partial"


def go_on(stopped, tmp_path):
    return prune_checkpoint(stopped / "in", tmp_path / "out", Magnitude(), 0.2, max_shard_size="60KB")


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-10])


DAMAGE = {
    "a shard cut short": ("checkpoint/model-00001-of-*.safetensors", cut_short),
    "facts cut short": ("facts.json", cut_short),
    "facts that are a list": ("facts.json", lambda path: path.write_text("[]")),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_streamed_run_names_the_damaged_file_and_what_to_remove(name, stopped, tmp_path):
    work = copied(stopped, tmp_path)
    pattern, damage = DAMAGE[name]
    path = next(work.glob(pattern))
    damage(path)
    with pytest.raises(PrunekitError) as refused:
        go_on(stopped, tmp_path)
    assert path.name in str(refused.value) and "remove the folder" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_an_undamaged_one_goes_on_to_the_same_weights(stopped, tmp_path):
    copied(stopped, tmp_path)
    plan = go_on(stopped, tmp_path)
    assert plan == prune_checkpoint(stopped / "in", tmp_path / "straight", Magnitude(), 0.2, max_shard_size="60KB")
    for path in (tmp_path / "straight").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_scores_cut_short_are_named(stopped, tmp_path, monkeypatch):
    source = write(tmp_path / "in")
    interrupt_while_writing(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(source, tmp_path / "out", Magnitude(), 0.2)
    work = tmp_path / ".out.partial"
    (work / "checkpoint/plan.json").unlink()
    cut_short(work / "scores.safetensors")
    with pytest.raises(PrunekitError, match=r"scores\.safetensors.*or remove the folder"):
        prune_checkpoint(source, tmp_path / "out", Magnitude(), 0.2)


def test_a_source_with_other_permissions_is_the_same_source(stopped, tmp_path):
    copied(stopped, tmp_path)
    for path in (stopped / "in").iterdir():
        path.chmod(0o640)
    assert go_on(stopped, tmp_path) and (tmp_path / "out" / "config.json").is_file()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished progressive pruning with its checkpoints."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return folder, sheared(folder=folder)


FILES = ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth", "scheduler.pt")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [cut_short, os.unlink], ids=["cut short", "gone"])
def test_a_training_names_the_damaged_file_and_what_to_delete(file, damage, trained, tmp_path):
    for path in trained[0].rglob("*"):
        if path.is_file():
            target = tmp_path / path.relative_to(trained[0])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    damage(next(tmp_path.glob(f"checkpoint-*/{file}")))
    with pytest.raises(PrunekitError, match=rf"{file}' (is missing|was changed).*delete the folder '.*checkpoint-10'"):
        sheared(folder=tmp_path)


def test_a_damaged_note_of_a_training_is_named(trained, tmp_path):
    (tmp_path / "run.json").write_text('"abc')
    with pytest.raises(PrunekitError, match=r"run\.json' is not JSON.*delete the folder"):
        sheared(folder=tmp_path)


def test_files_are_recorded_one_after_the_other(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
        record([tmp_path / name], tmp_path / "note.json")
    check_recorded(tmp_path / "note.json", tmp_path, "delete it")
    (tmp_path / "a").write_text("c")
    with pytest.raises(PrunekitError, match="a' was changed since it was written; delete it"):
        check_recorded(tmp_path / "note.json", tmp_path, "delete it")
