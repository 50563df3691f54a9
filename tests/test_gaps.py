"""Gaps of removed layers: the map is merged exactly, helps where it can, and is left out where it cannot."""

import copy
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from families import FAMILIES, logits
from test_importance import tiny_llama
from torch import nn
from transformers.pytorch_utils import Conv1D

import prunekit as pk
from prunekit import PrunekitError
from prunekit.calibration import mean_loss
from prunekit.pruning.compensation import split_windows
from prunekit.pruning.gap_factors import rescale
from prunekit.pruning.gaps import _apply, _sums, gaps_of
from prunekit.pruning.least_squares import choose


def tokens_of(model, n=24, length=16, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.randint(model.config.vocab_size, (n, length))


def deep(name="llama", n_layers=4):
    """A model of four layers, of which the later ones do little, as in trained models."""
    torch.manual_seed(0)
    if name == "llama":
        model = type(tiny_llama())(
            tiny_llama().config.__class__(**{**tiny_llama().config.to_dict(), "num_hidden_layers": n_layers})
        )
    else:
        family = FAMILIES[name].model(dtype=torch.float32)
        config = family.config.__class__(
            **{**family.config.to_dict(), "num_hidden_layers": n_layers, "layer_types": None}
        )
        model = type(family)(config)
    return model.float().eval()


def plan_without(model, *numbers, **more):
    groups = pk.discover(model)
    layers = groups.of_kind("layer")
    scores = {g.name: torch.ones(g.n_units) for g in groups}
    plan = pk.plan(groups, scores, {"layer": len(numbers) / len(layers)}, of="units", kinds=("layer",))
    keep = {g.name: [] if g.layer in numbers else [0] for g in layers}
    return replace(
        plan,
        keep=keep | {name: units for name, units in more.items()},
        n_units={g.name: g.n_units for g in groups if g.name in {*keep, *more}},
    )


@pytest.mark.parametrize("kind", ["linear", "linear with bias", "conv1d"])
def test_a_map_is_merged_into_weights_exactly(kind):
    torch.manual_seed(1)
    module = (Conv1D(5, 3) if kind == "conv1d" else nn.Linear(3, 5, bias="bias" in kind)).double()
    x = torch.randn(7, 3).double()
    if module.bias is not None:
        nn.init.normal_(module.bias)
    before = module(x)
    change = torch.randn(5 + (module.bias is not None), 5).double()
    with torch.no_grad():
        _apply(module, change)
    wanted = before + before @ change[:5] + (change[5] if module.bias is not None else 0)
    torch.testing.assert_close(module(x), wanted)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_what_layers_added_is_fitted_and_the_loss_on_split_windows_does_not_rise(name):
    model = deep(name)
    tokens, plan = tokens_of(model), plan_without(model, 1, 2)
    plain = pk.prune(model, plan, measure=False)
    bridged = pk.prune(model, plan, compensate=tokens, measure=False)
    held = split_windows(tokens)[1]
    table = bridged.compensation
    assert len(table) == 1 and table.inputs[0] == model.config.hidden_size and table.module[0].split(".")[2] == "0"
    assert mean_loss(bridged, held) <= mean_loss(plain, held) + 1e-6
    assert table.error_after[0] <= table.error_before[0]
    assert sum(p.numel() for p in bridged.parameters()) == sum(p.numel() for p in plain.parameters())
    changed = [n for n, p in bridged.named_parameters() if not torch.equal(p, dict(plain.named_parameters())[n])]
    taken = not math.isnan(table.ridge[0])
    assert (len(changed) > 0) == taken and all(n.startswith(table.module[0]) for n in changed)


def test_a_layer_that_repeats_what_the_one_before_it_wrote_is_bridged_whole():
    """Its gap is M itself, so that Δ is 1, drawn a little towards 0 by the ridge."""

    class Doubling(nn.Module):
        def __init__(self, layer, written):
            super().__init__()
            self.layer, self.written = layer, written

        def forward(self, hidden, **options):
            return self.layer(hidden, **options) * 0 + hidden + self.written[0]

    model, written = deep(), [None]
    plan = plan_without(model, 2)
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda _m, _a, result: written.__setitem__(0, result))
    model.model.layers[2] = Doubling(model.model.layers[2], written)
    learnt, held = split_windows(tokens_of(model, 64))
    gaps, _ = gaps_of(model, plan, learnt[:1])
    found = choose(*(_sums(model, gaps, part)[0] for part in (learnt, held)), "weights", None)
    assert found.before > 0.01 and found.after < 0.01 * found.before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_finds_the_same_writers(dtype):
    model = deep()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(100)  # a residual stream of which one step in bfloat16 is large
    plan = plan_without(model, 2)
    gaps, left = gaps_of(model.to(dtype), plan, tokens_of(model)[:1])
    assert [gap.writer for gap in gaps] == ["model.layers.1.mlp.down_proj"] and not left
    table = pk.prune(model, plan, compensate=tokens_of(model), measure=False).compensation
    assert table.inputs[0] == 16 and next(model.parameters()).dtype == dtype


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_where_the_last_linear_layers_outputs_are_normed_the_gap_is_left(name):
    model = deep(name)
    small = pk.prune(model, plan_without(model, 1), compensate=tokens_of(model), measure=False)
    assert list(small.compensation.inputs) == [0] and small.compensation.ridge.isna().all()
    plain = pk.prune(model, plan_without(model, 1), measure=False)
    assert torch.equal(logits(small), logits(plain))


