"""Costs that are looked up: multiply-accumulates to the last one, and time as far as it can be without a clock."""

import numpy as np
import pytest
import torch
from families import FAMILIES

import prunekit.search.cost_tables as tables
from prunekit import PlanSpace, PrunekitError, prune
from prunekit.evaluation.footprint import count_macs
from prunekit.search import check_table, latency_table, mac_table, parameter_table


def random_scores(groups):
    generator = torch.Generator().manual_seed(0)
    return {group.name: torch.rand(group.n_units, generator=generator) for group in groups}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama_gqa", "gpt2"])
def test_multiply_accumulates_are_those_of_the_cut_model(name):
    family = FAMILIES[name]
    model, groups = family.model(), family.groups()
    table = mac_table(model, groups, seq_len=16)
    space = PlanSpace(groups, {"random": random_scores(groups)}, [table.at_most(0.85 * table.total)])
    assert table.total == count_macs(model, torch.ones(1, 16, dtype=torch.long))
    for point in space.sample(4, np.random.default_rng(0)):
        small = prune(model, space.plan(point))
        assert count_macs(small, torch.ones(1, 16, dtype=torch.long)) == space.costs(point)["macs"]
        assert space.costs(point)["macs"] <= 0.85 * table.total
    checked = check_table(table, model, space, n=3)
    assert (checked["error"] == 0).all() and list(checked) == ["expected", "measured", "error"]


def test_whole_layers_are_in_the_table_where_asked_for():
    family = FAMILIES["llama_gqa"]
    model, groups = family.model(), family.groups()
    table = mac_table(model, groups, kinds=("kv_head", "ffn_channel", "layer"), seq_len=16)
    space = PlanSpace(groups, {"random": random_scores(groups)}, [table.at_most(0.7 * table.total)], whole_layers=1)
    points = space.sample(20, np.random.default_rng(0))
    gone = next(point for point in points if point["layer.0"] or point["layer.1"])
    small = prune(model, space.plan(gone))
    assert len(small.model.layers) == 1
    assert count_macs(small, torch.ones(1, 16, dtype=torch.long)) == space.costs(gone)["macs"]


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_times_are_measured_by_turns_and_shared_out_among_equal_groups(monkeypatch, phase):
    family = FAMILIES["llama_gqa"]
    model, groups = family.model(), family.groups()
    sizes = []

    def milliseconds(measured, **options):
        sizes.append(sum(p.numel() for p in measured.parameters()))
        return sizes[-1] / 1000

    monkeypatch.setattr(tables, "_milliseconds", milliseconds)
    table = latency_table(model, groups, phase=phase)
    counted = parameter_table(groups)
    assert table.name == f"{phase}_ms" and table.total == pytest.approx(groups.n_parameters / 1000)
    for name, saved in table.saved.items():
        assert np.allclose(saved, counted.saved[name] / 1000)
    assert set(sizes[::2]) == {groups.n_parameters}  # the dense model between all others


def test_more_units_never_save_less(monkeypatch):
    noise = np.random.default_rng(0)
    monkeypatch.setattr(tables, "_milliseconds", lambda model, **options: 10 + noise.normal())
    family = FAMILIES["llama_gqa"]
    table = latency_table(family.model(), family.groups())
    for saved in table.saved.values():
        assert saved[0] == 0 and (np.diff(saved) >= 0).all()


@pytest.mark.slow
def test_time_is_really_taken_and_checked_end_to_end():
    family = FAMILIES["llama_gqa"]
    model, groups = family.model(), family.groups()
    table = latency_table(model, groups, seq_len=8, repeats=2)
    budgets = [table.at_most(2 * table.total), parameter_table(groups).at_most(0.9 * groups.n_parameters)]
    space = PlanSpace(groups, {"random": random_scores(groups)}, budgets)
    checked = check_table(table, model, space, n=2)
    assert table.total > 0 and (checked["measured"] > 0).all()
    assert np.allclose(checked["error"], checked["expected"] / checked["measured"] - 1)
    assert "decode_ms" in repr(table)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda model, groups: latency_table(model, groups, phase="both"), "both"),
        (lambda model, groups: latency_table(model, groups, repeats=0), "repeats=0"),
        (lambda model, groups: mac_table(model, groups, seq_len=0), "seq_len=0"),
        (lambda model, groups: mac_table(model, groups, kinds=("rank",)), "no exact group of rank"),
    ],
)
def test_what_cannot_be_measured_is_refused(make, says):
    family = FAMILIES["llama_gqa"]
    with pytest.raises(PrunekitError, match=says):
        make(family.model(), family.groups())


def test_a_table_is_checked_in_a_space_that_has_it():
    family = FAMILIES["llama_gqa"]
    model, groups = family.model(), family.groups()
    space = PlanSpace(groups, {"random": random_scores(groups)}, 0.1)
    with pytest.raises(PrunekitError, match="counted, not measured"):
        check_table(parameter_table(groups), model, space)
    with pytest.raises(PrunekitError, match="no budget of macs"):
        check_table(mac_table(model, groups, seq_len=8), model, space)
    with pytest.raises(PrunekitError, match=r"has no 'model.layers.0:layer'"):
        PlanSpace(
            groups, {"r": random_scores(groups)}, [mac_table(model, groups, seq_len=8).at_most(1)], whole_layers=1
        )
