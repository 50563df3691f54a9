"""Work that is killed at random moments, on a tiny model; called again, each goes on and ends with the same files."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

from evaluation_helpers import TEXT, byte_tokenizer, llama

import prunekit as pk
from prunekit.cli import main
from prunekit.files import write_text
from prunekit.recovery import teacher_logits
from prunekit.search import Metric, measure_pairs

LETTERS = "the cat and the dog sat by the cold sea; a ship ran past them all. "
VOLATILE = {"seconds"}  # fields that say how long it took


def prepare(base: Path) -> None:
    """A checkpoint in small shards, a cut one, and a text."""
    tokenizer, model = byte_tokenizer(), llama(num_hidden_layers=4)
    pk.save(model, base / "dense", tokenizer=tokenizer, max_shard_size="30KB")
    groups = pk.discover(model)
    plan = pk.plan(groups, pk.score(model, groups, pk.Magnitude(), None), 0.1)
    pk.save(pk.prune(model, plan), base / "cut", tokenizer=tokenizer, plan=plan)
    (base / "text.txt").write_text((TEXT + LETTERS) * 6)


def _shell(work: Path, *command: str) -> None:
    out = work / "out"
    if not out.exists():
        assert main([*command, "--out", str(out)]) == 0


def _prune(base: Path, work: Path) -> None:
    drawing = ("--calibration", str(base / "text.txt"), "--n-samples", "8", "--seq-len", "32")
    _shell(work, "prune", str(base / "dense"), "--pruning-ratio", "0.2", *drawing)


def _stream(base: Path, work: Path) -> None:
    how = ("--streaming", "--importance", "activation", "--calibration", str(base / "text.txt"))
    drawing = ("--n-samples", "4", "--seq-len", "32", "--max-shard-size", "20KB")
    _shell(work, "prune", str(base / "dense"), "--pruning-ratio", "0.2", *how, *drawing)


def _recover(base: Path, work: Path) -> None:
    how = ("--data", str(base / "text.txt"), "--max-steps", "8", "--seq-len", "32")
    _shell(work, "recover", str(base / "cut"), *how)


def _progressive(base: Path, work: Path) -> None:
    model, tokenizer = pk.load(base / "dense")
    method = pk.LoRA(max_steps=16, batch_size=4, seq_len=32)
    options = {"tokenizer": tokenizer, "folder": work / "run", "n_periods": 4}
    done = pk.prune_progressively(model, 0.2, str(base / "text.txt"), method, **options)
    if not (work / "out").exists():
        pk.save(pk.prune(done.model, done.plan), work / "out", tokenizer=tokenizer)


def loss_of(model, tokenizer):
    return pk.perplexity(model, tokenizer, [LETTERS * 2], window=32)


def _search(base: Path, work: Path) -> None:
    model, tokenizer = pk.load(base / "dense")
    groups = pk.discover(model)
    space = pk.PlanSpace(groups, {"l2": pk.score(model, groups, pk.Magnitude(), None)}, 0.2)
    pairs = measure_pairs(space, model, tokenizer, 8, metric=Metric("loss", loss_of), folder=work / "search")
    table = pairs.table.drop(columns=["seconds", "number"])  # a candidate that was killed is numbered anew
    write_text(work / "out.json", json.dumps(table.to_dict("records")))


def _knowledge(base: Path, work: Path) -> None:
    model, tokenizer = pk.load(base / "dense")
    groups = pk.discover(model).of_kind("kv_head", "ffn_channel")
    scores = pk.score(model, groups, pk.Magnitude(), None)
    texts = {"one": TEXT * 3, "two": LETTERS * 6}
    known = pk.knowledge_distribution(model, tokenizer, groups, scores, text=texts, path=work / "known.safetensors")
    write_text(work / "out.json", json.dumps(known.table().to_dict("records")))


def _teacher(base: Path, work: Path) -> None:
    teacher_logits._A_SHARD = 4
    model, tokenizer = pk.load(base / "dense")
    kept = pk.keep_logits(model, str(base / "text.txt"), work / "kept", tokenizer=tokenizer, seq_len=32)
    write_text(work / "out.json", json.dumps([[part.tolist() for part in kept[n]] for n in range(len(kept))]))


def _save(base: Path, work: Path) -> None:
    model, tokenizer = pk.load(base / "cut")
    if not (work / "out").exists():
        pk.save(model, work / "out", tokenizer=tokenizer, max_shard_size="10KB")


def _export(base: Path, work: Path) -> None:
    _shell(work, "export", str(base / "cut"), "--layout", "padded")


JOBS: dict[str, Callable[[Path, Path], None]] = {
    "prune": _prune,
    "streaming": _stream,
    "recover": _recover,
    "progressive": _progressive,
    "search": _search,
    "knowledge": _knowledge,
    "teacher": _teacher,
    "save": _save,
    "export": _export,
}


def work_in_process(name: str, base: Path, work: Path) -> None:
    """One job, in a process that says nothing."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    with (work / ".errors").open("w") as errors:
        os.dup2(errors.fileno(), 2)
        JOBS[name](base, work)


