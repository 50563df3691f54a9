"""Many points measured: by one process or several, here or on a cluster, going on where it was interrupted."""

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from joblib import Parallel, delayed, parallel_config
from torch import nn
from tqdm.auto import tqdm

from prunekit.checkpoint import save
from prunekit.checks import check_choice, check_integers
from prunekit.documents import TextSource
from prunekit.errors import PrunekitError
from prunekit.extras import need
from prunekit.fingerprint import digest_of
from prunekit.models import device_of
from prunekit.questions import Task
from prunekit.search.metrics import Metric, metrics_of
from prunekit.search.pairs import Pairs
from prunekit.search.space import Point, Space, key_of
from prunekit.search.trials import Trials
from prunekit.search.working import Work, carry_out, keep_open, let_go

JOURNAL, MODEL = "journal.log", "model"  # what stands in the folder of a search
COLUMNS = ("number", "round", "seconds")  # that a table has besides knobs, costs and metrics
WAIT = 0.5  # seconds between two looks at what others are doing
Make = Callable[[list[Point]], list[Point]]


class Campaign:
    """Points of one space, measured with one model: a context, within which rounds of them can be run.

    Attributes:
        space: of which the points are.
        metrics: what is measured; the first is what is searched for.
        trials: the journal.
    """

    def __init__(
        self,
        space: Space,
        model: nn.Module,
        tokenizer: Any,
        metrics: Sequence[Metric],
        *,
        folder: str | Path | None = None,
        n_jobs: int = 1,
        backend: str = "loky",
        source: str | Path | None = None,
    ) -> None:
        """Checks what is given; see `measure_pairs` for what it is."""
        if not isinstance(space, Space):
            raise PrunekitError(f"space is a {type(space).__name__}; give a PlanSpace, a KnobSpace or another Space")
        if n_jobs != -1 and (isinstance(n_jobs, bool) or not isinstance(n_jobs, int) or n_jobs < 1):
            raise PrunekitError(
                f"n_jobs={n_jobs!r} is not allowed; give 1 or more worker processes, or -1 for all cores"
            )
        if not isinstance(model, nn.Module):
            raise PrunekitError(f"the model is a {type(model).__name__}; give the dense model, as load(…) returns it")
        self.space, self.metrics = space, list(metrics)
        costs = [name for name in space.cost_names if name not in space.goals]
        _check_names([*COLUMNS, *space.knobs, *costs, *(metric.name for metric in self.metrics)])
        self._model, self._tokenizer, self._source = model, tokenizer, source
        self._folder, self._n_jobs, self._backend = folder, n_jobs, _known(backend)
        self._stack, self._costs = ExitStack(), dict[int, Mapping[str, float]]()

    def __enter__(self) -> "Campaign":
        with ExitStack() as stack:
            folder = Path(self._folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="prunekit_search_")))
            _make(folder)
            fingerprint = digest_of(self._model).hexdigest()
            self.trials = Trials(
                folder / JOURNAL, self.space, self._identity(fingerprint), maximize=self.metrics[0].maximize
            )
            stack.callback(self.trials.close)
            self._work = self._opened(folder, fingerprint)
            stack.callback(let_go)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.close()

    def run(self, number: int, make: Make) -> None:
        """Add the points of a round, and measure all that wait, until nobody has any left to do.

        Raises:
            PrunekitError: not one trial could be measured; its reason is told.
        """
        self.trials.add(number, make)
        with tqdm(total=len(self.trials.finished()) + self.trials.n_open(), desc="pairs", unit="pair") as bar:
            while self.trials.n_open():
                bar.update(len(self.trials.finished()) - bar.n)
                self._measure(bar)
                if self.trials.n_open():
                    bar.set_postfix_str("others are at work")
                    time.sleep(WAIT)
            bar.update(len(self.trials.finished()) - bar.n)
        if not self.trials.finished():
            raise PrunekitError(f"none could be measured: {next(iter(self.trials.failed().values()), 'no points')}")

    def pairs(self, before: float = math.inf) -> Pairs:
        """What has been measured so far, in the rounds before a number."""
        first, table = self.metrics[0], self.trials.table()
        table = table[table["round"] < before]
        return Pairs(self.space, table, first.name, first.maximize, first.log, self.trials.failed())

    def _measure(self, bar: tqdm) -> None:
        """Claim trial after trial, as workers become free."""
        with parallel_config(backend=self._backend):
            options = {"batch_size": 1, "pre_dispatch": "2 * n_jobs", "return_as": "generator_unordered"}
            for outcome in Parallel(n_jobs=self._n_jobs, **options)(self._jobs()):
                costs = self._costs.pop(outcome.number)
                if outcome.why is None:
                    self.trials.finish(outcome.number, {**costs, **outcome.measured}, self.metrics[0].name)
                else:
                    self.trials.fail(outcome.number, outcome.why)
                bar.update()

    def _jobs(self) -> Iterator[Any]:
        while (claimed := self.trials.claim()) is not None:
            number, point = claimed
            self._costs[number] = self.space.costs(point)
            yield delayed(carry_out)(self._work, number, *self.space.job(point))

    def _identity(self, fingerprint: str) -> dict[str, Any]:
        metrics = [[metric.name, metric.of, metric.maximize] for metric in self.metrics]
        identity = {"model": fingerprint, "space": self.space.described(), "metric": metrics}
        return json.loads(json.dumps(identity))  # as it will be read again

    def _opened(self, folder: Path, fingerprint: str) -> Work:
        """What workers are told; where they are other processes, with a copy of the model to load."""
        source = folder / MODEL if self._source is None else self._source
        if self._n_jobs == 1 and self._backend == "loky":
            keep_open(fingerprint, self._model, self._tokenizer)
        elif self._source is None:
            with self.trials.lock:
                if not Path(source).exists():
                    save(self._model, source, tokenizer=self._tokenizer)  # type: ignore[arg-type]
        where = str(Path(source).resolve()) if Path(source).exists() else str(source)
        return Work(fingerprint, where, str(device_of(self._model)), self.metrics)


