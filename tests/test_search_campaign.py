"""Points measured by many workers and processes, interrupted and resumed: the same figures, and nothing twice."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Lock, Thread

import numpy as np
import pandas as pd
import pytest
import torch
from evaluation_helpers import TEXT, byte_tokenizer, llama
from joblib.externals.loky import get_reusable_executor
from search_helpers import (
    KNOBS,
    PATIENCE,
    SCORE,
    SPACE,
    gated,
    keys,
    loads_of,
    model,
    noting,
    pid_of,
    read_by_optuna,
    score_of,
    states_of,
    the_point,
    threads_of,
    together,
    wait_until,
)
from shared import ROOT, run_script

from prunekit import PrunekitError, save
from prunekit.search import Choice, HyperparameterSpace, Metric, Range, measure_pairs, worker
from prunekit.search.campaign import drawn

N = 12


@pytest.fixture(scope="module", autouse=True)
def no_workers_stay():
    """Tests that end workers stand last of those that use them, for these take seconds to start."""
    yield
    get_reusable_executor().shutdown(wait=True)


@pytest.fixture(scope="module")
def expected():
    """What one process measures at once."""
    return told(measure_pairs(SPACE, llama(), None, N, metric=SCORE))


def told(pairs):
    """The table without what differs from run to run."""
    return pairs.table[["round", *KNOBS, "score"]]


def same(pairs, table):
    """Whether these are the pairs of the table, and the points that the seed 0 draws."""
    pd.testing.assert_frame_equal(told(pairs), table, check_exact=True)
    return keys(pairs.points) == keys(SPACE.sample(len(table), np.random.default_rng(0)))


def done_in(folder):
    """Number → point, value and time, of what Optuna says is complete."""
    study = read_by_optuna(folder / "journal.log")
    return {t.number: (t.params, t.value, t.datetime_complete) for t in study.trials if t.state.name == "COMPLETE"}


def waiting(measure, folder, **options):
    """A score that is told when others are there, who show themselves in a folder."""
    folder.mkdir(exist_ok=True)
    return Metric("score", partial(measure, folder=folder, **options))


def script(folder, body):
    """A script that finds all that it needs, and its own folder."""
    path = folder / "script.py"
    head = """
from functools import partial
from pathlib import Path

from evaluation_helpers import llama
from search_helpers import *
from prunekit.search import HyperparameterSpace, Metric, measure_pairs