def _nothing() -> None:
    """What a process does that is only started."""


def outputs(work: Path) -> dict[str, object]:
    """The files that a job ends with: name → content, without how long it took."""
    found = [path for path in (work / "out").rglob("*") if path.is_file()] if (work / "out").is_dir() else []
    found += [path for path in [work / "out.json"] if path.is_file()]
    return {str(path.relative_to(work)): _content(path) for path in sorted(found)}


def _content(path: Path) -> object:
    if path.suffix != ".json":
        return path.read_bytes()
    read = json.loads(path.read_text())
    return {key: value for key, value in read.items() if key not in VOLATILE} if isinstance(read, dict) else read


class Killer:
    """Starts jobs in processes that have everything imported, and kills them.

    Attributes:
        base: folder with the models and texts.
        place: folder for one folder a run.
    """

    def __init__(self, base: Path, place: Path, seed: int = 0) -> None:
        self.base, self.place = base, place
        self._random = random.Random(seed)
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(["kill_jobs", "transformers.trainer", "peft", "optuna"])
        self._whole: dict[str, tuple[dict[str, object], float]] = {}
        self._n = 0
        warm = self._context.Process(target=_nothing)  # the server has imported all when this ends
        warm.start()
        warm.join()

    def whole(self, name: str) -> tuple[dict[str, object], float]:
        """The files of the uninterrupted run, and its seconds."""
        if name not in self._whole:
            work = self._folder(name)
            began = time.monotonic()
            self._finish(name, work)
            self._whole[name] = outputs(work), time.monotonic() - began
        return self._whole[name]

    def kill(self, name: str, n: int) -> int:
        """Kill a run up to n times at random moments, let it end, and compare; the number of times that it was killed.

        Raises:
            AssertionError: something half-written, or another result.
        """
        expected, seconds = self.whole(name)
        work, n_killed = self._folder(name), 0
        for _ in range(n):
            process = self._started(name, work)
            process.join(self._random.uniform(0.02, 1.0) * seconds)
            process.kill()
            process.join()
            n_killed += process.exitcode == -signal.SIGKILL
            there = outputs(work)
            assert there in ({}, expected), f"{name}: half-written {sorted(there)} after a kill"
        self._finish(name, work)
        found = outputs(work)
        assert set(found) == set(expected), f"{name}: {sorted(found)}, not {sorted(expected)}"
        other = [file for file in expected if found[file] != expected[file]]
        assert not other, f"{name}: {', '.join(other)} differ from the uninterrupted run"
        return n_killed

    def _finish(self, name: str, work: Path) -> None:
        process = self._started(name, work)
        process.join(240)
        assert process.exitcode == 0, f"{name} ended with {process.exitcode}: {(work / '.errors').read_text()[-2000:]}"

    def _started(self, name: str, work: Path):
        process = self._context.Process(target=work_in_process, args=(name, self.base, work), daemon=True)
        process.start()
        return process

    def _folder(self, name: str) -> Path:
        self._n += 1
        work = self.place / f"{name}_{self._n}"
        work.mkdir()
        return work