def measure_pairs(
    space: Space,
    model: nn.Module,
    tokenizer: Any,
    n: int,
    *,
    metric: str | Metric = "perplexity",
    also: Iterable[str | Metric] = (),
    text: TextSource | None = None,
    tasks: Mapping[str, Task] | Iterable[Task] | None = None,
    start: Sequence[Point] = (),
    seed: int = 0,
    folder: str | Path | None = None,
    n_jobs: int = 1,
    backend: str = "loky",
    source: str | Path | None = None,
) -> Pairs:
    """Measures points of a space: each is really built, asked, and forgotten.

    Args:
        space: of which n points are drawn.
        model: the dense model; it is left alone.
        tokenizer: its tokenizer.
        n: points in all, those counted that the folder has already.
        metric: `"perplexity"`, `"accuracy"` or a `Metric`: what is searched for.
        also: more of them, measured on the way.
        text: for perplexity; None is the embedded world's validation text.
        tasks: for accuracy; None is the embedded world's.
        start: points to measure first.
        seed: of the points that are drawn.
        folder: where the journal is kept, from which a run with the same model, space and metrics goes on, and in
            which several processes may work at once. None keeps nothing.
        n_jobs: worker processes, each with one torch thread; 1 measures in this one, -1 takes all cores. Starting
            them takes a while, which few or quick points do not pay for.
        backend: of joblib: `"loky"`, or `"dask"` with the workers of a client that is connected already.
        source: where workers load the model; None writes a copy into the folder, which all of them must see.

    Returns:
        The pairs of points and figures.

    Raises:
        PrunekitError: an unknown metric or backend, a folder of another search, or no point that could be measured.
            What else a build or a metric of one's own raises ends the run; what was measured stays in the folder.

    Source: Ji et al. (arXiv 2309.09507): sampled architectures are really pruned and measured.
    """
    check_integers(n=(n, 1), seed=(seed, 0))
    metrics = metrics_of(metric, also, tokenizer, text, tasks)
    options = {"folder": folder, "n_jobs": n_jobs, "backend": backend, "source": source}
    with Campaign(space, model, tokenizer, metrics, **options) as campaign:  # type: ignore[arg-type]
        campaign.run(0, drawn(space, n, seed, start))
        return campaign.pairs()


def drawn(space: Space, n: int, seed: int, start: Sequence[Point]) -> Make:
    """What adds the points that are missing of n, some given and the others drawn."""

    def make(there: list[Point]) -> list[Point]:
        missing, known = max(0, n - len(there)), {key_of(point) for point in there}
        given = list({key_of(point): point for point in map(space.check, start)}.values())
        rest = space.sample(max(0, n - len(given)), np.random.default_rng(seed), given) if missing else []
        return [point for point in [*given, *rest] if key_of(point) not in known][:missing]

    return make


def _check_names(names: Sequence[str]) -> None:
    """Refuse a table in which two columns would be one."""
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise PrunekitError(f"{twice[0]!r} names two columns of {', '.join(names)}; give a metric or knob another name")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PrunekitError(f"{str(folder)!r} cannot be made a folder ({error.strerror}); choose another") from None


def _known(backend: str) -> str:
    """The name of a backend that joblib can use now."""
    check_choice("backend", backend, ("loky", "dask"))
    if backend == "dask":
        need("dask", "distributed", why="backend='dask'")
        from distributed import get_client

        try:
            get_client()
        except ValueError:
            raise PrunekitError("backend='dask' needs a client: make one first, distributed.Client(…)") from None
    return backend
