import json
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prunekit as pk
from prunekit import PrunekitError
from prunekit.search import Choice, HyperparameterSpace, KnobSpace, Range
from prunekit.search.space import distinct, key_of

SETTINGS = {
    "share": Range(0.0, 0.5),
    "depth": Choice((1, 2, 4)),
    "refit": Choice((False, True)),
    "by": Choice(("l1", "l2", "taylor")),
}


def build(model, point):
    return model


SPACE = HyperparameterSpace(SETTINGS, build)


def test_points_are_allowed_and_different_and_the_same_for_a_seed():
    points = SPACE.sample(60, np.random.default_rng(3))
    assert all(SPACE.check(point) == point for point in points)
    assert len({key_of(point) for point in points}) == 60
    assert points == SPACE.sample(60, np.random.default_rng(3)) != SPACE.sample(60, np.random.default_rng(4))
    assert {point["by"] for point in points} == {"l1", "l2", "taylor"}


def test_known_points_do_not_come_again():
    small = HyperparameterSpace({"a": Choice((1, 2, 3)), "b": Choice((False, True))}, build)
    first = small.sample(4, np.random.default_rng(0))
    rest = small.sample(2, np.random.default_rng(0), first)
    assert len({key_of(point) for point in first + rest}) == 6
    with pytest.raises(PrunekitError, match="0 different candidates were found of the 1 asked for"):
        small.sample(1, np.random.default_rng(0), first + rest)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_mutated_and_crossed_points_stay_inside(seed):
    rng = np.random.default_rng(seed)
    one, other = SPACE.sample(2, rng)
    moved, crossed = SPACE.mutated(one, rng), SPACE.crossed(one, other, rng)
    assert SPACE.check(moved) and SPACE.check(crossed)
    assert all(crossed[name] in (one[name], other[name]) for name in SETTINGS)


def test_mutations_reach_every_knob_and_the_ends_of_a_range():
    rng = np.random.default_rng(0)
    (start,) = SPACE.sample(1, rng)
    moved = [SPACE.mutated(start, rng) for _ in range(300)]
    assert {name for point in moved for name in SETTINGS if point[name] != start[name]} == set(SETTINGS)
    assert {0.0, 0.5} <= {point["share"] for point in moved}


def test_features_are_numbers_and_one_column_for_each_text():
    point = {"share": 0.25, "depth": 4, "refit": True, "by": "l2"}
    assert SPACE.feature_names() == ["share", "depth", "refit", "by=l1", "by=l2", "by=taylor"]
    assert SPACE.features([point]).tolist() == [[0.25, 4.0, 1.0, 0.0, 1.0, 0.0]]
    assert SPACE.features([]).shape == (0, 6)
    assert SPACE.spans().tolist() == [0.5, 3, 1, 1, 1, 1]


def test_the_old_name_of_a_space_still_works():
    assert pk.KnobSpace is KnobSpace is HyperparameterSpace
    assert KnobSpace({"a": Range(0.0, 1.0)}, print).fitted({"a": 2.0}) == {"a": 1.0}


def test_narrowed_leaves_the_space_as_it_was():
    less = SPACE.narrowed({"share": Range(0.1, 0.2), "by": Choice(("l1",))})
    points = less.sample(20, np.random.default_rng(0))
    assert all(0.1 <= point["share"] <= 0.2 and point["by"] == "l1" for point in points)
    assert SPACE.knobs == SETTINGS and all(SPACE.check(point) for point in points)


def test_points_are_plain_data():
    (point,) = SPACE.sample(1, np.random.default_rng(0))
    assert json.loads(json.dumps(point)) == point
    assert key_of({"a": 1.0, "b": True}) == key_of({"b": True, "a": 1.0000000001}) != key_of({"a": 1.0, "b": False})


def test_points_are_kept_in_one_form():
    given = {"share": 0, "depth": 2.0, "refit": True, "by": "l2"}
    (kept,) = [SPACE.check(given)]
    assert (
        isinstance(kept["share"], float)
        and isinstance(kept["depth"], int)
        and key_of(kept) == key_of(SPACE.check(kept))
    )


def test_a_space_is_told_from_others_by_what_it_is_of():
    assert HyperparameterSpace(SETTINGS, build, of="one").described() != SPACE.described()


def test_a_space_that_is_used_up_gives_what_there_is():
    small = HyperparameterSpace({"a": Choice((1, 2, 3))}, build)
    rng = np.random.default_rng(0)
    drawn = (small.propose(rng) for _ in range(10_000))
    assert len(distinct(drawn, 5, all_of_them=False)) == 3


def test_distinct_takes_the_first_and_passes_by_what_does_not_fit():
    made = iter([{"a": 1}, None, {"a": 1}, {"a": 2}, {"a": 3}])
    assert distinct(made, 2) == [{"a": 1}, {"a": 2}]
    with pytest.raises(PrunekitError, match="0 different candidates"):
        distinct(iter(lambda: None, 1), 1)
    assert distinct(islice(iter([{"a": 1}]), 1), 0) == []


@pytest.mark.parametrize(
    ("point", "says"),
    [
        ({"share": 0.1}, "no candidate of this space"),
        ("share", "no candidate of this space"),
        ({"share": 0.6, "depth": 1, "refit": True, "by": "l1"}, r"share=0.6 is not allowed.*Range"),
        ({"share": 0.1, "depth": True, "refit": True, "by": "l1"}, r"depth=True is not allowed"),
        ({"share": 0.1, "depth": 1, "refit": 1, "by": "l1"}, r"refit=1 is not allowed"),
        ({"share": float("nan"), "depth": 1, "refit": True, "by": "l1"}, r"share=nan"),
        ({"share": 0.1, "depth": 1, "refit": True, "by": "l9"}, r"by='l9'"),
    ],
)
def test_what_is_no_point_is_refused_by_name(point, says):
    with pytest.raises(PrunekitError, match=says):
        SPACE.check(point)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Range(1, 1), "empty"),
        (lambda: Range(0, float("nan")), "empty"),
        (lambda: Range("a", 2), "empty"),
        (lambda: Choice(()), "is not allowed; give a tuple"),
        (lambda: Choice((1, 1)), "is not allowed; give a tuple"),
        (lambda: Choice((None, 1)), "is not allowed; give a tuple"),
        (lambda: Choice("ab"), "is not allowed; give a tuple"),
        (lambda: HyperparameterSpace({}, build), "at least one hyperparameter"),
        (lambda: HyperparameterSpace({"a": 3}, build), "hyperparameter 'a' is 3"),
        (lambda: HyperparameterSpace(SETTINGS, None), "cannot be called"),
        (lambda: SPACE.narrowed({"nothing": Range(0, 1)}), "limits name 'nothing'"),
        (lambda: SPACE.narrowed({"share": Range(0, 1)}), "share cannot be limited to"),
        (lambda: SPACE.narrowed({"by": Choice(("l9",))}), "by cannot be limited to"),
    ],
)
def test_what_is_no_knob_is_refused(make, says):
    with pytest.raises(PrunekitError, match=says):
        make()
