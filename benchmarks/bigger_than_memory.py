"""Prune a LLaMA-7B-shaped checkpoint of random weights in little memory, kill it on the way, and let it go on.

The checkpoint is written shard by shard and removed at the end. Before a run its files are dropped from the page cache,
and after it what was written is flushed, so that both cost what the disk costs. Memory is RssAnon, sampled: mapped
shards are cache, which the system drops when it wants memory, and appear in RssFile. "Waiting" is wall time that the
process (one thread) did not spend on the processor: the disk, and on a busy machine the others. Beside it stands the
time of a plain copy of as many bytes, read and written with nothing computed.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import prunekit as pk

PIECE = 16 << 20
RUN = """
import sys, torch
import prunekit as pk
source, out, how, tokens, ratio = sys.argv[1:]
calib = torch.randint(0, 32000, (int(tokens) // 64, 64), generator=torch.Generator().manual_seed(0))
importance = {"l2": pk.Magnitude(), "activation": pk.Activation()}[how]
pk.prune_checkpoint(source, out, importance, float(ratio), calib if importance.needs_calibration else None)
"""


@dataclass
class Measured:
    """What one process took: seconds, bytes, and the largest memory seen."""

    wall: float = 0.0
    processor: float = 0.0
    read: int = 0
    written: int = 0
    anonymous: int = 0
    resident: int = 0

    def __str__(self) -> str:
        waiting = max(self.wall - self.processor, 0)
        return (
            f"{self.wall:6.1f} s, waiting {waiting / self.wall:4.0%} of it; read {self.read / 1e9:5.1f} GB, wrote "
            f"{self.written / 1e9:5.1f} GB; peak RssAnon {self.anonymous / 2**30:.2f} GiB, "
            f"peak resident {self.resident / 2**30:.2f} GiB"
        )


def write_checkpoint(folder: Path, layers: int) -> int:
    """A float16 checkpoint in the shape of LLaMA-7B, shard by shard; its bytes."""
    config = LlamaConfig(num_hidden_layers=layers, architectures=["LlamaForCausalLM"], dtype=torch.float16)
    with torch.device("meta"):
        state = LlamaForCausalLM(config).half().state_dict()
    layout = split_torch_state_dict_into_shards(state, max_shard_size="1GB")
    config.save_pretrained(folder)
    for file, names in layout.filename_to_tensors.items():
        weights = {name: torch.empty(state[name].shape, dtype=torch.float16).normal_(std=0.02) for name in names}
        save_file(weights, folder / file, metadata={"format": "pt"})
    index = {"metadata": layout.metadata, "weight_map": layout.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(path.stat().st_size for path in shards(folder))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model*.safetensors"))


def drop_from_cache(folder: Path) -> None:
    for path in folder.glob("**/*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(folder: Path, arguments: list[str], kill_when: Callable[[], bool] = lambda: False) -> Measured:
    """Prune in a process of its own, watched; SIGKILL it as soon as `kill_when()`."""
    found, began = Measured(), time.monotonic()
    environment = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", **os.environ}
    process = subprocess.Popen([sys.executable, "-c", RUN, *arguments], env=environment)
    while process.poll() is None:
        sample(process.pid, found)
        if kill_when():
            process.send_signal(signal.SIGKILL)
            process.wait()
        time.sleep(0.02)
    drop_from_cache(folder)  # what was written is on the disk when the clock stops
    found.wall = time.monotonic() - began
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"the run ended with {process.returncode}")
    return found


def sample(pid: int, found: Measured) -> None:
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        io = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
        times = psutil.Process(pid).cpu_times()
    except (OSError, ValueError, psutil.Error):  # it has just ended
        return
    if "RssAnon" in status:
        found.anonymous = max(found.anonymous, int(status["RssAnon"].split()[0]) * 1024)
        found.resident = max(found.resident, int(status["VmHWM"].split()[0]) * 1024)
    found.read, found.written = int(io["read_bytes"]), int(io["write_bytes"])
    found.processor = times.user + times.system


def copy_as_much(source: Path, out: Path, scratch: Path) -> tuple[float, float]:
    """Seconds to read all that was read, and to write all that was written, with nothing computed."""
    drop_from_cache(source)
    began = time.monotonic()
    for path in shards(source):
        for _ in pieces(path):
            pass
    read = time.monotonic() - began
    began, piece = time.monotonic(), os.urandom(PIECE)
    for number, path in enumerate(shards(out)):
        with (scratch / f"copy{number}").open("wb") as copy:
            for _ in range(path.stat().st_size // PIECE):
                copy.write(piece)
            copy.flush()
            os.fsync(copy.fileno())
    return read, time.monotonic() - began


def pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            yield piece


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--importance", choices=("l2", "activation"), default="l2")
    parser.add_argument("--tokens", type=int, default=1024, help="calibration tokens of activation, in windows of 64")
    parser.add_argument("--pruning-ratio", default="0.2")
    parser.add_argument("--folder", type=Path, help="where there is room for three times the checkpoint")
    args = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        measure(args, scratch)
    finally:
        shutil.rmtree(scratch)


def measure(args: argparse.Namespace, scratch: Path) -> None:
    source, out = scratch / "dense", scratch / "small"
    source.mkdir()
    began = time.monotonic()
    size = write_checkpoint(source, args.layers)
    print(
        f"checkpoint: {args.layers} layers, {size / 1e9:.1f} GB, written in {time.monotonic() - began:.0f} s",
        flush=True,
    )
    arguments = [str(source), str(out), args.importance, str(args.tokens), args.pruning_ratio]
    half = size * (1 - float(args.pruning_ratio)) / 2
    drop_from_cache(source)
    work = scratch / ".small.partial" / "checkpoint"
    killed = run(scratch, arguments, lambda: sum(path.stat().st_size for path in shards(work)) > half)
    print(f"until it was killed:  {killed}", flush=True)
    resumed = run(scratch, arguments)
    print(f"from there to the end: {resumed}", flush=True)
    report(args, source, out, scratch, killed, resumed)


def report(
    args: argparse.Namespace, source: Path, out: Path, scratch: Path, killed: Measured, resumed: Measured
) -> None:
    plan = pk.PruningPlan.load(out / "plan.json")
    wall = killed.wall + resumed.wall
    waiting = wall - killed.processor - resumed.processor
    read, write = copy_as_much(source, out, scratch)
    moved = read * (killed.read + resumed.read) / sum(p.stat().st_size for p in shards(source)) + write
    print(f"{plan!r}")
    print(f"together {wall:.0f} s of wall time, {waiting / wall:.0%} of it waiting")
    print(f"peak RssAnon {max(killed.anonymous, resumed.anonymous) / 2**30:.2f} GiB")
    print(f"as many bytes read and written plainly: {moved:.0f} s, {moved / wall:.0%} of the wall time")


if __name__ == "__main__":
    main()
