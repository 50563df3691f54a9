"""JupyterLab in a real browser: a server of its own on a copy of the notebooks, and what is on its page.

An installed Chromium is driven by playwright. JupyterLab's own object (`--expose-app-in-browser`) runs cells and says
what state they are in. What a reader sees is looked up on the page.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prunekit.cli.notebooks import copy_series

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SETTINGS = {  # no question about news; every cell is on the page, not only those in view
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
}
RED = '[data-mime-type="application/vnd.jupyter.stderr"]'  # exceptions, and what is written to standard error
TRACEBACK = "Traceback (most recent call last)"
WIDGET = ".widget-interact"
OPEN = """async name => {
  const app = window.jupyterapp;
  await app.restored;
  const panel = await app.commands.execute('docmanager:open', {path: name});
  await panel.revealed;
  await panel.sessionContext.ready;
  window.book = panel;
}"""
RUN = """async last => {
  const {content, context} = window.book, app = window.jupyterapp;
  content.activeCellIndex = last;
  if (last + 1 < content.widgets.length) { content.activeCellIndex = last + 1;
    await app.commands.execute('notebook:run-all-above'); }
  else await app.commands.execute('notebook:run-all-cells');
}"""
STATE = """() => ({
  kernel: window.book.sessionContext.session?.kernel?.status,
  cells: window.book.content.model.toJSON().cells.map((cell, i) => ({kind: cell.cell_type, source: cell.source,
    count: cell.execution_count, outputs: cell.outputs ?? [], id: cell.id})),
  prompts: window.book.content.widgets.map(widget => widget.promptNode?.innerText ?? '')
})"""


def find_chromium() -> str | None:
    """The path of a Chromium that is installed, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


