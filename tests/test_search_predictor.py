"""The predictor, what it is worth, and how a search goes by it; on functions of which the best point is known."""

import json

import numpy as np
import pandas as pd
import pytest
from torch import nn

from prunekit import AccuracyPredictor, HyperparameterSpace, PrunekitError, search_space
from prunekit.search import (
    Choice,
    Metric,
    Pairs,
    Range,
    Trees,
    agreement,
    cross_validate,
    learning_curve,
    proposals,
    refined,
)
from prunekit.search.proposals import APART, evolve

MODEL = nn.Linear(2, 2)
FEW = Trees(n_models=3, n_trees=40)


def the_point(model, point):
    return point


def bowl(point, _tokenizer=None):
    """Least at a = .3, b = .8 and by = "good"; c does nothing."""
    return (point["a"] - 0.3) ** 2 + (point["b"] - 0.8) ** 2 + {"good": 0.0, "fair": 0.3, "bad": 1.0}[point["by"]]


SPACE = HyperparameterSpace(
    {"a": Range(0, 1), "b": Range(0, 1), "c": Range(0, 1), "by": Choice(("bad", "fair", "good"))}, the_point
)
BOWL = Metric("bowl", bowl)


def pairs_of(n=150, seed=0, space=SPACE):
    points = space.sample(n, np.random.default_rng(seed))
    rows = [{"number": i, "round": 0, **point, "bowl": bowl(point)} for i, point in enumerate(points)]
    return Pairs(space, pd.DataFrame(rows), "bowl")


PAIRS = pairs_of()


def fitted(trees=FEW):
    return AccuracyPredictor(SPACE, trees).fit(PAIRS.points, PAIRS.values)


def test_it_foretells_points_that_it_has_not_seen():
    others = pairs_of(100, seed=9)
    assert agreement(fitted().predict(others.points), others.values)["spearman"] > 0.9
    assert agreement(fitted(Trees(n_models=1)).predict(others.points), others.values)["spearman"] > 0.9


def test_the_same_seed_learns_the_same_and_another_does_not():
    points = PAIRS.points
    assert np.array_equal(fitted().predict(points), fitted().predict(points))
    assert not np.array_equal(fitted().predict(points), fitted(Trees(n_models=3, n_trees=40, seed=1)).predict(points))


def test_shap_values_share_out_what_is_expected():
    taught, points = fitted(), PAIRS.points
    shap, expected = taught.shap(points), taught.predict(points)
    assert list(shap) == SPACE.feature_names()
    rest = np.log(expected - taught._floor) - shap.sum(axis=1)
    assert np.allclose(rest, rest.iloc[0])  # the same for all: what is expected of a point at large
    assert shap["by=bad"].abs().mean() > 10 * shap["c"].abs().mean()


def test_nothing_is_expected_before_it_has_learned():
    with pytest.raises(PrunekitError, match="not fitted yet"):
        AccuracyPredictor(SPACE).predict(PAIRS.points)


@pytest.mark.parametrize(
    ("points", "values", "says"),
    [
        (PAIRS.points[:9], PAIRS.values[:9], "9 candidates and 9 values"),
        (PAIRS.points[:20], PAIRS.values[:19], "20 candidates and 19 values"),
        (PAIRS.points[:20], [*PAIRS.values[:19], np.inf], "1 of them not finite"),
    ],
)
def test_too_few_or_bad_pairs_are_refused(points, values, says):
    with pytest.raises(PrunekitError, match=says):
        AccuracyPredictor(SPACE).fit(points, values)


@pytest.mark.parametrize("options", [{"n_models": 0}, {"n_leaves": 1}, {"learning_rate": 0}, {"seed": -1}])
def test_bad_trees_are_refused_by_name(options):
    with pytest.raises(PrunekitError, match=next(iter(options))):
        Trees(**options)


def test_agreement_is_what_is_worked_out_by_hand():
    found = agreement([1.0, 2.0, 3.0, 4.0], [10.0, 30.0, 20.0, 0.0], top=2)
    assert found["n"] == 4 and found["regret"] == 10  # the best of the first two is 10, of all 0
    assert found["spearman"] == pytest.approx(-0.4) and found["kendall"] == pytest.approx(-1 / 3)
    assert found["rmse"] == pytest.approx(np.sqrt((81 + 784 + 289 + 16) / 4))
    perfect = agreement(PAIRS.values, PAIRS.values)
    assert perfect["spearman"] == pytest.approx(1) == perfect["kendall"] and perfect["rmse"] == perfect["regret"] == 0
    with pytest.raises(PrunekitError, match="cannot be compared"):
        agreement([1.0], [2.0])
    with pytest.raises(PrunekitError, match="cannot be compared"):
        agreement([1.0, 2.0], [2.0])


