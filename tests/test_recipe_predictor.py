"""The recipe of the accuracy predictor on the embedded world, and the same search over other recipes' knobs."""

import pytest
import torch

import prunekit as pk
from prunekit import PrunekitError
from prunekit.recipes import accuracy_predictor
from prunekit.search import Choice, HyperparameterSpace, Range, Trees, cross_validate, known_points, parameter_table
from prunekit.world import documents

TEXT = "\n".join(documents(8, split="validation", seed=5))
FEW = {"n_pairs": 10, "n_rounds": 1, "top_k": 2, "trees": Trees(n_models=2, n_trees=20)}


@pytest.fixture(scope="module")
def world():
    return pk.load("world")


@pytest.fixture(scope="module")
def calib(world):
    return pk.calibration_set("world", world[1], n_samples=4, seq_len=64, seed=0)


@pytest.mark.slow
def test_the_recipe_is_its_steps_and_goes_on_where_it_was(world, calib, tmp_path):
    model, tokenizer = world
    before = {name: p.clone() for name, p in model.named_parameters()}
    done, again = (accuracy_predictor(model, tokenizer, calib, 0.3, TEXT, folder=tmp_path, **FEW) for _ in range(2))
    assert again.found.pairs.table.equals(done.found.pairs.table) and again.plan == done.plan
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert 0.3 <= done.plan.pruning_ratio <= 0.305
    assert sum(p.numel() for p in done.model.parameters()) == done.plan.n_parameters_kept
    assert set(done.space.importances) == {"Taylor element first", "Taylor vector first", "L2"}
    assert done.found.pairs.points[:6] == known_points(done.space) and len(done.found.pairs) == 12
    best = done.found.pairs.table["perplexity"].min()
    assert pk.perplexity(done.model, tokenizer, TEXT) == pytest.approx(best, rel=1e-5)
    assert len(repr(done)) < 500 and "PruningPlan" in repr(done)


@pytest.mark.slow
def test_the_recipe_takes_budgets_whole_layers_and_data_to_recover_with(world, calib):
    model, tokenizer = world
    budget = parameter_table(pk.discover(model)).at_most(2_400_000)
    lora = pk.LoRA(r=2, max_steps=2, batch_size=2)
    done = accuracy_predictor(
        model, tokenizer, calib, [budget], TEXT,
        importances=["l2", pk.Magnitude(p=1)], whole_layers=2, start_known=False, data=calib, recovery=lora, **FEW,
    )  # fmt: skip
    assert done.plan.n_parameters_kept <= 2_400_000
    assert sum(p.numel() for p in done.model.parameters()) == done.plan.n_parameters_kept
    assert {f"layer.{number}" for number in range(8)} <= set(done.space.knobs)
    best = done.found.pairs.table["perplexity"].min()
    assert pk.perplexity(done.model, tokenizer, TEXT) != pytest.approx(best, rel=1e-5)  # it was trained


def test_the_recipe_refuses_what_cannot_be(world, calib):
    model, tokenizer = world
    with pytest.raises(PrunekitError, match="cannot be met: pruning reaches 456,000 at best"):
        accuracy_predictor(model, tokenizer, calib, 0.9, TEXT)
    with pytest.raises(PrunekitError, match="importance 'magic' is unknown"):
        accuracy_predictor(model, tokenizer, calib, 0.3, TEXT, importances=["magic"])


@pytest.mark.slow
def test_compensation_and_fusion_are_knobs_like_any_other(world, calib):
    """HyWIA's weight of the coarse scores, and whether what reads the pruned units is re-fitted."""
    model, tokenizer = world
    enough = pk.calibration_set("world", tokenizer, n_samples=16, seq_len=128, seed=0)
    groups = pk.discover(model)
    units = groups.of_kind("kv_head", "ffn_channel")
    coarse, fine = (pk.score(model, units, pk.Taylor(granularity), calib) for granularity in ("vector", "element"))

    def build(model, point):
        weight = point["coarse"]
        plan = pk.plan(groups, pk.fuse(coarse, fine, (weight, 1 - weight)), 0.4)
        return pk.prune(model, plan, compensate=enough if point["refit"] else None)

    space = HyperparameterSpace({"coarse": Range(0.0, 1.0), "refit": Choice((False, True))}, build)
    pairs = pk.measure_pairs(space, model, tokenizer, 10, text=TEXT)
    table = pairs.table.groupby("refit")["perplexity"]
    assert table.max()[True] < table.min()[False]  # what the knob is worth, whatever the weights
    assert pairs.best()["refit"] is True
    shap = pk.AccuracyPredictor(space, FEW["trees"]).fit(pairs.points, pairs.values).shap(pairs.points)
    assert shap["refit"].abs().mean() > shap["coarse"].abs().mean()


@pytest.mark.slow
def test_sparsity_of_each_layer_is_a_knob_too(world):
    """Zeros instead of smaller shapes, half of all weights on average."""
    model, tokenizer = world

    def build(model, point):
        shares = [point[f"layer.{number}"] for number in range(8)]
        scale, sparse = 0.5 * 8 / sum(shares), model
        for number, share in enumerate(shares):
            part = min(scale * share, 0.95)
            sparse = pk.sparsify(sparse, None, "magnitude", part, layers=[number], inplace=sparse is not model)
        return sparse

    space = HyperparameterSpace({f"layer.{number}": Range(0.2, 1.0) for number in range(8)}, build)
    pairs = pk.measure_pairs(space, model, tokenizer, 12, text=TEXT)
    assert len(pairs) == 12 and pairs.table["perplexity"].nunique() == 12
    assert len(cross_validate(pairs, n_folds=6, trees=FEW["trees"])) == 12
