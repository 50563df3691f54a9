"""Curvature importance: its sums, its costs by hand, every family, and plans that share a budget out by it."""

import math

import pytest
import torch
from families import FAMILIES
from torch.nn.functional import cross_entropy

from prunekit import Curvature, PrunekitError, Taylor, discover, plan, prune, score
from prunekit.importance import IMPORTANCES, Scores, curvature
from prunekit.importance.curvature import BLOCKS, Sums, applies, costs_in_order, gather_sums, raised
from prunekit.importance.input_statistics import linear_readers


def calibration(n=8, seq=12):
    return torch.randint(0, 48, (n, seq), generator=torch.Generator().manual_seed(5))


def layer(name, calib, path):
    """What one layer reads, and the gradients of the summed loss by what it returns, from plain torch."""
    model = FAMILIES[name].model()
    seen = []

    def note(_module, args, result):
        result.retain_grad()
        seen.extend([args[0], result])

    hook = model.get_submodule(path).register_forward_hook(note)
    logits = model(input_ids=calib).logits[:, :-1]
    cross_entropy(logits.flatten(0, 1), calib[:, 1:].flatten(), reduction="sum").backward()
    hook.remove()
    x, y = seen
    return model, x.detach().flatten(0, 1), y.grad.flatten(0, 1)


