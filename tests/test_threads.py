"""Threads: models of their own run side by side, one model is for one thread at a time, the process stays as it was."""

import random
import threading
from functools import partial

import numpy as np
import pytest
import torch
from test_importance import tiny_llama
from test_recovery import QUICK, counting
from torch import nn

import prunekit as pk
from prunekit.checks import PROCESS, alone
from prunekit.models import empty_model
from prunekit.recovery.training import seeded

CALIB = counting(8)


def in_threads(*works):
    """Run functions side by side; what they return, or the exception."""
    found = [None] * len(works)

    def run(number):
        try:
            found[number] = works[number]()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def pruned(seed):
    torch.manual_seed(seed)
    model = tiny_llama(n_heads=4, n_kv=2)
    groups = pk.discover(model)
    plan = pk.plan(groups, pk.score(model, groups, pk.Taylor(), CALIB), 0.2)
    return pk.prune(model, plan, compensate=CALIB), model, plan


def test_models_of_their_own_are_pruned_side_by_side():
    """Before, hooks on every module of the process met those of other threads."""
    for found in in_threads(*[lambda: pruned(0)] * 4):
        assert not isinstance(found, Exception), found
        small, dense, plan = found
        assert sum(p.numel() for p in small.parameters()) == plan.n_parameters_kept


def test_one_model_in_two_threads_stays_as_it_was():
    model = tiny_llama()
    before = [(p.detach().clone(), p.requires_grad) for p in model.parameters()]
    many = [lambda: [pk.score(model, pk.discover(model), pk.Taylor(), CALIB) for _ in range(3)]] * 2
    one, other = in_threads(*many)
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    for p, (value, flag) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, value) and p.requires_grad == flag


def test_a_second_thread_waits_for_the_first_and_only_on_the_same_model():
    one, other, order = nn.Linear(1, 1), nn.Linear(1, 1), []
    inside, done = threading.Event(), threading.Event()

    def first():
        with alone([one]):
            inside.set()
            done.wait(10)
            order.append("first")

    def second():
        inside.wait(10)
        with alone([other]):
            order.append("another model")
        done.set()
        with alone([one, other]):
            order.append("second")

    in_threads(first, second)
    assert order == ["another model", "first", "second"]


@pytest.mark.slow
def test_two_recoveries_give_what_each_gives_alone_and_leave_the_random_state():
    expected = pk.recover(tiny_llama(), QUICK, counting())
    models = [tiny_llama() for _ in range(2)]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state()
    for found in in_threads(*[partial(pk.recover, model, QUICK, counting()) for model in models]):
        for a, b in zip(found.parameters(), expected.parameters(), strict=True):
            assert torch.equal(a, b)
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.random.get_rng_state(), states[2])


def test_a_seed_that_torch_refuses_leaves_the_random_state():
    state = random.getstate()
    try:
        with seeded(2**40):  # NumPy takes less
            raise AssertionError
    except ValueError:
        assert random.getstate() == state


def test_another_threads_modules_have_weights_while_a_model_is_built_without_them():
    """accelerate puts the parameters of every thread on the meta device."""
    config, building, built = tiny_llama().config, threading.Event(), threading.Event()
    plain = nn.Linear.__init__

    def slow(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        if threading.current_thread() is not threading.main_thread() and not building.is_set():
            building.set()
            built.wait(10)

    def other():
        building.wait(10)
        layer = nn.Embedding(2, 2)
        built.set()
        return layer.weight.is_meta

    nn.Linear.__init__ = slow
    try:
        empty, meta = in_threads(lambda: empty_model(config), other)
    finally:
        nn.Linear.__init__ = plain
    assert all(p.is_meta for p in empty.parameters()) and meta is False


def test_the_lock_of_the_process_may_be_taken_again():
    with PROCESS, PROCESS:
        pass
