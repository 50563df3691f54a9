"""Compensation: what can be made up for, least squares by hand, every family, the dense model untouched, refusals."""

import copy
import gc
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, logits, plan_keeping, random_units, relative_difference, zero_units
from torch import nn

from prunekit import PrunekitError, PruningPlan, discover, export, load, prune, save
from prunekit.pruning import compensation, surgery
from prunekit.pruning.compensation import _grams, _run_once, compensate
from prunekit.pruning.least_squares import RIDGES, choose, fit_sums

HALF = 0.5


def calibration(n=24, seq=16):
    return torch.randint(0, 48, (n, seq), generator=torch.Generator().manual_seed(11))


def cut(family, seed=0):
    """A dense model, a plan that takes half its heads and channels, and what is left."""
    model, groups = family.model(), family.groups()
    plan = plan_keeping(groups, random_units(family, groups, seed, share=HALF))
    plan = replace(plan, groups=groups)
    return model, plan, prune(model, plan)


def test_a_channel_that_is_the_double_of_another_is_made_up_for_whole():
    family = FAMILIES["llama_biased"]
    model = family.model()
    for layer in model.model.layers:
        with torch.no_grad():
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[48:], linear.bias[48:] = linear.weight[:48], linear.bias[:48]
    groups = discover(model)
    keep = {group.name: list(range(48)) for group in groups.of_kind("ffn_channel")}
    plan = PruningPlan(keep, dict.fromkeys(keep, 96), groups.n_parameters, groups.n_parameters, groups=groups)
    small = prune(model, plan)
    assert relative_difference(logits(small), logits(model)) > 1e-2
    compensate(small, model, plan, calibration(), ridge=1e-12)
    assert relative_difference(logits(small), logits(model)) < 1e-6


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa"])
def test_one_layer_by_hand(name):
    """The last layer that is re-fitted: what the pruned inputs added is predicted from those that stay."""
    model, plan, small = cut(FAMILIES[name])
    plain = copy.deepcopy(small)
    table = compensate(small, model, plan, calibration(), ridge=0.05)
    path = table["module"].iloc[-1]
    group = next(g for g in plan.groups if g.name in plan.keep and any(path in m.parameter for m in g.members))
    seen = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(calibration())
    hook.remove()
    (x,), dense, old = seen, model.get_submodule(path), plain.get_submodule(path)
    weight = dense.weight.detach() if name == "gpt2" else dense.weight.detach().T  # (n_in, n_out)
    keep, gone = plan.keep[group.name], plan.removed(group.name)
    sizes = x.norm(dim=1, keepdim=True)
    w = (sizes.median() / sizes).clamp_max(1).square()  # of each token
    rest, x = x[:, gone] @ weight[gone], x[:, keep]
    mean = (w * x).sum(0) / w.sum() if old.bias is not None else 0
    gram = (x - mean).T @ (w * (x - mean))
    change = torch.linalg.solve(gram + 0.05 * torch.diag(gram.diagonal()), (x - mean).T @ (w * rest))
    expected = weight[keep] + change
    new = small.get_submodule(path)
    torch.testing.assert_close(new.weight.detach() if name == "gpt2" else new.weight.detach().T, expected)
    if old.bias is not None:
        bias = old.bias + (w * (rest - x @ change)).sum(0) / w.sum()
        torch.testing.assert_close(new.bias.detach(), bias.detach())
        change = torch.cat([change, (bias - old.bias)[None].detach()])
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    assert table["error_after"].iloc[-1] < table["error_before"].iloc[-1]
    left = float((w * (rest - x @ change).square()).sum() / (w * rest.square()).sum())
    assert table["error_after"].iloc[-1] / table["error_before"].iloc[-1] == pytest.approx(left)


def settled(*_args):
    """Stands for the loss on held-out windows, which says nothing of models with random weights."""
    return 1.0