folder = Path(__file__).parent
if __name__ == "__main__":
"""
    path.write_text(head + body)
    return path


@contextmanager
def started(path):
    """A script in a process group of its own, of which nothing is left."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ROOT)])}
    process = subprocess.Popen([sys.executable, str(path)], env=environment, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def killed(tmp_path):
    """A run of two workers, killed when five of its points are measured and two are being measured; they live on."""
    body = f"""
    metric = Metric("score", partial(gated, folder=folder / "gate", free=5))
    measure_pairs(SPACE, llama(), None, {N}, metric=metric, folder=folder / "search", n_jobs=2)
"""

    def halfway():
        states = states_of(tmp_path / "search" / "journal.log")
        return (states.count("COMPLETE") == 5 and states.count("RUNNING") >= 2) or process.poll() is not None

    with started(script(tmp_path, body)) as process:
        wait_until(halfway)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        (tmp_path / "gate" / "open").touch()
        yield tmp_path / "search"


@pytest.mark.slow
def test_workers_measure_what_one_process_does(tmp_path, expected):
    """Both of them, elsewhere, with one thread each, and the model loaded once."""
    before = torch.get_num_threads()
    also = [Metric("pid", pid_of), Metric("threads", threads_of), Metric("loads", loads_of)]
    metric, space = waiting(together, tmp_path / "meet", n=2), HyperparameterSpace(KNOBS, noting)
    pairs = measure_pairs(space, llama(5), None, N, metric=metric, also=also, n_jobs=2, folder=tmp_path / "search")
    assert same(pairs, expected)
    assert pairs.table["pid"].nunique() == 2 and os.getpid() not in set(pairs.table["pid"])
    assert set(pairs.table["threads"]) == {1} and set(pairs.table["loads"]) == {1}
    assert torch.get_num_threads() == before and not worker._OPEN
    assert {path.name for path in (tmp_path / "search").iterdir()} == {"journal.log", "journal.log.lock", "model"}


def test_real_perplexities_are_the_same_in_workers_of_a_checkpoint(tmp_path):
    dense, tokenizer = llama(), byte_tokenizer()
    save(dense, tmp_path / "given", tokenizer=tokenizer)
    space = HyperparameterSpace({"factor": Range(0.5, 2.0)}, scaled)
    options = {"text": TEXT[:120], "also": [Metric("has_tokenizer", has_tokenizer)]}
    here = measure_pairs(space, dense, tokenizer, 3, **options)
    source = tmp_path / "given"
    there = measure_pairs(space, dense, tokenizer, 3, **options, n_jobs=2, source=source, folder=tmp_path / "search")
    np.testing.assert_allclose(here.table["perplexity"], there.table["perplexity"], rtol=1e-5)
    assert there.table["perplexity"].nunique() == 3 and set(there.table["has_tokenizer"]) == {1}
    assert not (tmp_path / "search" / "model").exists() and there.log


def scaled(model, point):
    """Another model, of which the first one's weights are left alone."""
    other = type(model)(model.config).eval()
    other.load_state_dict({name: value * point["factor"] for name, value in model.state_dict().items()})
    return other


def has_tokenizer(model, tokenizer):
    return float(tokenizer is not None)


@pytest.mark.slow
def test_a_killed_run_goes_on_in_another_process(tmp_path, expected):
    metric = waiting(gated, tmp_path / "gate", free=5)
    with killed(tmp_path) as folder:
        before = done_in(folder)
        pairs = measure_pairs(SPACE, llama(), None, N, metric=metric, folder=folder, n_jobs=2)
        after = done_in(folder)
        assert len(before) == 5 and len(after) == N and all(after[number] == before[number] for number in before)
        assert same(pairs, expected) and set(before) <= set(pairs.table["number"])
        assert not {"RUNNING", "WAITING"} & set(states_of(folder / "journal.log"))


@pytest.mark.slow
def test_a_source_that_holds_another_model_is_refused(tmp_path):
    save(llama(6), tmp_path / "other")
    options = {"metric": SCORE, "n_jobs": 2, "folder": tmp_path / "search"}
    with pytest.raises(PrunekitError, match="other' contains another model than the one given"):
        measure_pairs(SPACE, llama(7), None, 3, source=tmp_path / "other", **options)
    assert not {"RUNNING", "COMPLETE"} & set(states_of(tmp_path / "search" / "journal.log"))
    assert len(measure_pairs(SPACE, llama(7), None, 3, **options | {"n_jobs": 1})) == 3
    with pytest.raises(PrunekitError, match="nowhere"):
        worker.opened(worker.Work("", str(tmp_path / "nowhere"), "cpu", [SCORE]))


def test_what_stops_a_worker_leaves_its_points_waiting(tmp_path, expected):
    (tmp_path / "broken").touch()
    metric = Metric("score", partial(score_unless, file=tmp_path / "broken"))
    options = {"metric": metric, "folder": tmp_path / "search"}
    with pytest.raises(RuntimeError, match="a bug"):
        measure_pairs(SPACE, llama(), None, N, **options, n_jobs=2)
    assert "RUNNING" not in states_of(tmp_path / "search" / "journal.log")
    (tmp_path / "broken").unlink()
    pairs = measure_pairs(SPACE, llama(), None, N, **options)
    assert same(pairs, expected) and not pairs.failed
    assert states_of(tmp_path / "search" / "journal.log").count("COMPLETE") == N


def score_unless(point, tokenizer, *, file):
    if file.exists() and point["by"] == "l1":
        raise RuntimeError("a bug")
    return score_of(point)


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path, expected):
    """Neither finishes its first point before both have one."""
    body = f"""
    metric = Metric("score", partial(together, folder=folder / "meet", n=2))
    measure_pairs(SPACE, llama(), None, {N}, metric=metric, folder=folder / "search").table.to_pickle(folder / "table")
"""
    metric, folder = waiting(together, tmp_path / "meet", n=2), tmp_path / "search"
    with started(script(tmp_path, body)) as process:
        pairs = measure_pairs(SPACE, llama(), None, N, metric=metric, folder=folder)
        assert process.wait(timeout=PATIENCE) == 0
        trials = read_by_optuna(folder / "journal.log").trials
        assert {trial.user_attrs["worker"]["pid"] for trial in trials} == {os.getpid(), process.pid}
    assert same(pairs, expected) and states_of(folder / "journal.log") == ["COMPLETE"] * N
    pd.testing.assert_frame_equal(pd.read_pickle(tmp_path / "table"), pairs.table, check_exact=True)


