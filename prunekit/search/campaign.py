"""Measures many candidates in one or more processes, locally or on a cluster, and resumes after an interrupt."""

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from joblib import Parallel, delayed, parallel_config
from torch import nn
from tqdm.auto import tqdm

from prunekit.annotations import Rule, is_integer, shown
from prunekit.checkpoint import save
from prunekit.checks import Count, FilePath, Seed, SharedModel, Tokenizer, check_choice, checked
from prunekit.digests import digest_of
from prunekit.documents import TextSource
from prunekit.errors import PrunekitError, need
from prunekit.evaluation.standard_tasks import Tasks
from prunekit.models import check_has_weights, device_of
from prunekit.search.pairs import Metric, Pairs, metrics_of
from prunekit.search.space import Point, Space, key_of
from prunekit.search.trials import Trials
from prunekit.search.worker import Work, carry_out, is_figure, keep_open, let_go

JOURNAL, MODEL = "journal.log", "model"  # what stands in the folder of a search
COLUMNS = ("number", "round", "seconds")  # that a table has besides hyperparameters, costs and metrics
WAIT = 0.5  # seconds between two checks of the other processes
Make = Callable[[list[Point]], list[Point]]
Jobs = Annotated[
    int, Rule(lambda n: is_integer(n) and (n > 0 or n == -1), "1 or more worker processes, or -1 for all cores")
]


@dataclass(frozen=True)
class Campaign:
    """Measures candidates of one space on one model, round by round; `open_campaign` makes it.

    Attributes:
        space: the space of the candidates.
        trials: the journal.
        work: what the workers need.
        n_jobs: worker processes.
        backend: of joblib.
    """

    space: Space
    trials: Trials
    work: Work
    n_jobs: int
    backend: str

    def run(self, number: int, make: Make) -> None:
        """Add the candidates of a round, and measure until none waits in any process.

        Raises:
            PrunekitError: every trial failed; the message gives the first reason.
        """
        self.trials.add(number, make)
        with tqdm(total=len(self.trials.finished()) + self.trials.n_open(), desc="candidates", unit="candidate") as bar:
            while self.trials.n_open():
                bar.update(len(self.trials.finished()) - bar.n)
                self._measure(bar)
                if self.trials.n_open():
                    bar.set_postfix_str("waiting for other processes")
                    time.sleep(WAIT)
            bar.update(len(self.trials.finished()) - bar.n)
        if not self.trials.finished():
            raise PrunekitError(
                f"every candidate failed: {next(iter(self.trials.failed().values()), 'there were none')}"
            )

    def pairs(self, before: float = math.inf) -> Pairs:
        """The samples measured so far, in rounds before `before`."""
        first, table = self.work.metrics[0], self.trials.table()
        table = table[table["round"] < before]
        return Pairs(self.space, table, first.name, first.maximize, first.log, self.trials.failed())

    def _measure(self, bar: tqdm) -> None:
        """Claim and measure one trial after another, as workers become free."""
        costs: dict[int, Mapping[str, float]] = {}

        def jobs() -> Iterator[Any]:
            while (claimed := self.trials.claim()) is not None:
                number, point = claimed
                costs[number] = self.space.costs(point)
                yield delayed(carry_out)(self.work, number, *self.space.job(point))

        options = {"batch_size": 1, "pre_dispatch": "2 * n_jobs", "return_as": "generator_unordered"}
        with parallel_config(backend=self.backend):
            for outcome in Parallel(n_jobs=self.n_jobs, **options)(jobs()):
                number, measured = outcome.number, {**costs[outcome.number], **outcome.measured}
                if outcome.why is None:
                    self.trials.finish(number, measured, self.work.metrics[0].name)
                else:
                    self.trials.fail(number, outcome.why)
                bar.update()


@contextmanager
def open_campaign(
    space: Space,
    model: nn.Module,
    tokenizer: Any,
    metrics: Sequence[Metric],
    *,
    folder: str | Path | None,
    n_jobs: int,
    backend: str,
    source: str | Path | None,
) -> Iterator[Campaign]:
    """A context in which candidates are measured; `measure_pairs` documents the arguments. The first metric counts."""
    here = n_jobs == 1 and backend == "loky"
    if source is not None and here:
        raise PrunekitError(
            f"source={str(source)!r} is where worker processes load the model, and n_jobs=1 measures in this one; "
            "leave it out, or give n_jobs=2 or more"
        )
    check_has_weights(model)
    costs = [name for name in space.cost_names if name not in space.goals]
    _check_names([*COLUMNS, *space.knobs, *costs, *(metric.name for metric in metrics)])
    _check_backend(backend)
    with ExitStack() as stack:
        place = Path(folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="prunekit_search_")))
        _make(place)
        fingerprint = digest_of(model).hexdigest()
        told = [[metric.name, metric.of, metric.maximize] for metric in metrics]
        identity = json.dumps({"model": fingerprint, "space": space.described(), "metric": told})
        trials = Trials(place / JOURNAL, space, json.loads(identity), maximize=metrics[0].maximize)
        stack.callback(trials.close)
        _check_measured(trials, metrics)
        stack.callback(let_go)
        if here:
            keep_open(fingerprint, model, tokenizer)
        elif source is None:
            source = place / MODEL
            with trials.lock:
                if not source.exists():
                    save(model, source, tokenizer=tokenizer)  # type: ignore[arg-type]
        where = str(Path(source).resolve()) if source and Path(source).exists() else str(source)
        work = Work(fingerprint, where, str(device_of(model)), metrics)
        yield Campaign(space, trials, work, n_jobs, backend)