def test_the_ridge_is_the_one_that_leaves_least_on_held_out_windows(monkeypatch):
    monkeypatch.setattr(compensation, "mean_loss", settled)
    model, plan, small = cut(FAMILIES["llama_gqa"])
    calib = calibration(48)
    table = compensate(small, model, plan, calib)
    assert set(table["ridge"].dropna()) <= set(RIDGES) and (table["error_after"] <= table["error_before"]).all()
    held = torch.zeros(48, dtype=torch.bool)
    held[3::4] = True
    path = "model.layers.0.mlp.down_proj"
    row = table.set_index("module").loc[path]
    group = plan.groups["model.layers.0.mlp:ffn_channel"]
    reader = {path: compensation.linear_readers(model)[f"{path}.weight"]}
    weight = model.get_submodule(path).weight.detach().T
    learnt, judge = (
        fit_sums(_grams(model, reader, part)[path], weight, torch.tensor(plan.keep[group.name]), None, False)
        for part in (calib[~held], calib[held])
    )
    errors = {r: judge.error(judge.lack_after(learnt.solved(r))) for r in RIDGES}
    assert row["error_after"] == pytest.approx(min(errors.values())) and row["ridge"] == min(errors, key=errors.get)
    expected = weight[plan.keep[group.name]] + (learnt + judge).solved(row["ridge"])
    torch.testing.assert_close(small.get_submodule(path).weight.detach().T, expected, rtol=1e-9, atol=1e-12)


def test_layers_keep_their_weights_where_the_held_out_loss_rises(monkeypatch):
    losses = iter([1.0, 1.01])
    monkeypatch.setattr(compensation, "mean_loss", lambda *_: next(losses))
    model, plan, small = cut(FAMILIES["llama_gqa"])
    before = copy.deepcopy(small.state_dict())
    table = compensate(small, model, plan, calibration(), fit="both")
    assert table["ridge"].isna().all() and table.attrs["loss"] == (1.0, 1.01) and small.compensation is table
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    assert small.state_dict().keys() == before.keys()


def test_a_layer_whose_held_out_error_does_not_fall_keeps_its_weights(monkeypatch):
    """Few tokens whose inputs have nothing to do with those of the others."""
    torch.manual_seed(0)
    learnt, judge = (
        fit_sums((x := torch.randn(8, 7).double()).T @ x, torch.randn(6, 3).double(), torch.arange(4), None, False)
        for _ in range(2)
    )
    choice = compensation.choose(learnt, judge, "weights", None)
    better = any(judge.lack_after(learnt.solved(r)) < judge.lack for r in RIDGES)
    assert (choice.change is None) == (not better) and choice.after <= choice.before
    grams = (torch.tensor([[1.0, c, 0], [c, 1, 0], [0, 0, 1]]).double() for c in (-1, 1))
    opposed, other = (fit_sums(gram, torch.ones(2, 1).double(), torch.tensor([0]), None, False) for gram in grams)
    kept = compensation.choose(opposed, other, "weights", None)
    assert kept.change is None and kept.before == kept.after and kept.ridge != kept.ridge


@pytest.mark.parametrize("fit", ["weights", "bias", "both"])
@pytest.mark.parametrize("n_pruned", [1, 3, 9])
def test_fewer_directions_than_outputs_are_solved_for_and_nothing_else_changes(n_pruned, fit):
    torch.manual_seed(5)
    n, weight = 12, torch.randn(12, 7).double()
    mixed = torch.randn(3, n)  # so that the inputs that are left know of the others
    drawn = [torch.randn(rows, 3) @ mixed + torch.randn(rows, n) / 4 + 1 for rows in (400, 200)]
    sums = [(z := torch.cat([x, torch.ones(len(x), 1)], 1).double()).T @ z for x in drawn]
    learnt, judge = (fit_sums(gram, weight, torch.arange(n - n_pruned), None, fit != "weights") for gram in sums)
    assert (learnt.basis is None) == (n_pruned >= 7)
    for other in (judge, None):
        found = choose(learnt, other, fit, None)
        plain = choose(*(each and replace(each, basis=None) for each in (learnt, other)), fit, None)
        assert found.change.shape == (n - n_pruned + (fit != "weights"), 7)
        torch.testing.assert_close(found, plain, equal_nan=True)


@pytest.mark.parametrize(("n", "held"), [(1, None), (2, [1]), (3, [2]), (4, [3]), (9, [3, 7])])
def test_which_windows_are_held_out(n, held):
    tokens = torch.arange(n)[:, None].expand(n, 4)
    learnt, judge = compensation.split_windows(tokens)
    assert (None if judge is None else judge[:, 0].tolist()) == held
    assert sorted([*learnt[:, 0].tolist(), *(held or [])]) == list(range(n))


EVERY = [name for name in FAMILIES if "peft" not in name]


@pytest.mark.parametrize("name", EVERY)
def test_each_layer_and_the_whole_come_nearer_in_every_family(name):
    model, plan, small = cut(FAMILIES[name])
    before, dense = relative_difference(logits(small), logits(model)), copy.deepcopy(model.state_dict())
    table = compensate(small, model, plan, calibration(96), ridge=0.01)
    assert len(table) and (table["error_after"] <= table["error_before"]).all()
    assert relative_difference(logits(small), logits(model)) < before
    assert all(torch.equal(value, dense[key]) for key, value in model.state_dict().items())


