"""The tour: run the notebook series headless, keep what it showed, print what it measured: `prunekit tour`.

Each notebook runs in a kernel of this very interpreter, up to two at a time, and becomes one HTML file. The first
notebook writes what it measured to `summary.json` in the build folder (environment variable `PRUNEKIT_BUILD`) as
`{"dense": {metric: number}, "cut": {…}, "recovered": {…}}`; the tour prints that as one table.
"""

import json
import math
import os
import signal
import sys
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
from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from nbconvert.filters import strip_ansi
from tqdm.auto import tqdm
from traitlets import Type

from prunekit.cli.notebooks import QUIET, SERIES, find_series
from prunekit.errors import PrunekitError
from prunekit.files import write_text

JOBS = min(2, os.cpu_count() or 1)
STAGES = ("dense", "cut", "recovered")
CELL_TIMEOUT = 600  # seconds: a notebook takes less than 120 in all
WIDGETS = "application/vnd.jupyter.widget-state+json"
VIEW = "application/vnd.jupyter.widget-view+json"


@dataclass(frozen=True)
class Outcome:
    """What came of one notebook: its name, how long it ran, and what went wrong in it (nothing where empty)."""

    name: str
    seconds: float
    problems: tuple[str, ...] = ()


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
class _Running:
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


def run_notebook(path: Path, build: Path, running: _Running | None = None) -> Outcome:
    """Execute a notebook in its own folder; where all went well, write `build/notebooks/<name>.html` and `.ipynb`.

    Args:
        path: the notebook; it is only read.
        build: folder for what is built.
        running: where to register the kernel, so that it can be ended from outside.

    Returns:
        The outcome. An exception in a cell, or one hidden in a widget's output, is a problem in it.
    """
    running = running or _Running()
    running.check()
    build.mkdir(parents=True, exist_ok=True)
    book = nbformat.read(path, as_version=4)
    began = time.monotonic()
    with tqdm(total=len(book.cells), desc=path.stem, leave=False, disable=None, unit="cell") as bar:
        crash = _execute(_client(book, path, bar, running), kernel_environment(build), running)
    problems = find_problems(book, path.name) or tuple(f"{path.name}: {line}" for line in crash)
    if not problems:
        write_html(book, path.stem, build / "notebooks")
    return Outcome(path.stem, time.monotonic() - began, problems)


def _client(book: nbformat.NotebookNode, path: Path, bar: tqdm, running: _Running) -> NotebookClient:
    return NotebookClient(
        book,
        kernel_name="python3",
        kernel_manager_class=OwnKernel,
        timeout=CELL_TIMEOUT,
        extra_arguments=["--log-level=ERROR"],  # or each kernel warns of its local, unencrypted connection
        resources={"metadata": {"path": str(path.parent.resolve())}},
        on_cell_start=running.check,
        on_cell_complete=lambda **_: bar.update(),
    )


def _execute(client: NotebookClient, environment: dict[str, str], running: _Running) -> tuple[str, ...]:
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


def write_html(book: nbformat.NotebookNode, name: str, folder: Path) -> Path:
    """Write an executed notebook, and the same as one HTML file with its pictures inside."""
    _write(folder / f"{name}.ipynb", nbformat.writes(book))
    html, _ = HTMLExporter(embed_images=True).from_notebook_node(book, {"metadata": {"name": name}})
    return _write(folder / f"{name}.html", html)


