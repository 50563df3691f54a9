"""Generated calls: every public function and every argument with wrong values, from a seed.

A call either ends with a `PrunekitError`, or the value makes sense there: `SENSE` says which do. Any other exception,
and any other value that is accepted, is a fault.
"""

import random
import shutil
import warnings

import lightgbm  # noqa: F401 - what it imports draws from Python's random numbers, once
import numpy as np
import pytest
import torch
from evaluation_helpers import llama
from fuzz_calls import Call, working_calls
from fuzz_values import NEVER, POOL, SENSE

import prunekit as pk
from prunekit import recipes
from prunekit.errors import PrunekitError

SEED = 0
PER_ARGUMENT, PER_WHOLE = 10, 3  # values that are drawn for each argument
LEAST, LEAST_WHOLE = 1000, 150  # cases in all
WHOLE = (
    "LHSPG",
    "accuracy_predictor",
    "hywia",
    "lorashear",
    "prune_progressively",
    "recover_on_mixture",
    "search_space",
    "sparsellm",
)


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    return working_calls(tmp_path_factory.mktemp("fuzz"))


def cases_of(calls, rng):
    """(function, argument, name of the value), each argument with some values of the pool."""
    for name, call in calls.items():
        for argument in [*call.good, *call.fresh]:
            for value in rng.sample(list(POOL), PER_WHOLE if name in WHOLE else PER_ARGUMENT):
                yield name, argument, value


def makes_sense(function, argument, value):
    sense = SENSE.get(f"{function}.{argument}", SENSE.get(argument, NEVER))
    try:
        return bool(sense(value))
    except (TypeError, ValueError, RuntimeError):  # an array has no truth
        return False


def fault_of(name, call, argument, value):
    """What is wrong with how a call takes a value; None for nothing."""
    given = {**call.arguments(), argument: value}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call.function(**given)
    except PrunekitError as error:
        return "its error says nothing" if len(str(error)) < 10 else None
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    return None if makes_sense(name, argument, value) else "accepted"


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
def test_every_generated_call_is_refused_by_name_or_makes_sense(whole, calls, tmp_path, monkeypatch):
    """Of whole searches, trainings and recipes apart, which take seconds a call."""
    monkeypatch.chdir(tmp_path)
    chosen = {name: call for name, call in calls.items() if (name in WHOLE) == whole}
    cases = list(cases_of(chosen, random.Random(SEED)))
    state = random.getstate(), np.random.get_state()[1].tolist()
    faults = {}
    for name, argument, value in cases:
        fault = fault_of(name, calls[name], argument, POOL[value]())
        faults |= {f"{name}({argument}={value})": fault} if fault is not None else {}
        for path in tmp_path.iterdir():  # what was written there would be found by a later case
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert len(cases) >= (LEAST_WHOLE if whole else LEAST)
    assert not faults, "\n".join(f"{case}: {fault}" for case, fault in faults.items())
    assert random.getstate() == state[0] and np.random.get_state()[1].tolist() == state[1]
    for one, other in zip(calls["discover"].good["model"].parameters(), llama().parameters(), strict=True):
        assert torch.equal(one, other) and one.requires_grad


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_call_works_and_every_public_function_is_among_them(whole, calls):
    functions = {name for name in pk.__all__ if name.islower()}
    assert functions | {*recipes.__all__} <= {*calls}
    for name, call in calls.items():
        if (name in WHOLE) == whole and name != "standard_text":
            call.function(**call.arguments())


def test_a_function_without_checks_would_be_caught():
    def unchecked(seed=0, n_samples=1):
        return seed / n_samples

    found = {
        fault_of("unchecked", Call(unchecked), argument, make())
        for argument in ("seed", "n_samples")
        for make in POOL.values()
    }
    assert "accepted" in found and any(str(fault).startswith("TypeError") for fault in found)