@pytest.mark.slow
def test_dask_measures_what_one_process_does(tmp_path, expected):
    body = f"""
    from dask.distributed import Client, LocalCluster

    workers = {{"n_workers": 2, "threads_per_worker": 1, "processes": True}}
    with LocalCluster(**workers, dashboard_address=None, host="127.0.0.1") as cluster, Client(cluster) as client:
        client.wait_for_workers(2)
        metric = Metric("score", partial(together, folder=folder / "meet", n=2))
        options = {{"also": [Metric("pid", pid_of), Metric("loads", loads_of)], "n_jobs": -1, "backend": "dask"}}
        pairs = measure_pairs(HyperparameterSpace(KNOBS, noting), llama(), None, {N}, metric=metric, **options)
        pairs.table.to_pickle(folder / "table")
"""
    (tmp_path / "meet").mkdir()
    done = run_script(script(tmp_path, body))
    assert done.returncode == 0, done.stderr
    table = pd.read_pickle(tmp_path / "table")
    pd.testing.assert_frame_equal(table[["round", *KNOBS, "score"]], expected, check_exact=True)
    assert table["pid"].nunique() == 2 and set(table["loads"]) == {1}


class Unmakeable(HyperparameterSpace):
    """Whose points cannot all be told to a worker."""

    def job(self, point):
        if point["by"] == "l1":
            raise RuntimeError("no job")
        return super().job(point)


def test_what_cannot_even_be_sent_stops_the_run_too(tmp_path):
    with pytest.raises(RuntimeError, match="no job"):
        measure_pairs(Unmakeable(KNOBS, the_point), model(), None, N, metric=SCORE, folder=tmp_path)
    assert "RUNNING" not in states_of(tmp_path / "journal.log")


def test_more_points_are_those_of_a_run_that_asked_for_them_at_once(tmp_path, expected):
    measure_pairs(SPACE, model(), None, 5, metric=SCORE, folder=tmp_path)
    first = done_in(tmp_path)
    pairs = measure_pairs(SPACE, model(), None, N, metric=SCORE, folder=tmp_path)
    assert same(pairs, expected) and len(first) == 5 and all(done_in(tmp_path)[i] == first[i] for i in first)
    kept = (tmp_path / "journal.log").read_bytes()
    for n in (N, 3):
        assert same(measure_pairs(SPACE, model(), None, n, metric=SCORE, folder=tmp_path), expected)
    assert (tmp_path / "journal.log").read_bytes() == kept
    other = measure_pairs(SPACE, model(), None, N + 4, metric=SCORE, folder=tmp_path, seed=1)
    assert len(set(keys(other.points))) == N + 4 and same(replaced(other, other.table[:N]), expected)


def replaced(pairs, table):
    return type(pairs)(pairs.space, table, pairs.metric)


def test_points_to_start_with_come_first_and_once(tmp_path):
    start = SPACE.sample(3, np.random.default_rng(5))
    pairs = measure_pairs(SPACE, model(), None, 5, metric=SCORE, start=[*start, start[0]], folder=tmp_path)
    assert pairs.points[:3] == start and len(set(keys(pairs.points))) == 5
    again = measure_pairs(SPACE, model(), None, 7, metric=SCORE, start=start, folder=tmp_path)
    assert again.points[:5] == pairs.points and len(set(keys(again.points))) == 7
    with pytest.raises(PrunekitError, match="start has 3 candidates, and 2 are measured"):
        measure_pairs(SPACE, model(), None, 2, metric=SCORE, start=start)
    with pytest.raises(PrunekitError, match="is no candidate of this space"):
        measure_pairs(SPACE, model(), None, 2, metric=SCORE, start=[{"share": 1}])


