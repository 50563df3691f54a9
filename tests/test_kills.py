"""SIGKILL at random moments of all long work: nothing half-written, and what goes on ends as if never killed.

PRUNEKIT_KILLS says how many times: 9 by default, which takes half a minute; 200 take a quarter of an hour.
"""

import os
from collections import Counter
from pathlib import Path

import pytest
from kill_jobs import JOBS, Killer, prepare
from shared import ROOT

KILLS = int(os.environ.get("PRUNEKIT_KILLS", 9))


@pytest.mark.slow
def test_killed_at_any_moment_nothing_is_half_written_and_all_goes_on(tmp_path, monkeypatch):
    # The server that jobs are forked from imports prunekit and the jobs once.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(ROOT)]))
    (tmp_path / "base").mkdir()
    (tmp_path / "runs").mkdir()
    prepare(tmp_path / "base")
    killer = Killer(tmp_path / "base", tmp_path / "runs", seed=int(os.environ.get("PRUNEKIT_KILLS_SEED", 0)))
    killed: Counter[str] = Counter()
    while killed.total() < KILLS:
        least = min(JOBS, key=lambda name: killed[name])
        killed[least] += killer.kill(least, min(4 if KILLS > 18 else 1, KILLS - killed.total()))
        print(f"killed {killed.total()} times: {dict(killed)}", flush=True)
    assert 2 * len(JOBS) > KILLS or min(killed[name] for name in JOBS) >= KILLS // len(JOBS) - 2
