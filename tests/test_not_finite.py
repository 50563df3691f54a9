"""Results that are not finite are refused, by name; what was refused leaves the model as it was."""

import pytest
import torch
from evaluation_helpers import byte_tokenizer, llama
from test_importance import tiny_llama
from test_recovery import counting
from torch import nn

import prunekit as pk
from prunekit import PrunekitError
from prunekit.importance.input_statistics import computing_wide

WILD = {"max_steps": 1, "batch_size": 4, "learning_rate": 1e30, "warmup": 0}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "measure"), [(pk.LoRA(r=4, **WILD), True), (pk.FullTuning(**WILD), False)])
def test_a_last_step_that_breaks_the_model_is_refused(method, measure, tmp_path):
    """The loss that the Trainer logs is finite: it is of the step before."""
    model = tiny_llama()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(PrunekitError, match=r"not finite.*learning_rate=1e\+30 is too high"):
        pk.recover(model, method, counting(), measure=measure, output_dir=tmp_path / "out")
    assert all(torch.equal(p, old) and p.requires_grad for p, old in zip(model.parameters(), before, strict=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["plain", "padded"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_exported(layout, value, tmp_path):
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = value
    with pytest.raises(PrunekitError, match=r"layers\.1\.mlp\.up_proj\.weight has NaN or infinite weights"):
        pk.export(model, tmp_path / "out", layout=layout)
    assert not list(tmp_path.iterdir())


def test_a_model_is_no_cut_of_itself():
    model = llama().half()
    groups = pk.discover(model)
    plan = pk.plan(groups, pk.score(model, groups, pk.Magnitude()), 0.2)
    calib = pk.calibration_set("the sea. " * 60, byte_tokenizer(), n_samples=4, seq_len=16)
    with pytest.raises(PrunekitError, match="small is model itself; give what prune"):
        pk.compensate(model, model, plan, calib)
    assert all(p.dtype == torch.float16 and p.requires_grad for p in model.parameters())


def test_widened_weights_come_back_where_the_context_is_entered_twice():
    model = llama().half()
    before = list(model.parameters())
    with computing_wide(model), computing_wide(model), torch.no_grad():
        model(input_ids=torch.arange(8)[None])
    assert all(one is other for one, other in zip(model.parameters(), before, strict=True))


def test_an_up_projection_of_two_layers_is_pruned_matrix_by_matrix():
    """The second of them reads what the first made, not what the FFN reads."""
    model = llama()
    model.model.layers[0].mlp.up_proj = nn.Sequential(nn.Linear(32, 8, bias=False), nn.Linear(8, 48, bias=False))
    with pytest.warns(UserWarning, match="have no form that SparseLLM supports"):
        sparse = pk.sparsify(model, torch.arange(64).view(4, 16), "sparsellm", 0.5)
    methods = {row["matrix"]: row["method"] for row in sparse.sparsity_report.rows}
    assert methods["model.layers.0.mlp.up_proj.1.weight"] == "sparsegpt"
    assert methods["model.layers.1.mlp.up_proj.weight"] == "sparsellm"
    assert abs(sparse.sparsity_report.sparsity - 0.5) < 0.01