def test_a_gap_at_the_beginning_is_left_and_two_gaps_are_two_rows():
    model = deep(n_layers=6)
    plan = plan_without(model, 0, 2, 4)
    gaps, left = gaps_of(model, plan, tokens_of(model)[:1])
    assert [gap.last for gap in gaps] == ["model.layers.2", "model.layers.4"] and left == ["model.layers.0"]
    table = pk.prune(model, plan, compensate=tokens_of(model), measure=False).compensation
    assert list(table.module) == ["model.layers.0", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


def test_units_and_layers_go_in_one_plan_and_the_checkpoint_loads(tmp_path):
    model = deep()
    ffn = pk.discover(model).of_kind("ffn_channel")[0].name
    small = pk.prune(model, plan_without(model, 2, **{ffn: list(range(8))}), compensate=tokens_of(model), measure=False)
    assert list(small.compensation.module) == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    pk.save(small, tmp_path / "out")
    assert torch.equal(logits(pk.load(tmp_path / "out")[0]), logits(small))


def test_a_narrower_residual_stream_leaves_gaps():
    model = deep()
    hidden = pk.discover(model).of_kind("hidden")[0]
    plan = plan_without(model, 2, **{hidden.name: list(range(hidden.n_units // 2))})
    assert gaps_of(model, plan, tokens_of(model)[:1]) == ([], ["model.layers.2"])


def test_layers_go_one_at_a_time_by_the_influence_measured_without_those_before():
    model, gone = deep(n_layers=6), []
    tokens = tokens_of(model)
    options = {"of": "units", "kinds": ("layer",)}
    plan = pk.plan_in_steps(model, pk.BlockInfluence(), 3 / 6, tokens, n_steps=3, **options)
    small, numbers = model, list(range(6))
    for _ in range(3):
        groups = pk.discover(small)
        scores = pk.score(small, groups.of_kind("layer"), pk.BlockInfluence(), tokens)
        gone.append(numbers.pop(min(range(len(numbers)), key=lambda i: float(scores[f"model.layers.{i}:layer"]))))
        small = pk.prune(model, plan_without(model, *gone), measure=False)
    assert sorted(gone) == [int(name.split(".")[2].split(":")[0]) for name, units in plan.keep.items() if not units]
    assert torch.equal(logits(pk.prune(model, plan, measure=False)), logits(small))
    with pytest.raises(pk.PrunekitError, match="has whole layers or blocks with others"):
        pk.plan_in_steps(model, pk.BlockInfluence(), 0.3, tokens, n_steps=2, kinds=("layer", "ffn_channel"))


def turned(model, factors):
    """Logits where the residual stream behind layers is multiplied by factors: layer → factor."""
    hooks = [
        model.get_submodule(path).register_forward_hook(
            lambda _module, _args, result, by=by: result * by if isinstance(result, torch.Tensor) else (result[0] * by,)
        )
        for path, by in factors.items()
    ]
    found = logits(model)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_factors_in_weights_are_factors_of_the_residual_stream(name, tied, monkeypatch):
    model = deep(name, n_layers=6)
    model.config.tie_word_embeddings = tied
    model.tie_weights()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.dim() == 2 and p.std() < 0.1):
            parameter.mul_(15)  # so that layers do something, and the epsilon of norms nothing
    monkeypatch.setattr("prunekit.pruning.gap_factors.judged", lambda rows, *_: table_of(rows))
    tokens, plan = tokens_of(model), plan_without(model, 1, 2, 4)
    plain = pk.prune(model, plan, measure=False)
    small = pk.prune(model, plan, compensate=tokens, gaps="magnitude", measure=False)
    first, second = small.compensation.factor
    layers = list(small.compensation.module)
    assert [path.split(".")[-1] for path in layers] == ["0", "1"] and first != 1 != second
    expected = turned(plain, dict(zip(layers, (first, second), strict=True)))
    assert relative(logits(small), expected) < 1e-3 < 0.1 * relative(logits(plain), expected)
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in plain.parameters())


def table_of(rows):
    return pd.DataFrame(rows, columns=["module", "inputs", "ridge", "error_before", "error_after"])


def relative(a, b):
    return float((a - b).norm() / b.norm())


def test_the_factor_is_the_mean_over_channels_of_how_the_stream_grew():
    model, seen = deep(), {}
    for number in (0, 2):
        model.model.layers[number].register_forward_hook(
            lambda _module, _args, result, number=number: seen.setdefault(number, []).append(result)
        )
    tokens = tokens_of(model)
    learnt, _ = split_windows(tokens)
    with torch.no_grad():
        model(learnt)
    front, behind = (torch.cat(seen[number]).abs().mean((0, 1)) for number in (0, 2))
    table = pk.prune(model, plan_without(model, 1, 2), compensate=tokens, gaps="magnitude", measure=False).compensation
    assert table.factor[0] == pytest.approx(float((behind / front).mean()), rel=1e-5)
    assert table.inputs[0] == 16 and table.ridge.isna().all()


class Tripling(nn.Module):
    """A layer that only makes the residual stream larger, which a factor makes up for exactly."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden, **options):
        return self.layer(hidden, **options) * 0 + hidden * 3


def test_a_layer_that_only_scales_is_made_up_for_and_what_raises_the_loss_is_taken_back():
    model, outcomes = deep(), set()
    plan = plan_without(model, 1)
    plain = pk.prune(model, plan, measure=False)
    before = {name: p.clone() for name, p in plain.named_parameters()}
    model.model.layers[1] = Tripling(model.model.layers[1])
    for seed in range(8):
        small, tokens = copy.deepcopy(plain), tokens_of(model, seed=seed)
        table, held = rescale(small, model, plan, tokens), split_windows(tokens)[1]
        assert table.factor[0] == pytest.approx(3, rel=1e-5)
        assert table.error_before[0] == pytest.approx(4 / 9, rel=1e-5)
        was, now = table.attrs["loss"]
        assert (was, now) == pytest.approx((mean_loss(plain, held), mean_loss(model, held)), abs=1e-4)
        outcomes.add(now <= was)
        if now <= was:
            assert relative(logits(small), logits(model)) < 1e-4 and table.error_after[0] < 1e-9
        else:
            assert all(torch.equal(p, before[name]) for name, p in small.named_parameters())
            assert table.error_after[0] == table.error_before[0]
    assert outcomes == {True, False}


@pytest.mark.parametrize("name", ["gemma2", "olmo2", "mixtral"])
def test_a_factor_that_weights_cannot_take_leaves_all_gaps(name):
    model = deep(name)
    plan, tokens = plan_without(model, 1), tokens_of(model)
    small = pk.prune(model, plan, compensate=tokens, gaps="magnitude", measure=False)
    assert list(small.compensation.module) == ["model.layers.1"] and small.compensation.factor.isna().all()
    assert torch.equal(logits(small), logits(pk.prune(model, plan, measure=False)))


def test_factors_of_half_precision_and_of_gaps_at_the_ends():
    model = deep(n_layers=5).to(torch.bfloat16)
    plan, tokens = plan_without(model, 0, 2, 4), tokens_of(model)
    table = pk.prune(model, plan, compensate=tokens, gaps="magnitude", measure=False).compensation
    assert list(table.module) == ["model.layers.0", "model.layers.1", "model.layers.0"]
    assert list(table.factor.isna()) == [False, False, True]
    hidden = pk.discover(model).of_kind("hidden")[0]
    narrow = plan_without(model, 2, **{hidden.name: list(range(hidden.n_units // 2))})
    table = pk.prune(model, narrow, compensate=tokens, gaps="magnitude", measure=False).compensation
    assert table.factor.isna().all()


def test_a_factor_without_a_gap_is_refused():
    model = deep()
    layers, tokens = plan_without(model, 2), tokens_of(model)
    ffn = pk.discover(model).of_kind("ffn_channel")[0]
    scores = {ffn.name: torch.ones(ffn.n_units)}
    units = pk.plan(pk.discover(model), scores, 0.3, of="units", kinds=("ffn_channel",), protect_layers=(1, 2, 3))
    for plan, calib in ((layers, None), (units, tokens)):
        with pytest.raises(PrunekitError, match="gaps='magnitude' makes up for whole layers that go"):
            pk.prune(model, plan, compensate=calib, gaps="magnitude")
    with pytest.raises(PrunekitError, match="gaps='both' is not allowed"):
        pk.prune(model, layers, compensate=tokens, gaps="both")


def test_blocks_alone_leave_nothing_to_compensate():
    """Else what was asked for would be dropped in silence."""
    model = deep()
    groups = pk.discover(model)
    scores = {group.name: torch.ones(1) for group in groups.of_kind("block")}
    plan = pk.plan(groups, scores, 0.25, of="units", kinds=("block",))
    with pytest.raises(PrunekitError, match="whole attention or FFN blocks alone, so leave it out"):
        pk.prune(model, plan, compensate=tokens_of(model))
    assert pk.prune(model, plan).num_parameters() < model.num_parameters()
