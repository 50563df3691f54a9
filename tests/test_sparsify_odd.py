"""Models that are wired as few are: tied, overwriting, called twice, experts in lists, half precision."""

import copy
import warnings

import pytest
import torch
from families import FAMILIES
from test_importance import tiny_llama
from test_sparsify import calib, matrix_of
from torch import nn

from prunekit import LoRA, recover, sparsify
from prunekit.sparsity import keep_zeros, wanda
from prunekit.sparsity.matrices import find_matrices
from prunekit.sparsity.patterns import Pattern, allocate


def masks(model):
    return {row["matrix"]: matrix_of(model, row["matrix"]) == 0 for row in model.sparsity_report.rows}


def alike(a, b):
    first, second = masks(a), masks(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_matrices_tied_across_layers_stay_dense():
    model = tiny_llama()
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    sparse = sparsify(model, calib(), "wanda", 0.5)
    tied = "model.layers.0.mlp.up_proj.weight"
    assert "tied" in sparse.sparsity_report.left[tied]
    assert not any("up_proj" in row["matrix"] for row in sparse.sparsity_report.rows)
    assert torch.equal(sparse.model.layers[1].mlp.up_proj.weight, layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "sparsellm"])
def test_activations_that_are_overwritten_count_as_they_were_read(method):
    """An OPT whose ReLU works in place computes the same, so that the same goes."""
    plain = FAMILIES["opt"].build("eager").eval()
    inplace = copy.deepcopy(plain)
    for module in inplace.modules():
        if isinstance(getattr(module, "activation_fn", None), nn.Module):
            module.activation_fn = nn.ReLU(inplace=True)
    a, b = (sparsify(model, calib(), method, 0.5) for model in (plain, inplace))
    assert alike(a, b)
    errors = [model.sparsity_report.ffn_errors()["error"].tolist() for model in (a, b)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)


def test_what_is_read_before_it_changes_in_place_is_what_counts():
    model = tiny_llama()
    mlp = model.model.layers[0].mlp
    whole = copy.deepcopy(model)

    def overwriting(x):
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        x += 100
        return mlp.down_proj(mlp.act_fn(gate) * up)

    mlp.forward = lambda x: overwriting(x.clone())
    changed = sparsify(model, calib(), "wanda", 0.5, layers=[0], inplace=True)
    assert alike(changed, sparsify(whole, calib(), "wanda", 0.5, layers=[0]))


def test_a_matrix_that_is_used_twice_counts_all_that_it_reads():
    model = tiny_llama()
    mlp, seen = model.model.layers[0].mlp, []
    plain = type(mlp).forward

    def twice(x):
        seen.extend([x.detach().flatten(0, -2), 2 * x.detach().flatten(0, -2).roll(1, 1)])
        return plain(mlp, x) + mlp.up_proj(2 * x.roll(1, -1)).mean(-1, keepdim=True)

    mlp.forward = twice
    tokens = calib(4)
    dense = mlp.up_proj.weight.detach().clone(), mlp.gate_proj.weight.detach().clone()
    sparse = sparsify(model, tokens, "wanda", 0.5, layers=[0], inplace=True)
    seen.clear()
    mlp.up_proj.weight.data, mlp.gate_proj.weight.data = (w.clone() for w in dense)
    with torch.no_grad():
        model(tokens)
    squares = torch.stack([x.square().sum(0) for x in seen])
    expected_up, expected_gate = wanda(dense[0], squares.sum(0), 0.5), wanda(dense[1], squares[0], 0.5)
    sparse = sparsify(model, tokens, "wanda", 0.5, layers=[0], inplace=True)
    assert torch.equal(sparse.model.layers[0].mlp.up_proj.weight == 0, expected_up == 0)
    assert torch.equal(sparse.model.layers[0].mlp.gate_proj.weight == 0, expected_gate == 0)


class Chosen(nn.Module):
    """Experts in a list, of which each token chooses one by its sign."""

    def __init__(self, mlp, n):
        super().__init__()
        self.experts = nn.ModuleList([copy.deepcopy(mlp) for _ in range(n)])

    def forward(self, x):
        which = (x[..., 0] > 0).long()
        out = torch.zeros_like(x)
        for number in which.unique().tolist():
            out[which == number] = self.experts[number](x[which == number])
        return out