def test_many_points_can_be_added_to_many():
    first = drawn(SPACE, 1500, 0, ())([])
    assert drawn(SPACE, 1503, 0, ())(first) == SPACE.sample(1503, np.random.default_rng(0))[1500:]


@pytest.mark.parametrize("name", ["model", "space", "metric", "text"])
def test_a_folder_of_another_search_is_refused(tmp_path, name):
    space = HyperparameterSpace({"factor": Range(0.5, 2.0)}, lambda model, _: model)
    given = {"space": space, "model": llama(), "tokenizer": byte_tokenizer(), "n": 1, "text": TEXT[:120]}
    measure_pairs(**given, folder=tmp_path)
    kept = (tmp_path / "journal.log").read_bytes()
    other = llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    changed = {
        "model": {"model": other},
        "space": {"space": HyperparameterSpace({"factor": Range(0.5, 3.0)}, space.build)},
        "metric": {"metric": Metric("perplexity", lambda *_: 1.0), "text": None},
        "text": {"text": TEXT[:121]},
    }[name]
    with pytest.raises(PrunekitError, match=f"different {name.replace('text', 'metric')}.; give another folder"):
        measure_pairs(**{**given, **changed}, folder=tmp_path)
    assert (tmp_path / "journal.log").read_bytes() == kept
    measure_pairs(**given, folder=tmp_path)
    assert (tmp_path / "journal.log").read_bytes() == kept


def calls(measure):
    """A metric that notes its points."""
    noted = []
    return Metric("score", lambda point, tokenizer: (noted.append(point), measure(point))[1]), noted


def test_points_that_fail_are_told_and_not_tried_again(tmp_path):
    def build(model, point):
        if point["by"] == "l1":
            raise PrunekitError("no l1 here")
        return point

    space = HyperparameterSpace(KNOBS, build)
    metric, noted = calls(score_of)
    for n in (N, N, N + 4):
        pairs = measure_pairs(space, model(), None, n, metric=metric, folder=tmp_path)
        expected = [p for p in space.sample(n, np.random.default_rng(0)) if p["by"] == "taylor"]
        assert pairs.points == noted == expected and set(pairs.failed.values()) == {"no l1 here"}
        assert len(pairs.failed) == n - len(expected) > 0 and f"{len(pairs.failed)} could not be" in repr(pairs)


@pytest.mark.parametrize("answer", [float("nan"), "good", "3.5", None, torch.ones(2), 10**400])
def test_figures_that_are_no_numbers_fail(tmp_path, answer):
    metric, noted = calls(lambda point: answer if point["whole"] else score_of(point))
    pairs = measure_pairs(SPACE, model(), None, N, metric=metric, folder=tmp_path)
    assert 0 < len(pairs) < N and not any(point["whole"] for point in pairs.points)
    assert len(pairs.failed) == N - len(pairs) and len(noted) == N
    assert all("metric 'score' gave" in why and "must give a number" in why for why in pairs.failed.values())


def test_what_does_not_fit_into_memory_fails_for_good(tmp_path):
    """Else every resume would claim it first, and end there."""

    def measure(point):
        if point["whole"]:
            raise torch.OutOfMemoryError("tried to allocate 80 GiB")
        return score_of(point)

    metric, noted = calls(measure)
    for _ in range(2):
        pairs = measure_pairs(SPACE, model(), None, N, metric=metric, folder=tmp_path)
        assert 0 < len(pairs.failed) == N - len(pairs) and len(noted) == N
        assert set(pairs.failed.values()) == {"out of memory"}


def test_where_all_fail_the_reason_is_told(tmp_path):
    def build(model, point):
        raise PrunekitError("never works")

    metric, noted = calls(score_of)
    for _ in range(2):
        with pytest.raises(PrunekitError, match="every candidate failed: never works"):
            measure_pairs(HyperparameterSpace(KNOBS, build), model(), None, 3, metric=metric, folder=tmp_path)
    assert not noted and states_of(tmp_path / "journal.log") == ["FAIL"] * 3


