"""Gaps of removed layers: the map is merged exactly, helps where it can, and is left out where it cannot."""

import math
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, logits
from test_importance import tiny_llama
from torch import nn
from transformers.pytorch_utils import Conv1D

import prunekit as pk
from prunekit.calibration import mean_loss
from prunekit.pruning.compensation import split_windows
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
    with pytest.raises(pk.PrunekitError, match="includes blocks, or layers with others"):
        pk.plan_in_steps(model, pk.BlockInfluence(), 0.3, tokens, n_steps=2, kinds=("layer", "ffn_channel"))