@pytest.mark.parametrize("given", [None, calib()])
def test_experts_in_a_list_that_no_token_reaches_get_zeros_and_are_said(given):
    model = tiny_llama()
    model.model.layers[0].mlp = Chosen(model.model.layers[0].mlp, 3)
    method = "magnitude" if given is None else "wanda"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        report = sparsify(model, given, method, 0.5).sparsity_report
    rows = [row for row in report.rows if ".experts.2." in row["matrix"]]
    assert len(rows) == 3 and all(abs(row["n_zeros"] - row["n_weights"] / 2) <= 1 for row in rows)
    assert given is None or any("no token reached" in str(warning.message) for warning in said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"), [("llama_gqa", torch.bfloat16), ("opt", torch.float16), ("mixtral", torch.bfloat16)]
)
def test_half_precision_finds_the_same_ffns(name, dtype):
    model = FAMILIES[name].build("eager").eval()
    report = sparsify(model, calib(), "sparsellm", 0.5).sparsity_report
    half = sparsify(model.to(dtype), calib(), "sparsellm", 0.5)
    assert [row["method"] for row in half.sparsity_report.rows] == [row["method"] for row in report.rows]
    errors = [r.ffn_errors().query("iteration == 0")["error"].tolist() for r in (report, half.sparsity_report)]
    assert errors[0] == pytest.approx(errors[1], rel=0.1)
    assert next(half.parameters()).dtype == dtype


def test_how_tokens_are_batched_does_not_move_the_budget():
    model, tokens = tiny_llama().eval(), calib(9)
    found = find_matrices(model, [f"model.layers.{i}" for i in range(len(model.model.layers))], tokens[:1])
    one, many = (
        {m.name: p.sparsity for m, p in allocate(model, batches, found.matrices, Pattern(0.6)).items()}
        for batches in (tokens.split(9), tokens.split(4))
    )
    assert one == pytest.approx(many, rel=1e-3)


def test_gradients_that_somebody_holds_stay():
    model = tiny_llama()
    model(calib(), labels=calib()).loss.backward()
    before = model.model.embed_tokens.weight.grad.clone()
    sparsify(model, calib(), "wanda", 0.5, allocation="global", inplace=True)
    assert torch.equal(model.model.embed_tokens.weight.grad, before)


def test_under_inference_mode_it_works_too():
    with torch.inference_mode():
        sparse = sparsify(tiny_llama_made_outside, calib(), "sparsellm", 0.5)
    assert abs(sparse.sparsity_report.sparsity - 0.5) < 0.01


tiny_llama_made_outside = tiny_llama()


def test_a_second_call_tells_of_the_first():
    once = sparsify(tiny_llama(), calib(), "wanda", 0.5, layers=[0])
    both = sparsify(once, calib(), "sparsegpt", "2:4", layers=[1])
    assert {(row["layer"], row["method"]) for row in both.sparsity_report.rows} == {(0, "wanda"), (1, "sparsegpt")}
    assert "wanda, target 50%" in " ".join(both.sparsity_report.remarks)


def test_an_interrupt_in_place_leaves_the_layers_that_are_done_and_no_report(monkeypatch):
    model = sparsify(tiny_llama(), calib(), "wanda", 0.25)
    from prunekit.sparsity import model_sparsity as driver

    solve, layers = driver.prune_layer, iter(range(1))

    def once(*args):
        if next(layers, None) is None:
            raise KeyboardInterrupt
        return solve(*args)

    monkeypatch.setattr(driver, "prune_layer", once)
    with pytest.raises(KeyboardInterrupt):
        sparsify(model, calib(), "wanda", 0.5, inplace=True)
    shares = [float((layer.mlp.up_proj.weight == 0).float().mean()) for layer in model.model.layers]
    assert shares[:2] == [0.5, 0.25] and not hasattr(model, "sparsity_report")


def test_zeros_without_a_report_are_asked_about():
    model = sparsify(tiny_llama(), calib(), "wanda", 0.5)
    del model.sparsity_report
    with pytest.warns(UserWarning, match="keep_zeros=True"):
        recover(model, LoRA(max_steps=1), calib())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        recover(model, LoRA(max_steps=1), calib(), keep_zeros=True)


def test_gradients_from_before_do_not_start_momentum():
    model = sparsify(tiny_llama(), calib(), "wanda", 0.5)
    model(calib(), labels=calib()).loss.backward()
    weight = model.model.layers[0].mlp.up_proj.weight
    zeros = weight == 0
    with keep_zeros(model):
        torch.optim.AdamW(model.parameters(), lr=0.1).step()
        assert bool((weight[zeros] == 0).all()) and not torch.equal(weight == 0, torch.ones_like(zeros))