def test_cross_validation_foretells_each_pair_by_the_others():
    found = cross_validate(PAIRS, n_folds=5, trees=FEW)
    assert len(found) == len(PAIRS) and sorted(found["fold"].value_counts()) == [30] * 5
    one = found["fold"] == 2
    kept = [point for point, out in zip(PAIRS.points, one, strict=True) if not out]
    taught = AccuracyPredictor(SPACE, FEW).fit(kept, PAIRS.values[~one])
    out = [point for point, out in zip(PAIRS.points, one, strict=True) if out]
    assert np.allclose(found["expected"][one], taught.predict(out))
    assert agreement(found["expected"], found["measured"])["spearman"] > 0.85


def test_chance_is_told_from_learning():
    table = PAIRS.table.assign(bowl=np.random.default_rng(0).permutation(PAIRS.table["bowl"].to_numpy()))
    found = cross_validate(Pairs(SPACE, table, "bowl"), trees=FEW)
    assert abs(agreement(found["expected"], found["measured"])["spearman"]) < 0.3


def test_more_pairs_teach_more():
    curve = learning_curve(PAIRS, [15, 110], n_repeats=4, trees=FEW).groupby("n_pairs").mean()
    assert curve.loc[110, "spearman"] > curve.loc[15, "spearman"] and curve.loc[110, "rmse"] < curve.loc[15, "rmse"]


def test_too_few_pairs_are_refused():
    few = pairs_of(12)
    with pytest.raises(PrunekitError, match="12 samples leave 9"):
        cross_validate(few)
    for sizes in ([], [5], [130], [20.0]):
        with pytest.raises(PrunekitError, match="numbers from 10 to 120"):
            learning_curve(PAIRS, sizes)


def test_refinement_leaves_out_what_does_harm_and_no_more_than_that():
    smaller, cuts = refined(SPACE, fitted(), PAIRS, 3)
    assert cuts[0].knob == "by" and cuts[0].left == Choice(("fair", "good"))
    assert {cut.knob for cut in cuts} <= {"by", "a", "b"} and len({cut.knob for cut in cuts}) == len(cuts)
    assert [cut.harm for cut in cuts] == sorted((cut.harm for cut in cuts), reverse=True)
    assert smaller.knobs["a"].holds(0.3) and smaller.knobs["b"].holds(0.8) and smaller.knobs["by"].holds("good")
    assert refined(SPACE, fitted(), PAIRS, 0) == (SPACE, [])


def test_refinement_goes_on_where_it_was_and_keeps_the_best():
    space, knobs = SPACE, []
    for _ in range(6):
        space, cuts = refined(space, fitted(), PAIRS, 2)
        knobs += [cut.knob for cut in cuts]
    assert space.knobs["by"] == Choice(("good",))
    assert space.knobs["a"].holds(0.3) and space.knobs["b"].holds(0.8)


def test_evolution_finds_better_points_than_drawing_and_none_that_are_known_or_alike():
    rng, taught = np.random.default_rng(0), fitted()
    found = evolve(SPACE, taught, PAIRS.points[:5], rng, n=15, known=PAIRS.points)
    drawn = SPACE.sample(15, rng)
    assert len(found) == 15 and np.mean([*map(bowl, found)]) < 0.5 * np.mean([*map(bowl, drawn)])
    features = SPACE.features(found)
    apart = [np.abs(features[i] - features[j]).max() for i in range(15) for j in range(i)]
    assert min(apart) > APART
    assert not any(point in PAIRS.points for point in found)


def test_evolution_stays_in_a_narrowed_space_and_ends_with_a_small_one():
    narrow = SPACE.narrowed({"by": Choice(("fair",)), "a": Range(0.5, 0.9)})
    found = evolve(narrow, fitted(), PAIRS.points[:20], np.random.default_rng(0), n=10)
    assert len(found) == 10 and all(narrow.check(point) for point in found)
    small = HyperparameterSpace({"a": Choice((0.1, 0.5, 0.9)), "by": Choice(("bad", "fair", "good"))}, the_point)
    points = [{"a": a, "by": by} for a in (0.1, 0.5, 0.9) for by in ("bad", "fair", "good")]
    taught = AccuracyPredictor(small, FEW).fit(points * 2, [bowl({**point, "b": 0.8}) for point in points] * 2)
    found = evolve(small, taught, points[:2], np.random.default_rng(0), n=10, known=points[:3])
    assert len(found) == 6 and not any(point in points[:3] for point in found)


class Priced(HyperparameterSpace):
    """What a point may cost is anywhere in a range, and the dearer the better."""

    @property
    def goals(self):
        return ["a"]


def test_a_budget_that_is_a_range_is_searched_at_every_level():
    space = Priced({"a": Range(0, 1), "b": Range(0, 1), "c": Range(0, 1)}, the_point)
    points = space.sample(120, np.random.default_rng(0))
    taught = AccuracyPredictor(space, FEW).fit(points, [-3 * p["a"] + (p["b"] - 0.8) ** 2 for p in points])
    found = evolve(space, taught, points, np.random.default_rng(1), n=20)
    assert {int(5 * min(point["a"], 0.999)) for point in found} == {0, 1, 2, 3, 4}
    pairs = Pairs(space, pd.DataFrame([{"number": 0, "round": 0, **p, "bowl": -3 * p["a"]} for p in points]), "bowl")
    assert all(cut.knob != "a" for cut in refined(space, taught, pairs, 5)[1])


