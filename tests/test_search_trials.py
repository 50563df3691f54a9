"""The journal of a search: claimed once, mended where it was cut off, and what it says as a value."""

import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import optuna
import pandas as pd
import psutil
import pytest
from filelock import FileLock, Timeout
from hypothesis import given, settings
from hypothesis import strategies as st
from search_helpers import SPACE, keys, model, read_by_optuna, score_of, states_of, the_point, wait_until

from prunekit import PrunekitError
from prunekit.search import Choice, HyperparameterSpace, Metric, Pairs, Range, measure_pairs
from prunekit.search.campaign import drawn
from prunekit.search.trials import Journal, Trials

N = 6
IDENTITY = {"model": "m", "space": SPACE.described(), "metric": [["score", "", False]]}
POINTS = drawn(SPACE, N, 0, ())([])


def opened(folder, identity=IDENTITY, space=SPACE):
    return Trials(folder / "journal.log", space, identity, maximize=False)


def measured(point):
    return {"score": score_of(point)}


def finish_all(trials, refuse=None):
    """Measure what waits; one point cannot be."""
    while (claimed := trials.claim()) is not None:
        number, point = claimed
        if point == refuse:
            trials.fail(number, "no such thing")
        else:
            trials.finish(number, measured(point), "score")


def points_of(trials):
    return [trial.params for trial in trials.finished()]


def eventful(folder):
    """A journal in which there is everything: points that were let go, one that failed, a round that grew."""
    trials = opened(folder)
    trials.add(0, drawn(SPACE, N - 2, 0, ()))
    number, point = trials.claim()
    trials.finish(number, measured(point), "score")
    for _ in range(2):
        trials.claim()
    trials.close()
    trials = opened(folder)
    trials.add(0, drawn(SPACE, N, 0, ()))
    finish_all(trials, POINTS[1])
    trials.close()
    return trials.path


@pytest.fixture
def quick(monkeypatch):
    """Where many journals are written, none of them need outlive a power cut."""
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture(scope="module")
def journal(tmp_path_factory):
    return eventful(tmp_path_factory.mktemp("journal")).read_bytes()


ORPHAN = """
import os, subprocess, sys, time
if len(sys.argv) > 1:
    from prunekit.search.worker import end_with
    end_with(os.getppid())
    print(os.getpid(), flush=True)
    time.sleep(600)
subprocess.Popen([sys.executable, __file__, "child"])
time.sleep(600)
"""