def test_infinite_figures_are_kept_and_count_as_the_largest():
    pairs = measure_pairs(
        SPACE, model(), None, N, metric=Metric("score", lambda p, _: float("inf") if p["whole"] else p["share"])
    )
    whole = np.array([point["whole"] for point in pairs.points])
    assert np.isinf(pairs.table["score"])[whole].all() and not pairs.failed and whole.any()
    assert (pairs.values[whole] == pairs.table["score"][~whole].max()).all() and not pairs.best()["whole"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("a bug"), SystemExit])
def test_what_stops_a_run_leaves_its_points_waiting(tmp_path, expected, error):
    left = [error]

    def measure(point):
        if len(noted) == 4 and left:
            raise left.pop()
        return score_of(point)

    metric, noted = calls(measure)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        measure_pairs(SPACE, model(), None, N, metric=metric, folder=tmp_path)
    states = states_of(tmp_path / "journal.log")
    assert states.count("COMPLETE") == 3 and states.count("WAITING") == N - 3 and not worker._OPEN
    assert "RUNNING" not in states
    pairs = measure_pairs(SPACE, model(), None, N, metric=metric, folder=tmp_path)
    assert same(pairs, expected) and len(noted) == N + 1 and not pairs.failed


def test_a_process_with_several_threads_measures_one_point_at_a_time():
    """They share the model, which may be another for a while."""
    alone, overlaps = Lock(), []

    def measure(built, tokenizer):
        free = alone.acquire(blocking=False)
        overlaps.append(not free)
        torch.rand(300, 300) @ torch.rand(300, 300)
        if free:
            alone.release()
        return 1.0

    work = worker.Work("f", "", "cpu", [Metric("score", measure)])
    worker.keep_open("f", model(), None)
    threads = [Thread(target=lambda: [worker.carry_out(work, 0, the_point, {}) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    worker.let_go()
    assert len(overlaps) == 80 and not any(overlaps)


def test_optuna_reads_the_journal(tmp_path):
    metric = Metric("score", score_of, maximize=True)
    pairs = measure_pairs(SPACE, model(), None, N, metric=metric, folder=tmp_path)
    study = read_by_optuna(tmp_path / "journal.log")
    assert [trial.params for trial in study.trials] == pairs.points
    assert [trial.value for trial in study.trials] == pairs.table["score"].tolist()
    assert study.direction.name == "MAXIMIZE" and study.best_params == pairs.best()
    assert set(study.trials_dataframe().columns) >= {f"params_{name}" for name in KNOBS}
    assert study.user_attrs["identity"]["metric"] == [["score", "", True]]


def test_what_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")

    def run(space=SPACE, n=2, metric=SCORE, **options):
        return measure_pairs(space, model(), None, n, metric=metric, **options)

    for message, attempt in {
        "metric='speed' is unknown; give 'perplexity', 'accuracy', or Metric": lambda: run(metric="speed"),
        "=3 is not allowed; give a text": lambda: run(also=[3]),
        "a metric named '' of": lambda: Metric("", score_of),
        "a metric named 'score' of 3": lambda: Metric("score", 3),
        "backend='threads' is unknown; allowed: 'loky', 'dask'": lambda: run(backend="threads"),
        "n=0 is not allowed": lambda: run(n=0),
        "n=2.0 is not allowed": lambda: run(n=2.0),
        "n_jobs=0 is not allowed": lambda: run(n_jobs=0),
        "n_jobs=-2 is not allowed": lambda: run(n_jobs=-2),
        "space=.* is not allowed; give a PlanSpace": lambda: run(space=KNOBS),
        "file' cannot be created as a folder": lambda: run(folder=tmp_path / "file"),
        "file/in' cannot be created as a folder": lambda: run(folder=tmp_path / "file" / "in"),
        "'share' names two columns of number": lambda: run(metric=Metric("share", score_of)),
        "'score' names two columns": lambda: run(also=[SCORE]),
        "'seconds' names two columns": lambda: run(HyperparameterSpace({"seconds": Choice((1, 2))}, the_point)),
        "5 different candidates were found of the 9": lambda: run(
            HyperparameterSpace({"a": Choice((1, 2, 3, 4, 5))}, the_point), n=9, metric=Metric("one", lambda *_: 1)
        ),
    }.items():
        with pytest.raises(PrunekitError, match=message):
            attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
