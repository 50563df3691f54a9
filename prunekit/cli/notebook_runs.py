"""Runs notebooks headless, each in a kernel of this very interpreter, and finds what went wrong inside widgets too."""

import math
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from typing import Any

import nbformat
import psutil
from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from nbconvert.filters import strip_ansi
from tqdm.auto import tqdm
from traitlets import Type

from prunekit.errors import reason
from prunekit.files import write_text

QUIET = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # one thread a kernel: models this small are faster so
CELL_TIMEOUT = 600  # seconds: a notebook takes less than 120 in all
WIDGETS = "application/vnd.jupyter.widget-state+json"
VIEW = "application/vnd.jupyter.widget-view+json"


@dataclass(frozen=True)
class Outcome:
    """What came of one notebook: its name, what it took, and what went wrong in it (nothing where empty).

    Attributes:
        name: of the file, without its ending.
        seconds: by the clock.
        problems: one text for each.
        cpu_seconds: of its kernel and of what that started, until the last cell that ended.
        peak_mb: the most resident memory of the kernel in MiB; where the system does not keep it, the most that it had
            at the end of a cell.
        n_words: in its Markdown cells.
    """

    name: str
    seconds: float
    problems: tuple[str, ...] = ()
    cpu_seconds: float = 0.0
    peak_mb: float = 0.0
    n_words: int = 0


@dataclass
class Cost:
    """What a kernel took so far, as of the end of its last cell."""

    cpu_seconds: float = 0.0
    peak_mb: float = 0.0

    def read(self, pid: int) -> None:
        """Ask the system about a running kernel."""
        process = psutil.Process(pid)
        times = process.cpu_times()
        self.cpu_seconds = sum(times[:4])  # its own, and those of children that have ended; both as user and as system
        status = Path(f"/proc/{pid}/status")
        kept = re.search(r"VmHWM:\s+(\d+) kB", status.read_text() if status.exists() else "")
        now = int(kept[1]) * 1024 if kept else process.memory_info().rss
        self.peak_mb = max(self.peak_mb, now / 2**20)


class PatientChannel(AsyncZMQSocketChannel):
    """A shell channel that looks again every half second.

    nbclient sends on this channel for Output widgets while it waits on it for a reply. Sending can swallow the socket's
    one wake-up, and then a plain wait never ends: nbclient's issue 312.
    """

    async def get_msg(self, timeout: float | None = None) -> dict[str, Any]:  # type: ignore[override]
        """The next message; raises `queue.Empty` after `timeout` seconds (None: waits for ever)."""
        until = math.inf if timeout is None else time.monotonic() + timeout
        while (left := until - time.monotonic()) > 0.5:
            with suppress(Empty):
                return await super().get_msg(0.5)
        return await super().get_msg(max(0.0, left))


class OwnClient(AsyncKernelClient):
    """A client with a patient shell channel."""

    shell_channel_class = Type(PatientChannel)  # type: ignore[assignment]


class OwnKernel(AsyncKernelManager):
    """A kernel of the interpreter that runs this code, whatever kernelspecs are installed on the machine."""

    client_factory = Type(OwnClient)  # type: ignore[assignment]

    def _kernel_spec_manager_default(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])


@dataclass
class Running:
    """The notebooks under way, so that an interrupt can end their kernels."""

    clients: list[NotebookClient] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    def check(self, **_: Any) -> None:
        """Called before each cell."""
        if self.stopped.is_set():
            raise RuntimeError("interrupted")

    def stop(self) -> None:
        """Let no further cell start, and kill the kernels (each leads its own process group)."""
        self.stopped.set()
        for client in list(self.clients):
            pid = getattr(getattr(client.km, "provisioner", None), "pid", None)
            if pid:
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)


# --- one notebook -----------------------------------------------------------------------------------------------------