def _write(target: Path, text: str) -> Path:
    """Write beside the target and move into place, so that nothing half-written stands there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, text)
    return target


# --- the series -------------------------------------------------------------------------------------------------------


def run_series(paths: Sequence[Path], build: Path, jobs: int = 2) -> list[Outcome]:
    """Run notebooks, `jobs` at a time, each on one thread; say how each ended as it ends."""
    running = _Running()

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


def find_notebooks(folder: Path) -> list[Path]:
    """The notebooks of a series, in order."""
    paths = sorted(folder.glob(SERIES))
    if not paths:
        raise PrunekitError(f"no notebooks {SERIES} in {folder}; name their folder: prunekit tour FOLDER")
    return paths


def default_folder() -> Path:
    """`notebooks` where we stand, or else the series that comes with prunekit."""
    here = Path("notebooks")
    return here if here.is_dir() else find_series() / "notebooks"


# --- the summary ------------------------------------------------------------------------------------------------------


def read_summary(path: Path, since: float = 0.0) -> dict[str, dict[str, float]]:
    """What the first notebook measured: stage → metric → number.

    Args:
        path: `summary.json`.
        since: seconds since the epoch; an older file is of another tour and does not count.

    Raises:
        PrunekitError: the file is missing, old, or does not hold numbers for all three stages.
    """
    if not path.exists() or path.stat().st_mtime < since - 1:
        raise PrunekitError(f"{path} was not written in this tour: the first notebook must write what it measured")
    summary = json.loads(path.read_text(encoding="utf-8"))
    for stage in STAGES:
        bad = {name: value for name, value in summary.get(stage, {"": None}).items() if not _is_number(value)}
        if bad or set(summary[stage]) != set(summary["dense"]):
            raise PrunekitError(f"{path} needs the same metrics, as numbers, for each of {STAGES}: see {stage!r} {bad}")
    return summary


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def summary_table(summary: dict[str, dict[str, float]], outcomes: Sequence[Outcome]) -> str:
    """Markdown: one row a metric with a column a stage, then one row a notebook with its seconds."""
    measured = [(name, *(_show(summary[stage][name]) for stage in STAGES)) for name in summary["dense"]]
    times = [(outcome.name, f"{outcome.seconds:.1f}") for outcome in outcomes]
    return "\n\n".join([_table([("", *STAGES), *measured]), _table([("notebook", "seconds"), *times])]) + "\n"


def _show(value: float) -> str:
    return f"{int(value):,}" if value == int(value) and abs(value) >= 10 else f"{value:.4g}"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in rows]
    rule = "| " + " | ".join(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


# --- the command ------------------------------------------------------------------------------------------------------


def tour(folder: str | None = None, *, build: str = os.environ.get("PRUNEKIT_BUILD", "build"), jobs: int = JOBS) -> int:
    """Run the notebook series without a browser, and sum it up.

    Each notebook becomes one HTML file with its pictures, in the folder of results. Where
    prunekit was installed without a clone of its repository, the series comes from the package.
    Exit code 1 says that a notebook failed.

    Example:
        prunekit tour
        prunekit tour path/to/notebooks --build results --jobs 1

    Args:
        folder: of the series, by default `notebooks`, or else that which comes with prunekit.
        build: folder of results.
        jobs: notebooks that run at a time, each on one thread.
    """
    if jobs < 1:
        raise PrunekitError(f"jobs={jobs} is not allowed; give a whole number from 1 on")
    try:
        return run_tour(find_notebooks(Path(folder) if folder else default_folder()), Path(build), jobs)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"what was finished stands in {Path(build) / 'notebooks'}") from None


def run_tour(paths: Sequence[Path], build: Path, jobs: int) -> int:
    """Run the series, print the summary; 0 where every notebook ran and the summary is there, else 1."""
    began = time.time()
    outcomes = run_series(paths, build, jobs)
    problems = [problem for outcome in outcomes for problem in outcome.problems]
    if problems:
        return _complain("\n\n".join(["these notebooks failed, so nothing is summed up", *problems]))
    try:
        table = summary_table(read_summary(build / "summary.json", began), outcomes)
    except PrunekitError as error:
        return _complain(str(error))
    _write(build / "summary.md", table)
    print(f"\n{table}\n{len(outcomes)} notebooks in {time.time() - began:.0f} s; see {build / 'notebooks'}")
    return 0


def _complain(message: str) -> int:
    print(f"tour: {message}", file=sys.stderr)
    return 1