@pytest.mark.slow
def test_a_search_beats_as_many_draws():
    wide = HyperparameterSpace({f"x{i}": Range(0, 1) for i in range(8)}, the_point)
    metric = Metric("bowl", lambda point, tokenizer: sum((value - 0.3) ** 2 for value in point.values()))
    options = {"n_pairs": 30, "n_rounds": 2, "top_k": 10, "trees": FEW}
    found = search_space(wide, MODEL, None, metric=metric, **options)
    assert found.pairs.table["round"].value_counts().to_dict() == {0: 30, 1: 10, 2: 10}
    drawn = [metric.measure(point, None) for point in wide.sample(50, np.random.default_rng(0))]
    assert metric.measure(found.best, None) < min(drawn)
    assert found.pairs.table.query("round == 2")["bowl"].mean() < np.quantile(drawn, 0.1)


@pytest.fixture
def short(monkeypatch):
    """Where it does not matter how good the proposals are."""
    monkeypatch.setattr(proposals, "GENERATIONS", 4)
    monkeypatch.setattr(proposals, "POPULATION", 60)


def test_a_search_says_what_each_round_was_worth():
    found = search_space(SPACE, MODEL, None, metric=BOWL, n_pairs=30, n_rounds=2, top_k=10, trees=FEW)
    rounds = found.rounds
    assert rounds["round"].tolist() == [1, 2] and rounds["n_pairs"].tolist() == [40, 50]
    assert rounds["best"].is_monotonic_decreasing and rounds["best"].iloc[-1] == bowl(found.best)
    assert rounds["measured"].iloc[0] == pytest.approx(found.pairs.table.query("round == 1")["bowl"].mean())
    assert "by" in rounds["left_out"].iloc[0] and "by" in {cut.knob for cut in found.cuts}
    assert "rounds: 2" in repr(found) and "<table" in found._repr_html_()


def test_a_search_goes_on_where_it_was(tmp_path, short):
    options = {"metric": BOWL, "n_pairs": 20, "top_k": 5, "trees": FEW}
    whole = search_space(SPACE, MODEL, None, n_rounds=2, **options)
    calls = []

    def counted(point, tokenizer):
        calls.append(point)
        return bowl(point)

    counting = {**options, "metric": Metric("bowl", counted), "folder": tmp_path}
    first = search_space(SPACE, MODEL, None, n_rounds=1, **counting)
    assert len(calls) == 25
    again = search_space(SPACE, MODEL, None, n_rounds=2, **counting)
    assert len(calls) == 30 and again.rounds.equals(whole.rounds)
    one, other, part = (found.pairs.table.drop(columns="seconds") for found in (whole, again, first))
    assert one.equals(other) and part.equals(one.head(25))


def test_a_round_that_was_half_added_gets_the_points_that_are_missing(tmp_path, short):
    options = {"metric": BOWL, "n_pairs": 20, "n_rounds": 1, "top_k": 6, "trees": FEW, "folder": tmp_path}
    whole = search_space(SPACE, MODEL, None, **options).pairs.points
    journal = tmp_path / "journal.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    added = [n for n, line in enumerate(lines) if json.loads(line)["op_code"] == 4]  # Optuna's "create a trial"
    journal.write_bytes(b"".join(lines[: added[22]]))  # killed when two of the six stood there
    assert search_space(SPACE, MODEL, None, **options).pairs.points == whole


def test_more_is_better_where_the_metric_says_so():
    metric = Metric("height", lambda point, tokenizer: -bowl(point), maximize=True)
    found = search_space(SPACE, MODEL, None, metric=metric, n_pairs=30, n_rounds=2, top_k=10, trees=FEW)
    assert bowl(found.best) == -found.pairs.table["height"].max() < 0.1


def test_points_to_start_with_are_measured_first(short):
    start = [{"a": 0.3, "b": 0.8, "c": 0.5, "by": "good"}]
    found = search_space(SPACE, MODEL, None, metric=BOWL, n_pairs=12, n_rounds=1, top_k=3, trees=FEW, start=start)
    assert found.pairs.points[0] == start[0] == found.best and len(found.pairs) == 15
    with pytest.raises(PrunekitError, match="no candidate of this space"):
        search_space(SPACE, MODEL, None, metric=BOWL, n_pairs=12, start=[{"a": 1}])


@pytest.mark.parametrize("options", [{"n_pairs": 9}, {"n_rounds": 0}, {"top_k": 0}, {"n_cuts": -1}])
def test_numbers_that_cannot_be_are_refused_by_name(options):
    with pytest.raises(PrunekitError, match=next(iter(options))):
        search_space(SPACE, MODEL, None, metric=BOWL, **options)