def _check_measured(trials: Trials, metrics: Sequence[Metric]) -> None:
    """Raise an error for measurements that no metric gives, as in a journal that was edited."""
    names = [metric.name for metric in metrics]
    for trial in trials.finished():
        measured: Any = trial.user_attrs.get("measured")
        fits = isinstance(measured, Mapping) and all(map(is_figure, metrics, map(measured.get, names)))
        if not fits or measured[names[0]] != trial.value:
            raise PrunekitError(
                f"trial {trial.number} of {str(trials.path)!r} has measurements that {', '.join(names)} cannot give: "
                f"{shown(measured)}; delete the journal to begin anew"
            )


@checked
def measure_pairs(
    space: Space,
    model: SharedModel,
    tokenizer: Tokenizer | None,
    n: Count,
    *,
    metric: str | Metric = "perplexity",
    also: str | Metric | Iterable[str | Metric] = (),
    text: TextSource | None = None,
    tasks: Tasks | None = None,
    start: Sequence[Point] = (),
    seed: Seed = 0,
    folder: FilePath | None = None,
    n_jobs: Jobs = 1,
    backend: str = "loky",
    source: FilePath | None = None,
) -> Pairs:
    """Builds and measures random candidates of a space.

    Args:
        space: where the n candidates are drawn.
        model: the dense model; unchanged.
        tokenizer: its tokenizer.
        n: number of candidates, including those already in the folder.
        metric: `"perplexity"`, `"accuracy"` or a `Metric`.
        also: more metrics to measure.
        text: text for perplexity; None is the embedded world's validation text.
        tasks: for accuracy, as `zero_shot` takes them; None is the embedded world's.
        start: candidates to measure first.
        seed: seed of the random candidates.
        folder: where the journal is kept. A run with the same model, space and metrics resumes from it, and several
            processes may share it. None keeps nothing.
        n_jobs: worker processes, each with one torch thread; 1 measures in this process, -1 uses all
            cores. Starting workers takes time, so they are slower for few or quick candidates.
        backend: of joblib: `"loky"`, or `"dask"` with the workers of a client that is connected already.
        source: where workers load the model; None writes a copy into the folder, which all of them must see.

    Returns:
        The samples: candidates and what was measured of them.

    Raises:
        PrunekitError: an unknown metric or backend, a folder of another search, or every candidate failed.
            Any other exception in your own build or metric stops the run; the folder keeps what was measured.

    Source: Ji et al. (arXiv 2309.09507): sampled architectures are really pruned and measured.
    """
    metrics = metrics_of(metric, also, tokenizer, text, tasks)
    options: Any = {"folder": folder, "n_jobs": n_jobs, "backend": backend, "source": source}
    with open_campaign(space, model, tokenizer, metrics, **options) as campaign:
        campaign.run(0, drawn(space, n, seed, start))
        return campaign.pairs()


def drawn(space: Space, n: int, seed: int, start: Sequence[Point]) -> Make:
    """A function that returns the candidates still missing of n: the given ones, then random ones."""
    given = list({key_of(point): point for point in map(space.check, start)}.values())
    if len(given) > n:
        raise PrunekitError(f"start has {len(given)} candidates, and {n} are measured; give fewer, or a larger number")

    def make(there: list[Point]) -> list[Point]:
        missing, known = max(0, n - len(there)), {key_of(point) for point in there}
        rest = space.sample(max(0, n - len(given)), np.random.default_rng(seed), given) if missing else []
        return [point for point in [*given, *rest] if key_of(point) not in known][:missing]

    return make


def _check_names(names: Sequence[str]) -> None:
    """Raise an error where two columns would have the same name."""
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise PrunekitError(
            f"{twice[0]!r} names two columns of {', '.join(names)}; rename the metric or hyperparameter"
        )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PrunekitError(
            f"{str(folder)!r} cannot be created as a folder ({error.strerror}); choose another"
        ) from None


def _check_backend(backend: str) -> None:
    """Raise an error for a backend that joblib cannot use now."""
    check_choice("backend", backend, ("loky", "dask"))
    if backend == "dask":
        need("dask", "distributed", why="backend='dask'")
        from distributed import get_client

        try:
            get_client()
        except ValueError:
            raise PrunekitError("backend='dask' needs a client: make one first, distributed.Client(…)") from None