@pytest.mark.slow
def test_a_worker_ends_soon_after_its_parent_was_killed(tmp_path):
    (tmp_path / "orphan.py").write_text(ORPHAN)
    command = [sys.executable, str(tmp_path / "orphan.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline().strip().isdecimal()
        parent.kill()
        assert parent.stdout.read() == ""  # which ends when the child has closed it


def test_what_is_told_is_what_was_measured(tmp_path):
    path = eventful(tmp_path)
    trials = opened(tmp_path)
    expected = [POINTS[0], *POINTS[2:]]
    assert keys(points_of(trials)) == keys(expected) and trials.failed().popitem()[1] == "no such thing"
    table = trials.table()
    assert table["score"].tolist() == [score_of(point) for point in expected] and set(table["round"]) == {0}
    assert table["number"].is_unique and trials.n_open() == 0 and trials.claim() is None
    study = read_by_optuna(path)
    done = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    assert {trial.number: (trial.params, trial.value) for trial in done} == {
        number: (point, score_of(point)) for number, point in zip(table["number"], expected, strict=True)
    }
    assert study.best_params == min(expected, key=score_of)


def test_opening_writes_nothing_more(tmp_path):
    path = eventful(tmp_path)
    kept = path.read_bytes()
    for _ in range(3):
        opened(tmp_path).close()
    assert path.read_bytes() == kept


def test_each_point_is_claimed_once_whoever_asks(tmp_path):
    """Four threads, each with the journal open for itself, as processes have it."""
    n, mine = 24, [opened(tmp_path) for _ in range(4)]

    def work(trials):
        trials.add(0, drawn(SPACE, n, 0, ()))
        done = []
        while (claimed := trials.claim()) is not None:
            done.append(claimed[0])
            trials.finish(claimed[0], measured(claimed[1]), "score")
        return done

    with ThreadPoolExecutor(4) as threads:
        numbers = [number for done in threads.map(work, mine) for number in done]
    assert sorted(numbers) == list(range(n))
    for trials in mine:
        assert keys(points_of(trials)) == keys(drawn(SPACE, n, 0, ())([]))


def test_all_is_written_under_a_lock_that_is_taken_first(tmp_path, monkeypatch):
    """Else two would claim the same, or two threads wait for each other, as Optuna's storage has a lock of its own."""
    path, append, ask = tmp_path / "journal.log", Journal.append_logs, optuna.Study.ask

    def others_wait():
        with pytest.raises(Timeout), FileLock(f"{path}.lock", timeout=0):
            pass
        return True

    monkeypatch.setattr(Journal, "append_logs", lambda *args: others_wait() and append(*args))
    monkeypatch.setattr(optuna.Study, "ask", lambda *args: others_wait() and ask(*args))
    trials = opened(tmp_path)
    trials.add(0, lambda _: POINTS if others_wait() else [])
    (one, point), (other, _), _ = (trials.claim() for _ in range(3))
    trials.finish(one, measured(point), "score")
    trials.fail(other, "no such thing")
    trials.close()
    assert states_of(path).count("WAITING") == N - 2
    with FileLock(f"{path}.lock", timeout=0):  # and then they need not
        pass


HOLD = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def sleeper(tmp_path):
    """Another process that is at work as the run `other`."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "journal.log.other.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def claimed_by_other(trials, monkeypatch):
    """A claim of another process."""
    with monkeypatch.context() as patch:
        patch.setattr(trials, "_run", "other")
        return trials.claim()


@pytest.mark.parametrize("reaped", [True, False])
def test_what_a_dead_process_had_claimed_waits_again(tmp_path, monkeypatch, sleeper, reaped):
    trials = opened(tmp_path)
    trials.add(0, lambda _: POINTS[:2])
    _, point = claimed_by_other(trials, monkeypatch)
    number, other = trials.claim()
    trials.finish(number, measured(other), "score")
    assert trials.claim() is None and trials.n_open() == 1  # the other process is alive
    sleeper.kill()
    if reaped:
        sleeper.wait()
    else:  # whose parent does not ask how it ended: a zombie
        wait_until(lambda: psutil.Process(sleeper.pid).status() == psutil.STATUS_ZOMBIE)
    assert trials.claim()[1] == point != other


def test_a_run_holds_its_lock_while_it_lives_and_leaves_no_file(tmp_path):
    trials, other = opened(tmp_path), opened(tmp_path)
    trials.add(0, lambda _: POINTS[:1])
    number, point = trials.claim()
    assert other.claim() is None and other.n_open() == 1
    trials.close()
    assert other.claim()[1] == point
    other.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["journal.log", "journal.log.lock"]


def complete(data):
    """Numbers of the trials whose end stands in the whole lines of a journal."""
    lines = [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
    return sorted(line["trial_id"] for line in lines if line["op_code"] == 6 and line["state"] == 1)


def cuts(data):
    """Where to cut: at every end of a line, before and behind it, and inside."""
    ends = [0, *(i + 1 for i, byte in enumerate(data) if byte == 10)]
    around = {end + by for end in ends for by in (-1, 0, 1)} | {(a + b) // 2 for a, b in pairwise(ends)}
    return sorted(cut for cut in around if 0 <= cut <= len(data))


def test_a_journal_cut_off_anywhere_keeps_what_is_whole_and_goes_on(tmp_path, journal, quick):
    path, expected = tmp_path / "journal.log", sorted(keys([POINTS[0], *POINTS[2:]]))
    for cut in cuts(journal):
        path.write_bytes(journal[:cut])
        trials = opened(tmp_path)
        before = {trial.number: (trial.params, trial.value) for trial in trials.finished()}
        assert sorted(before) == complete(journal[:cut]), cut
        trials.add(0, drawn(SPACE, N, 0, ()))
        finish_all(trials, POINTS[1])
        after = {trial.number: (trial.params, trial.value) for trial in trials.finished()}
        assert before.items() <= after.items(), cut
        assert sorted(keys(points_of(trials))) == expected and len(trials.failed()) == 1, cut
        assert points_of(trials) == [POINTS[0], *POINTS[2:]], cut
        trials.close()


def test_a_line_that_another_left_half_written_is_mended_by_the_next(tmp_path):
    trials, other = opened(tmp_path), opened(tmp_path)
    trials.add(0, lambda _: POINTS[:3])
    for half in (b'{"op_code":6,"wor', b'{"op_code":4,"worker_id":"x"}', b"\0\0\0"):  # the second: all but its end
        number, point = trials.claim()
        with trials.path.open("ab") as file:
            file.write(half)
        assert other.n_open() + len(other.finished()) == 3
        trials.finish(number, measured(point), "score")
    assert points_of(trials) == points_of(other) == points_of(opened(tmp_path)) == POINTS[:3]
    assert all(json.loads(line) for line in trials.path.read_bytes().splitlines())


@pytest.mark.parametrize("line", [b"", b"{}", b"[]", b"17", b'{"op_code":6,"wor', b"\xff\xfe", b'"op_code"'])
def test_a_line_broken_in_the_middle_is_refused_by_its_number(tmp_path, journal, line):
    path, lines = tmp_path / "journal.log", journal.splitlines()
    for number in (1, 2, len(lines) // 2, len(lines)):
        broken = b"\n".join([*lines[: number - 1], line, *lines[number:], b""])
        path.write_bytes(broken)
        with pytest.raises(PrunekitError, match=f"line {number} of .*journal.log"):
            opened(tmp_path)
        assert path.read_bytes() == broken


def test_what_is_no_journal_is_refused(tmp_path):
    path = tmp_path / "journal.log"
    for content in (b"a,b\n1,2\n", b"{}\n", b"\x89PNG\r\n\x1a\n\0", b"[" * 100_000 + b"\n", b'{"op_code":0}\n'):
        path.write_bytes(content)
        with pytest.raises(PrunekitError, match="journal.log"):
            opened(tmp_path)
        assert path.read_bytes() == content or not content.endswith(b"\n")
    path.unlink()
    path.mkdir()
    with pytest.raises(PrunekitError, match="choose another folder"):
        opened(tmp_path)


@given(start=st.floats(0, 1), length=st.integers(0, 300), new=st.binary(max_size=40))
@settings(max_examples=100, deadline=None)
def test_whatever_a_journal_has_become_it_is_opened_or_refused(tmp_path_factory, journal, start, length, new):
    folder, at = tmp_path_factory.mktemp("damaged"), int(start * len(journal))
    (folder / "journal.log").write_bytes(journal[:at] + new + journal[at + length :])
    try:
        opened(folder).close()
    except PrunekitError as error:
        assert "journal.log" in str(error)


@pytest.mark.parametrize("name", ["model", "space", "metric"])
def test_a_journal_of_another_search_is_refused_by_what_differs(tmp_path, name):
    path = eventful(tmp_path)
    kept = path.read_bytes()
    with pytest.raises(PrunekitError, match=f"is of another search .different {name}."):
        opened(tmp_path, {**IDENTITY, name: "another"})
    assert path.read_bytes() == kept
    opened(tmp_path)


def test_an_interrupted_finish_leaves_nothing_half_told(tmp_path, monkeypatch):
    """Between the figures and the end of a trial: it is measured again."""
    trials = opened(tmp_path)
    trials.add(0, lambda _: POINTS[:1])
    number, point = trials.claim()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trials.study, "tell", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        trials.finish(number, measured(point), "score")
    trials.close()
    trials = opened(tmp_path)
    assert not trials.finished() and len(trials.table()) == 0
    finish_all(trials)
    assert points_of(trials) == POINTS[:1]


def test_what_is_closed_claims_nothing_more(tmp_path):
    trials = opened(tmp_path)
    trials.add(0, lambda _: POINTS)
    assert trials.claim() is not None
    trials.close()
    assert trials.claim() is None and states_of(trials.path).count("WAITING") == N


def test_infinite_figures_are_kept(tmp_path):
    trials = opened(tmp_path)
    trials.add(0, lambda _: POINTS[:2])
    for value in (math.inf, 2.0):
        trials.finish(trials.claim()[0], {"score": value}, "score")
    assert opened(tmp_path).table()["score"].tolist() == [math.inf, 2.0]


def pairs_of(points, values, space=SPACE, **options):
    rows = [
        {"number": i, "round": 0, **point, "parameters": 10.0 * i, "score": value, "seconds": 0.5}
        for i, (point, value) in enumerate(zip(points, values, strict=True))
    ]
    table = pd.DataFrame(rows, columns=None if rows else ["number", "round", *space.knobs])
    return Pairs(space, table, "score", **options)


ODD = HyperparameterSpace({"n": Choice((1, 2.5)), "flag": Choice((False, 3)), "wide": Range(0, 4)}, the_point)
NUMBERS = HyperparameterSpace({"n": Choice((1, 2)), "wide": Range(0, 4)}, the_point)


@pytest.mark.parametrize("space", [SPACE, ODD, NUMBERS])
def test_points_come_out_of_the_table_as_they_went_in(tmp_path, space):
    found = measure_pairs(
        space, model(), None, 6, metric=Metric("score", lambda point, _: len(point)), seed=3, folder=tmp_path
    )
    expected = space.sample(6, np.random.default_rng(3))
    assert keys(found.points) == keys(expected) and found.points == expected
    assert keys([found.best()]) == keys(expected[:1])
    assert [type(v) for v in found.points[0].values()] == [type(v) for v in expected[0].values()]


def test_a_budget_that_is_a_knob_is_read_as_what_was_used_of_it():
    space = HyperparameterSpace({"parameters": Range(15.0, 25.0)}, the_point)
    assert pairs_of([{}] * 4, [1.0] * 4, space).points == [{"parameters": value} for value in (15.0, 15.0, 20.0, 25.0)]


FIGURES = st.integers(1, 12).map(lambda n: math.inf if n > 10 else n / 4)


@pytest.mark.slow
@given(
    rows=st.lists(st.tuples(FIGURES, st.integers(0, 5)), min_size=1, max_size=12),
    maximize=st.booleans(),
    log=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_no_row_of_the_front_is_beaten_and_every_other_is(rows, maximize, log):
    points = SPACE.sample(len(rows), np.random.default_rng(0))
    sign = -1 if maximize else 1
    table = pairs_of(points, [sign * value if not log else value for value, _ in rows]).table
    table["parameters"] = [float(cost) for _, cost in rows]
    pairs = Pairs(SPACE, table, "score", maximize, log)
    low = (table["score"] * sign).tolist()
    front = pairs.front()
    for i, (value, cost) in enumerate(zip(low, table["parameters"], strict=True)):
        others = [(low[j], table["parameters"][j]) for j in range(len(rows)) if j != i]
        beaten = any(v <= value and c <= cost and (v, c) != (value, cost) for v, c in others)
        if i in front.index:
            assert not beaten
        else:
            assert beaten or (value, cost) in [(low[j], table["parameters"][j]) for j in front.index]
    assert front["parameters"].is_monotonic_increasing and "_value" not in front
    assert pairs.best_row()["score"] * sign == min(low) and pairs.best() == points[low.index(min(low))]
    for limit in {cost for _, cost in rows}:
        best = pairs.best_row(parameters=limit)
        assert best["parameters"] <= limit
        assert best["score"] * sign == min(v for v, c in zip(low, table["parameters"], strict=True) if c <= limit)
    assert np.isfinite(pairs.values).all()
    assert (np.diff(pairs.values[np.argsort(low, kind="stable")]) >= -1e-12).all()


def test_values_are_low_for_better_and_finite():
    figures = [4.0, 1.0, math.inf, 2.0]
    pairs = pairs_of(POINTS[:4], figures, log=True)
    np.testing.assert_allclose(pairs.values, np.log([4.0, 1.0, 4.0, 2.0]))
    assert pairs.best() == POINTS[1] and repr(pairs) == "Pairs(4 candidates; best score 1)"
    most = pairs_of(POINTS[:4], [-4.0, -1.0, -math.inf, -2.0], maximize=True)
    assert most.values.tolist() == [4.0, 1.0, 4.0, 2.0] and most.best() == POINTS[1]
    assert repr(most) == "Pairs(4 candidates; best score -1)"
    assert pairs_of(POINTS[:3], [math.inf, 7.0, math.inf]).best() == POINTS[1]
    assert pairs_of(POINTS[:2], [math.inf] * 2).values.tolist() == [0.0, 0.0]


def test_pairs_tell_what_they_are():
    pairs = pairs_of(POINTS[:2], [2.25, 1.25], failed={7: "no such thing"})
    assert len(pairs) == 2 and "1 could not be measured" in repr(pairs)
    html = pairs._repr_html_()
    assert repr(pairs) in html and html.count("<tr") == 3 and html.index("1.25") < html.index("2.25")
    for attempt in (lambda: pairs.best(macs=3), lambda: pairs.front("macs")):
        with pytest.raises(PrunekitError, match="'macs' was not noted; choose from number, round"):
            attempt()
    with pytest.raises(PrunekitError, match="no sample of 2 is within {'parameters': -1}; the lowest values are"):
        pairs.best(parameters=-1)
    none = pairs_of([], [])
    assert none.points == [] and len(none) == 0 and "none measured" in repr(none) and repr(none) in none._repr_html_()
    with pytest.raises(PrunekitError):
        none.best()
