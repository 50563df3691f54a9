"""The recipes: each mode of LLM-Pruner against plans made by hand, HyWIA's pure blends, plain checkpoints, refusals."""

import json
import math
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from families import FAMILIES, logits
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import prunekit as pk
from prunekit import PrunekitError
from prunekit.recipes import hywia, llm_pruner, lorashear, sparsellm
from prunekit.recipes.llm_pruner import middle_layers
from prunekit.recovery.sources import join, open_sources, shuffle

CALIB = torch.randint(0, 96, (8, 16), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def model():
    """Six layers, so that some are spared."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=6, hidden_size=64, intermediate_size=96, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=96, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_the_paper_cuts_layers_4_to_29_of_32():
    assert list(middle_layers(32)) == list(range(4, 30))
    assert [list(middle_layers(n)) for n in (1, 2, 3)] == [[0], [0, 1], [1]]


def test_block_mode_takes_a_share_of_the_middle_layers(model):
    small, plan = llm_pruner(model, CALIB, 0.25)
    groups = pk.discover(model)
    scores = pk.score(model, groups.of_kind("kv_head", "ffn_channel"), pk.Taylor(), CALIB)
    expected = pk.plan(groups, scores, 0.25, of="units", protect_layers=[0, 5])
    assert plan.keep == expected.keep and torch.equal(logits_of(small), logits_of(pk.prune(model, expected)))
    assert {len(units) for name, units in plan.keep.items() if name.endswith("kv_head")} == {3}
    everything = llm_pruner(model, CALIB, 0.25, layers=range(6)).plan
    assert len(everything.keep) == 12 and len(plan.keep) == 8


@pytest.mark.slow
def test_global_ranking_takes_heads_and_channels_of_the_same_share(model):
    """The reference compares sums over heads with single channels, and removes no head at all."""
    small, plan = llm_pruner(model, CALIB, 0.4, ranking="global", layers=range(6))
    inside = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    gone = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
    assert gone / inside == pytest.approx(0.4, abs=0.01)
    heads = {name: len(units) for name, units in plan.keep.items() if name.endswith("kv_head")}
    assert min(heads.values()) < 4 and len(set(heads.values())) > 1
    scaled = llm_pruner(model, CALIB, 0.4, ranking="global", layers=range(6), normalize="loss").plan
    assert scaled.keep != plan.keep and "scaled to the loss" in scaled.notes["importance"]


@pytest.mark.slow
def test_channel_mode_shrinks_the_residual_stream_to_a_plain_checkpoint(model, tmp_path):
    """With the mixed order, with which the reference fails."""
    small, plan = llm_pruner(model, CALIB, 0.25, mode="channel", importance=pk.Taylor(order="mixed"))
    assert list(plan.keep) == [group.name for group in pk.discover(model).of_kind("hidden")]
    assert small.lm_head.in_features == small.model.norm.weight.shape[0] == 48
    assert small.model.embed_tokens.embedding_dim == 48
    pk.save(small, tmp_path / "small", plan=plan)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert (config["model_type"], config["hidden_size"]) == ("llama", 48)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(logits_of(plain), logits_of(small))


@pytest.mark.slow
def test_modern_settings_are_the_default_of_the_package(model):
    small, plan = llm_pruner(model, CALIB, 0.25, modern=True)
    groups = pk.discover(model)
    units = groups.of_kind("kv_head", "ffn_channel")
    share = sum(math.prod(groups.shapes[name]) for name in {m.parameter for g in units for m in g.members})
    expected = pk.plan(groups, pk.score(model, units, pk.Curvature(), CALIB), 0.25 * share / groups.n_parameters)
    assert plan.keep == expected.keep
    assert torch.equal(logits(small), logits(pk.prune(model, expected, compensate=CALIB)))
    with pytest.raises(PrunekitError, match="leave mode, importance, layers"):
        llm_pruner(model, CALIB, 0.25, modern=True, ranking="global")


def test_layer_mode_keeps_the_first_layers(model, tmp_path):
    small, plan = llm_pruner(model, None, 0.5, mode="layer")
    assert len(small.model.layers) == 3 == small.config.num_hidden_layers
    for kept, was in zip(small.model.layers, model.model.layers, strict=False):
        assert torch.equal(kept.mlp.up_proj.weight, was.mlp.up_proj.weight)
    assert plan.n_parameters_kept == sum(p.numel() for p in small.parameters())
    pk.save(small, tmp_path / "small", plan=plan)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "small")), logits_of(small))
    assert len(llm_pruner(model, None, 0.99, mode="layer").model.model.layers) == 1


@pytest.mark.slow
def test_steps_refresh_scores_and_take_as_much(model):
    once, thrice = (llm_pruner(model, CALIB, 0.5, n_steps=n).plan for n in (1, 3))
    assert once.n_parameters_kept == thrice.n_parameters_kept and once.keep != thrice.keep


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [llm_pruner, hywia])
def test_recovery_follows_where_there_is_data(recipe, model):
    before = [p.clone() for p in model.parameters()]
    untuned = recipe(model, CALIB, 0.25)
    tuned = recipe(model, CALIB, 0.25, data=CALIB, recovery=pk.LoRA(r=2, max_steps=3, batch_size=2))
    assert tuned.plan.keep == untuned.plan.keep and len(tuned.model.recovery_log.losses) == 3
    assert not torch.equal(logits_of(tuned.model), logits_of(untuned.model))
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "granularity"), [((1, 0), "vector"), ((0, 1), "element")])
def test_hywia_with_one_estimate_is_llm_pruner(rule, granularity, model):
    fused = hywia(model, CALIB, 0.25, rule=rule)
    assert fused.plan.keep == llm_pruner(model, CALIB, 0.25, importance=pk.Taylor(granularity)).plan.keep
    assert set(fused.scores.weight_table()["coarse"]) == {float(rule[0])}


def test_hywia_returns_weights_for_each_group(model):
    table = hywia(model, CALIB, 0.25, order="mixed").scores.weight_table()
    assert len(table) == 12 and (table["coarse"] + table["fine"]).tolist() == pytest.approx([1] * 12)


def test_other_families_too():
    family = FAMILIES["bloom"]
    for mode in ("block", "layer", "channel"):
        small = llm_pruner(family.model(), CALIB % 48, 0.5, mode=mode).model
        assert logits(small).isfinite().all()


def test_what_cannot_be_is_refused(model):
    with pytest.raises(PrunekitError, match="mode='head' is unknown; allowed: 'block', 'channel', 'layer'"):
        llm_pruner(model, CALIB, mode="head")
    for recipe in (llm_pruner, hywia):
        with pytest.raises(PrunekitError, match=r"layers=\[6, 9\] are not among this model's 6"):
            recipe(model, CALIB, layers=[2, 6, 9])
        for layers in (1, "234"):
            with pytest.raises(PrunekitError, match=r"layers=.* is not allowed; give a list, each entry an integer"):
                recipe(model, CALIB, layers=layers)
        for ratio in (1.2, "0.25", None):
            with pytest.raises(PrunekitError, match=r"pruning_ratio=.* is not allowed"):
                recipe(model, CALIB, ratio)
    for options in ({"mode": "layer"}, {"ranking": "global"}):
        with pytest.raises(PrunekitError, match=r"pruning_ratio=1.2 is not allowed"):
            llm_pruner(model, CALIB, 1.2, **options)
    with pytest.raises(PrunekitError, match="rule='magic' is unknown"):
        hywia(model, CALIB, rule="magic")
    with pytest.raises(PrunekitError, match="needs a calibration set"):
        llm_pruner(model, None)
    with pytest.raises(PrunekitError, match="the data is text"):
        llm_pruner(model, CALIB, data="some text")


@torch.no_grad()
def logits_of(model):
    return model(CALIB).logits


# LoRAShear

SHEARING = {"method": pk.LoRA(r=4, max_steps=20, batch_size=2, learning_rate=1e-3), "mixture": pk.Mixture(n_rounds=2)}


def sources(n=24):
    return {
        "ones": (torch.arange(n)[:, None] * 7 + torch.arange(16)) % 96,
        "threes": (torch.arange(n)[:, None] + 3 * torch.arange(16)) % 96,
    }


@pytest.fixture(scope="module")
def tokenizer():
    return pk.load("world")[1]


WHOLE = {
    "gamma": 0.2,
    "instructions": {"ones": sources()["ones"]},
    **SHEARING,
    "mixture": pk.Mixture(n_rounds=2, seed=3),
}


@pytest.fixture(scope="module")
def sheared(model, tokenizer):
    """What the whole recipe gives, the windows that it measured on, and those that it trained on."""
    from prunekit.recovery import mixture, progressive

    held, trained = [], []
    real_loss, real_train, real_recover = mixture.mean_loss, progressive.train, mixture.recover
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixture, "mean_loss", lambda m, t: held.append(t) or real_loss(m, t))
        patch.setattr(progressive, "train", lambda m, t, *a, **o: trained.append(t.tokens) or real_train(m, t, *a, **o))
        patch.setattr(
            mixture, "recover", lambda m, how, t, **o: trained.append(t.tokens) or real_recover(m, how, t, **o)
        )
        done = lorashear(model, tokenizer, sources(), 0.2, **WHOLE)
    return done, held, trained


@pytest.mark.slow
def test_lorashear_is_its_steps(model, sheared):
    """Distribution, protection, LHSPG, construction, two stages on mixtures: each as the primitive has it."""
    done = sheared[0]
    assert abs(done.plan.pruning_ratio - 0.2) <= 0.005
    assert sum(p.numel() for p in done.model.parameters()) == done.plan.n_parameters_kept
    protected = done.knowledge.unprunable(0.2)
    assert len(protected) == 3 and not set(protected) & set(done.plan.keep)
    assert len(done.knowledge.ablations) == 12 * 2
    assert set(done.knowledge.questions["domain"]) == {"ones", "threes"}
    assert len(done.progress.log.losses) == 12
    table = done.mixture.table()
    assert table["round"].nunique() == 2 * 3
    assert set(table[table["round"] > 3]["source"]) == {"ones"}
    before = {name: p.clone() for name, p in model.named_parameters()}
    opened = open_sources(sources(), None, 16, model, seed=3)
    rows = join(shuffle([row for source in opened for row in source.documents], seed=0), 16).tokens
    expected = pk.prune_progressively(model, 0.2, rows, replace(SHEARING["method"], max_steps=12), protect=protected)
    assert expected.plan == done.plan
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_lorashear_wants_a_folder_of_its_own(model, tokenizer, tmp_path):
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(PrunekitError, match="holds 'model.safetensors'; give a new folder"):
        lorashear(model, tokenizer, sources(), folder=tmp_path, **SHEARING)
    with pytest.raises(PrunekitError, match="is a file"):
        lorashear(model, tokenizer, sources(), folder=tmp_path / "model.safetensors", **SHEARING)


@pytest.mark.slow
def test_lorashear_leaves_out_a_stage_of_no_share(model, tokenizer):
    done = lorashear(model, tokenizer, sources(), 0.2, shares=(1.0, 0.0, 0.0), importance=pk.Taylor(), **SHEARING)
    assert not done.mixture.rows
    assert len(repr(done)) < 1500 and "PruningPlan" in repr(done)
    torch.testing.assert_close(logits_of(done.model), logits_of(done.progress.model), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_lorashear_never_trains_on_what_it_measures_on(sheared):
    """Not in the pruning either, which reads all the rest."""
    _, held, trained = sheared
    rows = {tuple(row.tolist()) for tokens in trained for row in tokens}
    assert len(trained) == 5 and rows
    assert not rows & {tuple(row.tolist()) for tokens in held for row in tokens}


@pytest.mark.slow
def test_lorashear_goes_on_where_it_was_stopped(model, tokenizer, sheared, tmp_path, monkeypatch):
    module = import_module("prunekit.recipes.lorashear")
    given, straight = (model, tokenizer, sources(), 0.2), sheared[0]
    before = {name: p.clone() for name, p in model.named_parameters()}

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "recover_on_mixture", stop)
        with pytest.raises(KeyboardInterrupt):
            lorashear(*given, folder=tmp_path / "run", **WHOLE)
    measured = []
    monkeypatch.setattr("prunekit.knowledge.measurement.ablated", lambda *a: measured.append(a))
    done = lorashear(*given, folder=tmp_path / "run", **WHOLE)
    assert not measured and done.plan == straight.plan
    assert torch.equal(logits_of(done.model), logits_of(straight.model))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 2.0}, "gamma=2.0"),
        ({"n_periods": 0}, "n_periods=0"),
        ({"n_periods": 12}, "n_periods=12 do not fit into 12 steps"),
        ({"pruning_ratio": 0.99}, "at most"),
        ({"instructions": {"one": "/no/such.txt"}}, "source 'one'.*not a file"),
        ({"instructions": {}}, "give at least one"),
        ({"mixture": pk.Mixture(n_rounds=5)}, "n_rounds=5, but training has 2 steps"),
        ({"shares": (0.0, 0.5, 0.5)}, "do not fit into 0 steps"),
        ({"shares": 0.6}, "shares=0.6 is not allowed; give 3 values"),
        ({"importance": pk.Taylor}, r"importance=<class .* give an importance .*such as Taylor\(\)"),
        ({"method": 20}, "method=20 is not allowed; give LoRA"),
    ],
)
def test_lorashear_refuses_before_any_work(model, tokenizer, options, message, monkeypatch):
    monkeypatch.setattr("prunekit.knowledge.measurement.ablated", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(PrunekitError, match=message):
        lorashear(model, tokenizer, **{"sources": sources(), **SHEARING, **options})


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.6, 0.3, 0.3), (1.2, -0.1, -0.1)])
def test_lorashear_refuses_shares_that_are_none(model, tokenizer, shares):
    with pytest.raises(PrunekitError, match="three that sum to 1|give 3 values"):
        lorashear(model, tokenizer, sources(), shares=shares)


@pytest.mark.parametrize(
    ("given", "message"),
    [({}, "give at least one"), ({"one": sources()["ones"][:1]}, "source 'one' has 16 tokens in 1 pieces")],
)
def test_lorashear_refuses_sources_that_are_none(model, tokenizer, given, message):
    with pytest.raises(PrunekitError, match=message):
        lorashear(model, tokenizer, given)


def test_sparsellm_is_its_steps(model):
    sparse, report = sparsellm(model, CALIB, 0.6, n_iterations=2)
    expected = pk.sparsify(model, CALIB, pk.SparseLLM(n_iterations=2), 0.6)
    assert all(torch.equal(a, b) for a, b in zip(sparse.parameters(), expected.parameters(), strict=True))
    assert report == expected.sparsity_report == sparse.sparsity_report


@pytest.mark.slow
def test_sparsellm_recovers_and_zeros_stay(model):
    data = torch.randint(0, 96, (8, 16), generator=torch.Generator().manual_seed(5))
    done = sparsellm(model, CALIB, pattern=(1, 4), half_depth=True, data=data, recovery=pk.LoRA(max_steps=2))
    assert {row["layer"] for row in done.report.rows} == {0, 1, 2}
    weight = done.model.model.layers[0].mlp.up_proj.weight
    assert bool(((weight == 0).unflatten(1, (-1, 4)).sum(2) == 3).all())
    assert not torch.equal(done.model.model.layers[5].mlp.up_proj.weight, model.model.layers[5].mlp.up_proj.weight)