@pytest.mark.parametrize("path", ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"])
def test_sums_are_those_of_plain_torch(path, monkeypatch):
    monkeypatch.setattr(curvature, "HEAVY", 1.1)  # so that some tokens are heavy
    calib = calibration()
    model, x, g = layer("llama_gqa", calib, path)
    model.zero_grad()
    readers = {f"{path}.weight": linear_readers(model)[f"{path}.weight"]}
    found = gather_sums(model, calib, readers)[f"{path}.weight"]
    sizes = g.norm(dim=1, keepdim=True)
    held = g * (1.1 * sizes.median() / sizes).clamp_max(1)
    assert bool((held.norm(dim=1) < 0.99 * sizes.flatten()).any())
    torch.testing.assert_close(found.gram, x.T @ x / len(x))
    torch.testing.assert_close(found.gradients, held.T @ held / len(x))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_unit_costs_what_the_loss_rises_by_after_the_best_re_fit():
    """½ of the smallest error left by the other inputs, in the metric of the gradients; the cheapest go first."""
    torch.manual_seed(1)
    x, weight, g = torch.randn(40, 5).double(), torch.randn(5, 3).double(), torch.randn(40, 3).double()
    gram, curve = x.T @ x / 40, g.T @ g / 40
    ridge = 0.2
    found = costs_in_order(Sums(gram, curve), weight, torch.arange(5)[:, None], ridge)
    damped, left, expected, highest = raised(gram, ridge), list(range(5)), {}, 0.0
    w = weight.clone()
    while left:
        costs = {}
        for u in left:
            others = [v for v in left if v != u]
            change = torch.linalg.solve(damped[others][:, others], damped[others][:, [u]] @ w[[u]]) if others else None
            error = torch.zeros(5, 3).double()
            error[u] = -w[u]
            if others:
                error[others] = change
            costs[u] = float(((error.T @ damped @ error) * curve).sum() / 2)
        u = min(costs, key=costs.get)
        others = [v for v in left if v != u]
        if others:
            w[others] += torch.linalg.solve(damped[others][:, others], damped[others][:, [u]] @ w[[u]])
        highest = max(highest, costs[u] * 5 / len(left))
        expected[u], left = highest, others
    torch.testing.assert_close(found, torch.tensor([expected[u] for u in range(5)]).double())


@pytest.mark.parametrize("width", [1, 3])
def test_what_is_kept_up_to_date_equals_a_fit_from_scratch_after_each_portion(width):
    torch.manual_seed(4)
    n = 2 * BLOCKS + 3  # two units go at a time
    x, weight, g = torch.randn(400, n * width), torch.randn(n * width, 5), torch.randn(40, 5)
    sums = Sums((x.T @ x / 400).double(), (g.T @ g / 40).double())
    units, weight, damped = torch.arange(n * width).view(n, width), weight.double(), raised(sums.gram, 0.1)
    expected, left, highest = torch.zeros(n).double(), list(range(n)), 0.0
    while left:
        stay = units[left].flatten()
        gone = torch.tensor([i for i in range(n * width) if i not in set(stay.tolist())], dtype=torch.long)
        inverse = torch.linalg.inv(damped[stay][:, stay])
        fitted = (weight[stay] + inverse @ damped[stay][:, gone] @ weight[gone]).unflatten(0, (-1, width))
        blocks = [inverse[i : i + width, i : i + width].inverse() for i in range(0, len(stay), width)]
        costs = [float(((w.T @ block @ w) * sums.gradients).sum() / 2) for w, block in zip(fitted, blocks, strict=True)]
        for i in sorted(range(len(left)), key=costs.__getitem__)[:2]:
            expected[left[i]] = max(highest, costs[i] * n / len(left))
        chosen = [left[i] for i in sorted(range(len(left)), key=costs.__getitem__)[:2]]
        highest, left = float(expected[chosen].max()), [u for u in left if u not in chosen]
    torch.testing.assert_close(costs_in_order(sums, weight, units, 0.1), expected)


def test_heads_are_blocks_and_channels_that_are_doubles_cost_next_to_nothing():
    torch.manual_seed(2)
    x, weight = torch.randn(200, 6).double(), torch.randn(6, 4).double()
    x[:, 2:4] = x[:, :2]  # the second head reads as the first
    sums = Sums(x.T @ x / 200, torch.eye(4).double())
    first, *rest = costs_in_order(sums, weight, torch.arange(6).view(3, 2), 1e-6).sort().values.tolist()
    assert first < 1e-4 * min(rest)
    assert int(costs_in_order(sums, weight, torch.arange(6).view(3, 2), 1e-6).argmin()) in (0, 1)


@pytest.mark.parametrize("n", [BLOCKS - 1, 2 * BLOCKS, 3 * BLOCKS + 5])
def test_every_unit_has_a_finite_cost_whatever_the_portions(n):
    torch.manual_seed(3)
    x, weight = torch.randn(30, n).double(), torch.randn(n, 4).double()
    x[:, 0] = 0.0  # an input that is never there
    order = torch.randperm(n)
    sums = Sums(x.T @ x / 30, torch.eye(4).double())
    found = costs_in_order(sums, weight, torch.arange(n)[:, None], 0.3)
    moved = costs_in_order(sums, weight, order[:, None], 0.3)
    assert bool(found.isfinite().all()) and float(found.min()) >= 0 and int(found.argmin()) == 0
    torch.testing.assert_close(moved, found[order])


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_heads_and_channels_of_every_family_are_scored_or_refused_by_name(name):
    family = FAMILIES[name]
    model, groups = family.model(), family.groups()
    chosen = groups.of_kind("kv_head", "ffn_channel")
    if not len(chosen):
        pytest.skip("no heads and no channels")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if not applies(model, chosen):
        with pytest.raises(PrunekitError, match=r"has \d+ consumer layers|no linear layer consumes"):
            score(model, chosen, Curvature(), calibration())
        return
    found = score(model, chosen, Curvature(), calibration())
    for group in chosen:
        values = found[group.name]
        assert values.shape == (group.n_units,) and bool(values.isfinite().all()) and float(values.min()) >= 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    made = plan(groups, found, 0.05)
    assert made.notes["ranking"] == "global" and abs(made.pruning_ratio - 0.05) < 0.03


def test_what_scores_say_of_their_ranking_reaches_the_plan(tmp_path):
    family = FAMILIES["llama_gqa"]
    model, groups = family.model(), family.groups()
    found = score(model, groups.of_kind("ffn_channel"), Curvature(), calibration())
    again = Scores.load(found.save(tmp_path / "scores.safetensors"))
    assert found.ranking == again.ranking == "global" and IMPORTANCES["curvature"] is Curvature
    kinds = {"kinds": ["ffn_channel"]}
    default, local = plan(groups, found, 0.1, **kinds), plan(groups, found, 0.1, ranking="local", **kinds)
    assert (
        default.keep
        == plan(groups, again, 0.1, **kinds).keep
        == plan(groups, found, 0.1, ranking="global", **kinds).keep
    )
    assert default.keep != local.keep
    assert plan(groups, found, 0.1, of="units", **kinds).notes["ranking"] == "local"
    taylor = score(model, groups.of_kind("ffn_channel"), Taylor(), calibration())
    assert taylor.ranking == "local" == plan(groups, taylor, 0.1, **kinds).notes["ranking"]


def test_a_layer_that_matters_is_spared_without_being_named():
    """The second layer's channels hardly reach the loss; the first one's are ten times as large."""
    model = FAMILIES["llama_gqa"].model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(0.01)
    groups = discover(model)
    found = score(model, groups.of_kind("ffn_channel"), Curvature(), calibration())
    share = plan(groups, found, 0.1, kinds=["ffn_channel"]).table().set_index("layer")["kept_fraction"]
    assert share[0] > 0.95 > 0.9 > share[1]


def test_bad_input_is_refused_by_name():
    family = FAMILIES["llama_gqa"]
    model, groups = family.model(), family.groups()
    for ridge in (0, -1, math.nan, "much"):
        with pytest.raises(PrunekitError, match=r"ridge=.* is not allowed; give a finite number above 0"):
            Curvature(ridge)
    with pytest.raises(PrunekitError, match="needs a calibration set"):
        score(model, groups, Curvature())
    with pytest.raises(PrunekitError, match=r"Curvature\(\) needs one; choose heads or FFN channels"):
        score(model, groups.of_kind("hidden"), Curvature(), calibration())


@pytest.mark.slow
def test_the_default_cut_of_a_real_model_is_no_ruin(smollm2, shared):
    """At 20%, on an eighth of the default calibration text: first-order Taylor with even shares is far above."""
    from prunekit import calibration_set

    model, tokenizer = smollm2
    calib = calibration_set(shared / "data/calibration/c4_demo.jsonl", tokenizer, n_samples=8, seq_len=128)
    held = calibration_set(
        shared / "data/calibration/c4_demo.jsonl", tokenizer, n_samples=8, seq_len=128, held_out=True
    )
    groups = discover(model)
    units = groups.of_kind("kv_head", "ffn_channel")
    rises = {}
    for importance in (Curvature(), Taylor()):
        made = plan(groups, score(model, units, importance, calib), 0.2)
        rises[type(importance)] = prune(model, made, held_out=held).loss_change.rise
    assert rises[Curvature] < 0.8 and rises[Taylor] > 3 * rises[Curvature]