def kernel_environment(build: Path) -> dict[str, str]:
    """What a kernel finds in its environment: one thread, and where built things go."""
    defaults = {**QUIET, "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    inherited = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}  # plots go inline
    return {**defaults, **inherited, "PRUNEKIT_BUILD": str(build.resolve())}


def run_notebook(path: Path, build: Path, running: Running | None = None) -> Outcome:
    """Execute a notebook in its own folder; where all went well, write `build/notebooks/<name>.html` and `.ipynb`.

    Args:
        path: the notebook; it is only read.
        build: folder for what is built.
        running: where to register the kernel, so that it can be ended from outside.

    Returns:
        The outcome. An exception in a cell, or one hidden in a widget's output, is a problem in it.
    """
    running = running or Running()
    running.check()
    folder = build / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    try:
        book = nbformat.read(path, as_version=4)
    except (OSError, ValueError, nbformat.ValidationError) as error:
        return Outcome(path.stem, 0.0, (f"{path.name} is no notebook that can be read: {reason(error)}",))
    cost = Cost()
    n_cells = sum(cell.cell_type == "code" for cell in book.cells)
    with tqdm(total=n_cells, desc=path.stem, leave=False, disable=None, unit="cell") as bar:
        crash = _execute(_client(book, path, bar, running, cost), kernel_environment(build), running)
    problems = find_problems(book, path.name) or tuple(f"{path.name}: {line}" for line in crash)
    if not problems:
        write_text(folder / f"{path.stem}.ipynb", nbformat.writes(book))
        html, _ = HTMLExporter(embed_images=True).from_notebook_node(book, {"metadata": {"name": path.stem}})
        write_text(folder / f"{path.stem}.html", html)
    n_words = sum(len(cell.source.split()) for cell in book.cells if cell.cell_type == "markdown")
    return Outcome(path.stem, time.monotonic() - began, problems, cost.cpu_seconds, cost.peak_mb, n_words)


def _client(book: nbformat.NotebookNode, path: Path, bar: tqdm, running: Running, cost: Cost) -> NotebookClient:
    def ended(**_: Any) -> None:
        bar.update()
        with suppress(psutil.Error, OSError):  # a kernel that is gone
            cost.read(client.km.provisioner.pid)  # type: ignore[union-attr]

    client = NotebookClient(
        book,
        kernel_name="python3",
        kernel_manager_class=OwnKernel,
        timeout=CELL_TIMEOUT,
        extra_arguments=["--log-level=ERROR"],  # or each kernel warns of its local, unencrypted connection
        resources={"metadata": {"path": str(path.parent.resolve())}},
        on_cell_start=running.check,
        on_cell_executed=ended,
    )
    return client


def _execute(client: NotebookClient, environment: dict[str, str], running: Running) -> tuple[str, ...]:
    """Run all cells. A failing cell, a time-out and a kernel that dies come back as text."""
    running.clients.append(client)
    try:
        client.execute(env=environment)
    except Exception as error:  # nbclient's many kinds; each becomes a line of the report
        running.check()
        return (f"{type(error).__name__}: {strip_ansi(str(error)).strip()}",)
    finally:
        running.clients.remove(client)
    return ()


def find_problems(book: nbformat.NotebookNode, name: str) -> tuple[str, ...]:
    """Exceptions that an executed notebook shows, in its cells and inside its Output widgets.

    An exception inside an `interact` callback lands in a widget's state and lets the cell pass, so that is read too.
    Cells tagged `raises-exception` may show one.
    """
    return tuple(
        f"{name}, {place}: {out['ename']}: {out['evalue']}\n{strip_ansi(chr(10).join(out.get('traceback', [])))}"
        for place, outputs in _outputs(book)
        for out in outputs
        if out["output_type"] == "error"
    )


def _outputs(book: nbformat.NotebookNode) -> Iterator[tuple[str, Sequence[Any]]]:
    """Pairs of place and outputs: every code cell's, then every Output widget's."""
    for number, cell in enumerate(book.cells, start=1):
        if cell.cell_type == "code" and "raises-exception" not in cell.metadata.get("tags", []):
            yield f"cell {number}", cell.outputs
    models = book.metadata.get("widgets", {}).get(WIDGETS, {}).get("state", {})
    for model_id, model in models.items():
        if model["model_name"] == "OutputModel":
            yield _widget_place(book, models, model_id), model["state"].get("outputs", ())


def _widget_place(book: nbformat.NotebookNode, models: dict, model_id: str) -> str:
    """The cell that shows a widget, itself or inside the box that `interact` makes."""
    for number, cell in enumerate(book.cells, start=1):
        shown = [out.get("data", {}).get(VIEW, {}).get("model_id") for out in cell.get("outputs", ())]
        if any(view == model_id or f"IPY_MODEL_{model_id}" in str(models.get(view)) for view in shown):
            return f"a widget of cell {number}"
    return "a widget that is not shown"


# --- the series -------------------------------------------------------------------------------------------------------


def run_series(paths: Sequence[Path], build: Path, jobs: int = 2) -> list[Outcome]:
    """Run notebooks, `jobs` at a time, each on one thread; say how each ended as it ends."""
    running = Running()

    def work(path: Path) -> Outcome:
        outcome = run_notebook(path, build, running)
        tqdm.write(f"{'ok' if not outcome.problems else 'FAILED':6} {outcome.seconds:6.1f} s  {outcome.name}")
        return outcome

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(work, path) for path in paths]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            running.stop()
            raise
