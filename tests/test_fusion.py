"""Fusion of coarse and fine importance: the rules worked out by hand, the pure scores given back, what is refused."""

import math

import pytest
import torch
from families import FAMILIES, tokens
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from prunekit import HyWIA, PrunekitError, Taylor, discover, fuse, score
from prunekit.importance import IMPORTANCES, FusedScores, Scores
from prunekit.importance.fusion import attention_weights, uncertainty_weights


@pytest.fixture(scope="module")
def scored():
    """A model, its groups, and its coarse and fine scores."""
    model = FAMILIES["llama_gqa"].model()
    groups = discover(model)
    chosen = groups.of_kind("kv_head", "ffn_channel")
    coarse, fine = (score(model, chosen, Taylor(granularity), tokens()) for granularity in ("vector", "element"))
    return model, chosen, coarse, fine


def test_attention_worked_out_by_hand():
    a, b = attention_weights(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]))
    # T = [[.5, 1.5], [1, 1]], T·Tᵀ / 2 = [[1.25, 1], [1, 1]]: rows attend (.562, .438) and (.5, .5)
    first = math.exp(1.25) / (math.exp(1.25) + math.exp(1))
    assert (a, b) == pytest.approx(((first + 0.5) / 2, (1.5 - first) / 2))


def test_uncertainty_worked_out_by_hand():
    assert uncertainty_weights(torch.tensor([1.0, 3.0]), torch.tensor([6.0])) == pytest.approx((0.75, 0.25))


NUMBERS = arrays("float64", 5, elements=st.floats(0, 1e6, width=32))


@given(coarse=NUMBERS, fine=NUMBERS, scale=st.floats(1e-3, 1e3))
def test_weights_are_shares_and_attention_knows_no_units(coarse, fine, scale):
    coarse, fine = torch.from_numpy(coarse), torch.from_numpy(fine)
    for rule in (attention_weights, uncertainty_weights):
        weights = rule(coarse, fine)
        assert sum(weights) == pytest.approx(1) and min(weights) >= 0
    if coarse.mean() > 1e-6:
        assert attention_weights(coarse * scale, fine) == pytest.approx(attention_weights(coarse, fine))


@pytest.mark.parametrize(("pair", "pure"), [((1, 0), 0), ((0, 1), 1)])
def test_a_pure_blend_gives_the_pure_scores_to_the_bit(scored, pair, pure):
    model, chosen, *both = scored
    for found in (fuse(*both, pair), score(model, chosen, HyWIA(rule=pair), tokens())):
        assert all(torch.equal(found[name], both[pure][name]) for name in both[pure])


@pytest.mark.parametrize("rule", ["attention", "uncertainty", (0.3, 0.7), lambda c, f: (float(c.amax()), 1.0)])
def test_the_weights_chosen_make_the_scores(scored, rule):
    model, chosen, coarse, fine = scored
    found = score(model, chosen, HyWIA(rule=rule), tokens())
    assert isinstance(found, FusedScores) and set(found.weights) == {group.name for group in chosen}
    for name, (a, b) in found.weights.items():
        torch.testing.assert_close(found[name], a * coarse[name] + b * fine[name])
    table = found.weight_table()
    assert list(table.columns) == ["group", "kind", "layer", "coarse", "fine"] and len(table) == len(chosen)
    assert sorted(table["layer"].unique()) == [0, 1]


def test_the_command_line_knows_it():
    assert IMPORTANCES["hywia"]().label == "HyWIA attention"


def test_bad_rules_and_different_groups_are_refused(scored):
    _, chosen, coarse, fine = scored
    with pytest.raises(PrunekitError, match=r"rule='magic' is unknown; allowed: 'attention', 'uncertainty'"):
        HyWIA(rule="magic")
    for pair in ((0, 0), (-1, 2), (1,), ("a", "b"), (float("nan"), 1), None):
        with pytest.raises(
            PrunekitError,
            match=r"give two weights, not negative and not both 0|2 values|is not allowed; give a finite number",
        ):
            fuse(coarse, fine, pair)
    some = Scores({chosen[0].name: coarse[chosen[0].name]}, label="one", kinds=coarse.kinds)
    with pytest.raises(PrunekitError, match="of other groups"):
        fuse(some, fine)
    with pytest.raises(PrunekitError, match="order='third' is unknown"):
        HyWIA(order="third")


def test_scores_that_say_more_are_plain_numbers_too(scored):
    """Whatever an importance returns, what `score` returns hangs on no graph."""
    model, chosen, coarse, _ = scored

    class Attached(HyWIA):
        def unit_scores(self, model, groups, calib):
            fused = super().unit_scores(model, groups, calib)
            fused.update({name: value.clone().requires_grad_() for name, value in fused.items()})
            return fused

    found = score(model, chosen, Attached(), tokens())
    assert isinstance(found, FusedScores) and list(found) == list(coarse)
    assert not any(value.requires_grad for value in found.values())