def test_a_bias_alone_is_the_mean_of_what_is_lacking(monkeypatch):
    """FLAP's compensation: LLaMA's layers are given a bias, and no weight changes."""
    monkeypatch.setattr(compensation, "mean_loss", settled)
    model, plan, small = cut(FAMILIES["llama_gqa"])
    plain = copy.deepcopy(small)
    table = compensate(small, model, plan, calibration(), fit="bias", ridge=1.0)
    path = "model.layers.0.mlp.down_proj"
    assert path in set(table["module"])
    seen = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(calibration())
    hook.remove()
    gone, x = plan.removed("model.layers.0.mlp:ffn_channel"), seen[0]
    sizes = x.norm(dim=1, keepdim=True)
    w = (sizes.median() / sizes).clamp_max(1).square()
    expected = (w * (x[:, gone] @ model.get_submodule(path).weight.detach().T[gone])).sum(0) / w.sum()
    torch.testing.assert_close(small.get_submodule(path).bias.detach(), expected)
    assert all(torch.equal(p, dict(small.named_parameters())[n]) for n, p in plain.named_parameters())
    assert (table["error_after"] < table["error_before"]).all()


@pytest.mark.parametrize(("fit", "better"), [("bias", "none"), ("both", "weights")])
def test_more_that_may_be_fitted_leaves_a_smaller_error(fit, better):
    model, plan, small = cut(FAMILIES["qwen2"])
    first = compensate(small, model, plan, calibration(96), fit=fit, ridge=0.01)["error_after"].iloc[0]
    other = prune(model, plan)
    table = compensate(other, model, plan, calibration(96), ridge=0.01)
    assert first < table["error_before" if better == "none" else "error_after"].iloc[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama_gqa", "qwen2", "olmo"])
def test_biases_that_were_added_are_saved_and_cut_along(name, tmp_path):
    """Also after whole layers went, when modules stand elsewhere."""
    model, plan, small = cut(FAMILIES[name])
    compensate(small, model, plan, calibration(), fit="bias", ridge=1.0)
    groups = discover(small)
    keep = {"model.layers.0:layer": [], groups.of_kind("ffn_channel")[1].name: list(range(20))}
    for number, m in enumerate((small, prune(small, plan_keeping(groups, keep)))):
        folder = save(m, tmp_path / str(number), plan=plan)
        loaded = load(folder)[0]
        assert torch.equal(logits(loaded), logits(m)) and loaded.model.layers[-1].mlp.down_proj.bias is not None
        assert "linear layers were given one" in (folder / "README.md").read_text()
        assert [g.n_units for g in discover(loaded)] == [g.n_units for g in discover(m)]
        with pytest.raises(PrunekitError, match="were given biases, others not; re-fit with fit='weights'"):
            export(m, tmp_path / "padded", layout="padded")


def test_cut_is_zero_with_biases_that_were_added():
    model, plan, small = cut(FAMILIES["llama_gqa"])
    compensate(small, model, plan, calibration(), fit="both", ridge=0.3)
    groups = discover(small)
    keep = {group.name: list(range(group.n_units // 2)) for group in groups.of_kind("ffn_channel")}
    rest = plan_keeping(groups, keep)
    assert relative_difference(logits(prune(small, rest)), logits(zero_units(small, groups, rest))) < 1e-12


@pytest.mark.slow
def test_biases_are_not_added_to_adapters():
    model, plan, small = cut(FAMILIES["llama_peft"])
    for fit in ("bias", "both"):
        with pytest.raises(PrunekitError, match=r"would add biases to adapters.*merge_and_unload\(\) first"):
            compensate(small, model, plan, calibration(), fit=fit)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama_biased"])
def test_a_layer_that_reads_a_constant_is_fitted_by_its_bias(name):
    """Centring leaves rounding noise there."""
    model = FAMILIES[name].model()
    channels = discover(model).of_kind("ffn_channel")[0]
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for member in channels.members:
            if not member.parameter.endswith("bias") and member.width and parameters[member.parameter].dim() == 2:
                reads = "down_proj" in member.parameter or "fc2" in member.parameter or "mlp.c_proj" in member.parameter
                if not reads:
                    parameters[member.parameter].zero_()
    groups = discover(model)
    plan = replace(plan_keeping(groups, {channels.name: list(range(channels.n_units // 2))}), groups=groups)
    small = prune(model, plan)
    assert compensate(small, model, plan, calibration(), ridge=0.3)["error_after"].iloc[0] < 1e-9


def test_tokens_that_went_are_refused():
    family = FAMILIES["llama_gqa"]
    model, groups = family.model(), family.groups()
    keep = {groups.of_kind("vocabulary")[0].name: list(range(40)), "model.layers.0.mlp:ffn_channel": list(range(40))}
    plan = replace(plan_keeping(groups, keep), groups=groups)
    with pytest.raises(PrunekitError, match="the plan removes tokens, but calib has the old token ids"):
        prune(model, plan, compensate=calibration() % 40)


def test_another_dense_model_is_refused():
    model, plan, small = cut(FAMILIES["llama_mha"])
    with pytest.raises(PrunekitError, match=r"the order is compensate\(small, model, plan, calib\)"):
        compensate(model, small, plan, calibration())
    with pytest.raises(PrunekitError, match="plan={} is not allowed; give a PruningPlan"):
        compensate(small, model, {}, calibration())


def test_an_unknown_fit_is_refused():
    model, plan, small = cut(FAMILIES["llama_gqa"])
    with pytest.raises(PrunekitError, match="fit='biases' is unknown; allowed: 'weights', 'bias', 'both'"):
        compensate(small, model, plan, calibration(), fit="biases")


def test_nothing_changes_under_an_endless_ridge():
    model, plan, small = cut(FAMILIES["llama_gqa"])
    before = logits(small)
    compensate(small, model, plan, calibration(), ridge=1e15)
    torch.testing.assert_close(logits(small), before)


def test_hooks_go_and_training_mode_stays():
    model, plan, small = cut(FAMILIES["llama_mha"])
    small.train()
    compensate(small, model, plan, calibration())
    assert small.training and not model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*small.modules(), *model.modules()])


def test_half_precision_models_are_fitted_in_float32():
    family = FAMILIES["llama_mha"]
    model, groups = family.model(dtype=torch.bfloat16), family.groups()
    keep = random_units(family, groups, 0, share=HALF)
    plan = PruningPlan(
        keep, {n: groups[n].n_units for n in keep}, groups.n_parameters, groups.n_parameters, groups=groups
    )
    small = prune(model, plan)
    table = compensate(small, model, plan, calibration(), ridge=0.3)
    assert small.dtype == torch.bfloat16 and (table["error_after"] < table["error_before"]).all()


@pytest.mark.parametrize("ridge", [0, -1, float("nan"), float("inf"), "small", True])
def test_a_ridge_that_is_none_is_refused(ridge):
    model, plan, small = cut(FAMILIES["llama_mha"])
    with pytest.raises(PrunekitError, match=r"ridge=.* is not allowed; give a finite number above 0"):
        compensate(small, model, plan, calibration(), ridge=ridge)


def test_models_and_tokens_that_do_not_belong_are_refused():
    model, plan, small = cut(FAMILIES["llama_mha"])
    with pytest.raises(PrunekitError, match="token ids"):
        compensate(small, model, plan, calibration() + 100)
    other = PruningPlan.from_json(plan.to_json().replace("layers.1", "layers.7"))
    with pytest.raises(PrunekitError, match="the plan is of another dense model"):
        compensate(small, model, other, calibration())
    with pytest.raises(PrunekitError, match="leave out inplace=True"):
        prune(model, plan, inplace=True, compensate=calibration())
    with pytest.raises(PrunekitError, match="compensate='texts' is not allowed; give a dense tensor"):
        prune(model, plan, compensate="texts")


def test_a_plan_that_was_read_from_a_file_will_do():
    model, plan, small = cut(FAMILIES["llama_mha"])
    again = copy.deepcopy(small)
    table = compensate(small, model, plan, calibration(), ridge=1.0)
    read = compensate(again, model, PruningPlan.from_json(plan.to_json()), calibration(), ridge=1.0)
    assert read.equals(table) and logits(again).equal(logits(small))


def test_prune_compensates_what_a_layer_drop_leaves_too(monkeypatch):
    """As the drop first and then the rest; where nothing lost inputs, nothing is re-fitted."""
    monkeypatch.setattr(compensation, "mean_loss", settled)
    family = FAMILIES["llama_gqa"]
    model, groups = family.model(), family.groups()
    calib, channels = calibration(), "model.layers.1.mlp:ffn_channel"
    only_layer = plan_keeping(groups, {"model.layers.0:layer": []})
    both = plan_keeping(groups, {"model.layers.0:layer": [], channels: list(range(40))})
    dropped = prune(model, only_layer)
    assert torch.equal(logits(prune(model, only_layer, compensate=calib)), logits(dropped))
    rest = discover(dropped)
    plan = plan_keeping(rest, {channels.replace("1", "0"): list(range(40))})
    plan = replace(plan, groups=rest)
    expected = prune(dropped, plan, compensate=calib)
    assert torch.equal(logits(prune(model, both, compensate=calib)), logits(expected))
    assert not torch.equal(logits(prune(model, both)), logits(expected))


def test_whole_layers_are_refused_where_their_places_cannot_be_told():
    family = FAMILIES["llama_gqa"]
    model, groups = family.model(), family.groups()
    keep = {"model.layers.0:layer": [], "model.layers.1.mlp:ffn_channel": list(range(40))}
    plan = replace(plan_keeping(groups, keep), groups=groups)
    small = prune(model, plan)
    with pytest.raises(PrunekitError, match="take whole layers and blocks out first, then cut and compensate what is"):
        compensate(small, model, plan, calibration())


def test_tied_embeddings_are_left_alone():
    """Under a cut of the residual stream the head reads fewer inputs, but its weight is the embeddings' too."""
    family = FAMILIES["llama_tied"]
    model, groups = family.model(), family.groups()
    name = groups.of_kind("hidden")[0].name
    plan = replace(plan_keeping(groups, {name: list(range(48))}), groups=groups)
    small = prune(model, plan)
    embeddings = small.get_input_embeddings().weight.clone()
    table = compensate(small, model, plan, calibration(), ridge=0.3)
    assert "model.layers.0.mlp.gate_proj" in set(table["module"])
    assert torch.equal(small.get_input_embeddings().weight, embeddings)
    assert small.lm_head.weight is small.get_input_embeddings().weight


def test_what_goes_wrong_in_the_fit_is_said_once_and_outside_the_cut(monkeypatch):
    """The cut itself is made again where it fails on the trace that the plan carries; the fit is not."""
    family = FAMILIES["llama_gqa"]
    model = family.model()
    groups = discover(model)
    plan = replace(plan_keeping(groups, {"model.layers.1.mlp:ffn_channel": list(range(40))}), groups=groups)
    collected = []

    def fails(*_args, **_options):
        collected.append(gc.isenabled())
        raise PrunekitError("no fit")

    monkeypatch.setattr(surgery, "refit", fails)
    with pytest.raises(PrunekitError, match="no fit"):
        prune(model, plan, compensate=calibration())
    assert collected == [True]


def test_one_massive_token_does_not_decide_for_all():
    """The bias is that of the other tokens, though one reads ten thousand times as much as they."""
    torch.manual_seed(0)
    x = torch.randn(50, 6)
    scale = torch.ones(50, 1)
    scale[0] = 1e4
    z = [torch.cat([s * x, torch.ones(50, 1)], 1) * compensation.token_weights(s * x) for s in (scale, scale * 0 + 1)]
    weight, keep = torch.randn(6, 4).double(), torch.arange(3)
    massive, plain = (fit_sums(each.T @ each, weight, keep, None, True).constant()[-1] for each in z)
    assert float((massive - plain).norm()) < 0.5 * float(plain.norm())
    lacking = (scale * x)[:, 3:].double() @ weight[3:]
    assert float(lacking.mean(0).norm()) > 100 * float(plain.norm())  # the plain mean


def test_a_layer_that_reads_zeros_stays_as_it_is():
    model, _, _ = cut(FAMILIES["llama_mha"])
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    groups = discover(model)
    plan = replace(plan_keeping(groups, {"model.layers.0.mlp:ffn_channel": list(range(40))}), groups=groups)
    small = prune(model, plan)
    weight = small.model.layers[0].mlp.down_proj.weight.clone()
    compensate(small, model, plan, calibration())
    assert torch.equal(small.model.layers[0].mlp.down_proj.weight, weight)


class Reading(nn.Module):
    """Layers that read tokens late, once, twice, in part and never."""

    def __init__(self):
        super().__init__()
        for name in ("late", "once", "twice", "part", "never"):
            setattr(self, name, nn.Linear(4, 4))

    def forward(self, input_ids, use_cache):
        x = input_ids[..., None].float().expand(*input_ids.shape, 4)
        return self.late(self.twice(self.twice(self.once(input=x))) + self.part(x[:, :1]))


def test_only_layers_that_read_each_token_once_may_be_fitted():
    model = Reading()
    assert _run_once(model, ["late", "once", "twice", "part", "never"], calibration()) == ["once", "late"]
    assert not any(module._forward_pre_hooks for module in model.modules())
