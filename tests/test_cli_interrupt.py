"""What the command line says of an interrupt: one line, and a true one; of a reader that went, nothing."""

import os

import pytest
from evaluation_helpers import llama

from prunekit.cli import main


@pytest.mark.parametrize(
    ("options", "place", "said"),
    [
        (["--streaming"], "prunekit.checkpoint.streaming.write_shards", "interrupted; what is finished lies in "),
        ([], "prunekit.checkpoint.saving.write_texts", "interrupted; nothing half-written was left behind"),
    ],
)
def test_an_interrupt_is_one_true_line(options, place, said, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    llama().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(place, interrupt)
    capsys.readouterr()
    arguments = ["--pruning-ratio", "0.2", "--importance", "l2", "--out", str(tmp_path / "out")]
    assert main(["prune", str(tmp_path / "model"), *arguments, *options]) == 130
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prunekit: ")]
    assert len(lines) == 1 and lines[0].startswith(f"prunekit: {said}")
    assert ((tmp_path / ".out.partial").exists(), (tmp_path / "out").exists()) == (bool(options), False)


def test_a_reader_that_went_ends_the_command_quietly(monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        assert main(["discover", "world", "--json"]) == 141
        monkeypatch.undo()
    assert capsys.readouterr().err == ""