# --- the server -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: its address, its token, and the folder of notebooks that it shows."""

    url: str
    token: str
    folder: Path

    def page(self, context: Any) -> Any:
        """A new page with JupyterLab on it, ready."""
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.goto(f"{self.url}/lab?token={self.token}&reset")
        page.wait_for_function("() => window.jupyterapp && window.jupyterapp.shell")
        return page


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def lab(root: Path) -> Iterator[Lab]:
    """JupyterLab on a fresh copy of the series in `root`, with settings of its own; it ends with the block."""
    folder = copy_series(root / "series")
    places = {name: str(root / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "HOME")}
    places |= {name: str(root / name.lower()) for name in ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")}
    for name, values in SETTINGS.items():
        file = root / "jupyterlab_settings_dir" / f"{name.replace(':', '/')}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    token, port = secrets.token_hex(8), free_port()
    options = [f"--ServerApp.port={port}", f"--IdentityProvider.token={token}", "--no-browser", "--allow-root"]
    options += ["--ServerApp.ip=127.0.0.1", "--expose-app-in-browser", "--LabApp.news_url=None"]
    options += [
        "--MappingKernelManager.cull_idle_timeout=300",
        "--ServerApp.shutdown_no_activity_timeout=300",
    ]  # if killed
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    environment |= {**places, "PRUNEKIT_BUILD": str(root / "build"), "PYTHONPATH": str(Path(__file__).parents[1])}
    environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with (root / "lab.log").open("w") as log:
        command = [sys.executable, "-m", "jupyterlab", str(folder), *options]
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_for_server(f"http://127.0.0.1:{port}/api/status?token={token}", server, root / "lab.log")
        yield Lab(f"http://127.0.0.1:{port}", token, folder)
    finally:
        server.send_signal(signal.SIGTERM)  # it ends its kernels
        with suppress(subprocess.TimeoutExpired):
            server.wait(20)
        server.kill()


def _wait_for_server(address: str, server: subprocess.Popen, log: Path, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while True:
        with suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(address, timeout=5):
            return
        if server.poll() is not None or time.monotonic() > until:
            raise AssertionError(f"JupyterLab does not answer: {log.read_text()[-2000:]}")
        time.sleep(0.2)


@contextmanager
def chromium(profile: Path) -> Iterator[Any]:
    """A browser window of 1280×800 with a fresh profile."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            profile,
            executable_path=find_chromium(),
            headless=True,
            args=list(FLAGS),
            viewport={"width": 1280, "height": 800},
        )
        yield context
        context.close()


# --- a notebook on the page -------------------------------------------------------------------------------------------


class Book:
    """A notebook that is open on a page."""

    def __init__(self, page: Any, name: str):
        """Open the notebook `name` and wait for its kernel."""
        self.page, self.name = page, name
        page.evaluate(OPEN, name)
        self.page.wait_for_function("() => window.book.sessionContext.session?.kernel?.status === 'idle'")

    def state(self) -> dict[str, Any]:
        """Kernel, cells with their outputs, and prompts."""
        return self.page.evaluate(STATE)

    def find(self, cell_id: str) -> int:
        """The place of a cell."""
        return [cell["id"] for cell in self.state()["cells"]].index(cell_id)

    def run(self, last: int | None = None, seconds: float = 1200) -> None:
        """Run all cells, or those up to number `last`, and wait for the end; a cell that failed ends it too."""
        cells = self.state()["cells"]
        last = len(cells) - 1 if last is None else last
        self.page.evaluate(f"last => {{ window.ran = ({RUN})(last).catch(error => String(error)) }}", last)
        wanted = [i for i, cell in enumerate(cells[: last + 1]) if cell["kind"] == "code" and cell["source"].strip()]
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.page.wait_for_timeout(500)
            state = self.state()
            done = all(state["cells"][i]["count"] and "*" not in state["prompts"][i] for i in wanted)
            if (done or self.problems()) and state["kernel"] == "idle":
                self.page.wait_for_timeout(500)  # the last outputs are drawn
                return
        raise AssertionError(f"{self.name} still runs after {seconds} s: {state['kernel']} {state['prompts']}")

    def problems(self) -> list[str]:
        """Every error that a reader can see, in a cell's output or inside a widget."""
        return [text[-2000:] for text in self.page.locator(RED).all_inner_texts() if TRACEBACK in text]

    def cell(self, number: int) -> Any:
        """A cell on the page."""
        return self.page.locator(".jp-Notebook .jp-Cell").nth(number)

    def widgets(self) -> list[Any]:
        """What `interact` made, in order."""
        return self.page.locator(WIDGET).all()

    def fold_faults(self) -> list[str]:
        """Click on every folded answer: it must be closed before, and show its text after."""
        faults = []
        for place in self.page.locator(".jp-RenderedMarkdown details").all():
            name, inside = place.locator("summary").inner_text(), place.locator("p, ul, ol, table").first
            if place.get_attribute("open") is not None or inside.is_visible():
                faults.append(f"{name!r} is open before it is clicked")
            place.locator("summary").click()
            if not inside.is_visible():
                faults.append(f"{name!r} does not open")
        return faults

    def answer(self, number: int, source: str, seconds: float = 60) -> str:
        """Type something in place of a cell's source, run the cell, and return what it prints."""
        self.cell(number).locator(".cm-content").click()
        self.page.keyboard.press("Control+a")
        self.page.keyboard.insert_text(source)
        assert self.state()["cells"][number]["source"] == source  # it was typed into this cell
        count = self.state()["cells"][number]["count"]
        self.page.keyboard.press("Shift+Enter")
        self.page.wait_for_function(
            "([i, count]) => ![null, count].includes(window.book.content.model.toJSON().cells[i].execution_count)",
            arg=[number, count],
            timeout=1000 * seconds,
        )
        self.idle()
        return self.cell(number).locator(".jp-OutputArea").last.inner_text()

    def idle(self) -> None:
        """Wait until the kernel has done what it was asked."""
        self.page.wait_for_timeout(150)
        self.page.wait_for_function("() => window.book.sessionContext.session?.kernel?.status === 'idle'")
        self.page.wait_for_timeout(150)


# --- controls ---------------------------------------------------------------------------------------------------------

SHOWN = """widget => {
  const area = widget.querySelector('.jp-OutputArea');
  return area ? area.innerText + [...area.querySelectorAll('img')].map(image => image.src).join() : '';
}"""
PATIENCE = 4  # seconds that a widget has to answer a move


@dataclass
class Control:
    """What came of moving one control: its label, the values it took, and how many different answers it got."""

    label: str
    values: int
    answers: int


def move_controls(book: Book, widget: Any) -> list[Control]:
    """Move each control of a widget through all its values by arrow keys, choices and clicks."""
    found = []
    for row in widget.locator("xpath=./div[not(contains(@class, 'widget-output'))]").all():
        label = row.locator("label").first.inner_text()
        moves = list(_moves(row))
        answers = {_answer(book, widget, move) for move in moves}
        found.append(Control(label, len(moves), len(answers)))
    return found


def _moves(row: Any) -> Iterator[Callable[[], object]]:
    """Functions that each move the control on by one value; after them it has had every value."""
    if row.locator("select").count():
        names = row.locator("option").all_inner_texts()
        yield from (partial(row.locator("select").select_option, name) for name in [*names[1:], names[0]])
    elif (handle := row.locator(".noUi-handle")).count():
        first, last, now = (float(handle.get_attribute(f"aria-value{name}")) for name in ("min", "max", "now"))
        yield from (partial(handle.press, "ArrowLeft") for _ in range(round(now - first)))
        yield from (partial(handle.press, "ArrowRight") for _ in range(round(last - first)))
    else:
        yield from (button.click for button in row.locator("button").all())


def _answer(book: Book, widget: Any, move: Callable[[], object]) -> str:
    before = widget.evaluate(SHOWN)
    move()
    until = time.monotonic() + PATIENCE
    while (now := widget.evaluate(SHOWN)) == before and time.monotonic() < until:
        book.page.wait_for_timeout(100)
    book.idle()
    return widget.evaluate(SHOWN) if now != before else before


def widget_faults(book: Book) -> list[str]:
    """Move every control of every widget; what went wrong, one line each: errors, and controls that change nothing."""
    faults = []
    for number, widget in enumerate(book.widgets()):
        known = book.problems()
        controls = move_controls(book, widget)
        faults += [f"widget {number}: {text}" for text in book.problems()[len(known) :]]
        faults += [
            f"widget {number}: {control.label!r} changes nothing"
            for control in controls
            if control.values < 2 or control.answers < 2
        ]
        faults += [] if controls else [f"widget {number} has no controls"]
    return faults
