"""Zeros that stay zero while LoRA, full fine-tuning or a loop of one's own trains what is beside them."""

import copy
import json
from contextlib import nullcontext
from functools import cache

import pytest
import torch
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_importance import tiny_llama
from test_recovery import QUICK, counting, loss_of, same, tiny_gpt2, weights_of
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

import prunekit as pk
from prunekit import FullTuning, LoRA, PrunekitError, recover, sparsify
from prunekit.recovery import Mixture, RecoveryLog, prune_progressively, recover_on_mixture
from prunekit.recovery.lora import attach, detach
from prunekit.sparsity import keep_zeros, masked_adapters
from prunekit.sparsity.zero_masks import TRAINED, current_report

LONG = LoRA(r=4, max_steps=30, batch_size=8, learning_rate=1e-2)
FULL = FullTuning(max_steps=30, batch_size=8, learning_rate=3e-3)
BUILDS = {
    "llama": tiny_llama,
    "conv1d": tiny_gpt2,
    "experts": lambda: FAMILIES["mixtral"].model(dtype=torch.float32),
}


def sparse(name="llama", how=0.5):
    """A model with zeros; of magnitude, which needs no text."""
    return sparsify(BUILDS[name](), None, "magnitude", how)


def told(model):
    """Name → matrix as it is stored, for each of the report; of stacked experts, as in `w[3]`, one slice each."""
    tensors, found = dict(model.named_parameters()), {}
    for row in model.sparsity_report.rows:
        name, _, expert = row["matrix"].rstrip("]").partition("[")
        found[row["matrix"]] = tensors[name][int(expert)] if expert else tensors[name]
    return found


def zeros_of(model):
    return {name: weight.detach() == 0 for name, weight in told(model).items()}


def bits(tensor):
    return tensor.detach().view(torch.int32)


def keeps(model, zeros):
    """Whether all of these are zero, to the bit."""
    return all(not bits(weight)[zeros[name]].any() for name, weight in told(model).items()) and len(zeros) > 0


def train_log(*_):
    return RecoveryLog((1.0,), (1.0,), 1, 1, "")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how"), [("llama", 0.5), ("conv1d", "2:4"), ("experts", 0.5)])
@pytest.mark.parametrize("method", [LONG, FULL], ids=["lora", "full"])
def test_zeros_survive_recovery_and_the_rest_learns(method, name, how):
    model, data = sparse(name, how), counting() % 48
    before, zeros = weights_of(model), zeros_of(model)
    assert all(0 < mask.float().mean() < 1 for mask in zeros.values())
    recovered = recover(model, method, data)
    assert keeps(recovered, zeros) and same(model, before)
    assert loss_of(recovered, data) < 0.9 * loss_of(model, data)
    trained = [name for name, p in recovered.named_parameters() if not p.equal(before[name])]
    assert len(trained) >= (8 if method is LONG else len(before) - 1)
    assert recovered.sparsity_report.rows == model.sparsity_report.rows
    assert recovered.sparsity_report.remarks == (TRAINED,)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "conv1d"])
@pytest.mark.parametrize("method", [QUICK, FullTuning(max_steps=4, batch_size=4)], ids=["lora", "full"])
def test_without_being_kept_the_zeros_die_and_the_report_says_so(method, name):
    model = sparse(name)
    recovered = recover(model, method, counting(), keep_zeros=False)
    assert all((weight == 0).float().mean() < 0.1 for weight in told(recovered).values())
    report = recovered.sparsity_report
    assert report.sparsity < 0.1 and any("were filled after sparsification" in remark for remark in report.remarks)
    assert {row["matrix"]: row["n_zeros"] for row in report.rows} == {
        name: int((weight == 0).sum()) for name, weight in told(recovered).items()
    }


def test_zeros_go_by_the_report_unless_it_is_said():
    model = sparse()
    zeros = zeros_of(model)
    report = model.sparsity_report
    del model.sparsity_report
    dead, kept = (recover(model, QUICK, counting(), keep_zeros=say) for say in (None, True))
    assert not hasattr(dead, "sparsity_report")
    dead.sparsity_report = kept.sparsity_report = report
    assert keeps(kept, zeros) and not keeps(dead, zeros)
    for wrong in ("yes", 1, 0.5):
        with pytest.raises(PrunekitError, match="keep_zeros=.* give True or False, or None"):
            recover(model, QUICK, counting(), keep_zeros=wrong)


def test_a_dense_model_is_recovered_as_ever():
    once, again = (recover(tiny_llama(), QUICK, counting(), keep_zeros=say) for say in (False, True))
    assert same(again, weights_of(once)) and once.recovery_log == again.recovery_log


@pytest.mark.parametrize(("name", "how"), [("llama", 0.5), ("conv1d", "2:4"), ("experts", 0.5)])
def test_what_is_trained_is_what_is_merged(name, how, monkeypatch):
    seen, data = {}, counting() % 48

    def look(adapted, windows, method, **more):
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_B" in parameter_name:
                nn.init.normal_(parameter, std=0.05)
        with torch.no_grad():
            seen["masked"] = adapted.eval()(input_ids=windows.tokens[:4]).logits
        return train_log()

    monkeypatch.setattr("prunekit.recovery.fine_tuning.train", look)
    model = sparse(name, how)
    zeros, base = zeros_of(model), model(input_ids=data[:4]).logits
    merged = recover(model, QUICK, data)
    torch.testing.assert_close(merged(input_ids=data[:4]).logits, seen["masked"], rtol=1e-5, atol=1e-5)
    assert keeps(merged, zeros)
    recover(model, QUICK, data, keep_zeros=False)
    assert not torch.allclose(base, merged(input_ids=data[:4]).logits, atol=1e-2)


@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)), share=st.floats(0, 1), seed=st.integers(0, 99),
    dropout=st.sampled_from([0.0, 0.5]), transposed=st.booleans(),
)  # fmt: skip
def test_a_masked_layer_computes_its_formula_and_trains_nothing_else(shape, share, seed, dropout, transposed):
    torch.manual_seed(seed)
    n_out, n_in = shape
    base = Conv1D(n_out, n_in) if transposed else nn.Linear(n_in, n_out)
    with torch.no_grad():
        base.weight.normal_().masked_fill_(torch.rand(base.weight.shape) < share, 0)
    mask = (base.weight != 0).T if transposed else base.weight != 0  # (out, in)
    config = LoraConfig(r=2, lora_alpha=3, lora_dropout=dropout, target_modules=["0"], fan_in_fan_out=transposed)
    adapted = get_peft_model(nn.Sequential(base), config)
    layer = adapted.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(b)
    x = torch.randn(3, n_in)
    with masked_adapters(adapted):
        torch.manual_seed(seed)
        y = layer(x)
        torch.manual_seed(seed)
        update = 1.5 * (b @ a) * mask
        expected = base(x) + functional.linear(functional.dropout(x, dropout, training=True), update)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        gradients = torch.autograd.grad(y.square().sum(), (a, b))
        for found, right in zip(gradients, torch.autograd.grad(expected.square().sum(), (a, b)), strict=True):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
        detach(adapted, merge=True)
    stored = base.weight.T if transposed else base.weight
    assert torch.equal(stored == 0, ~mask)


def test_masks_go_when_they_are_closed():
    adapted, data = attach(sparse(), QUICK).eval(), counting()[:4]
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    before = adapted(input_ids=data).logits
    with pytest.raises(KeyError), masked_adapters(adapted):
        within = adapted(input_ids=data).logits
        with adapted.disable_adapter():
            off = adapted(input_ids=data).logits
        raise KeyError
    assert torch.equal(adapted(input_ids=data).logits, before) and not torch.allclose(within, before, atol=1e-2)
    assert torch.equal(off, sparse()(input_ids=data).logits)
    assert not any({"forward", "get_delta_weight"} & set(vars(module)) for module in adapted.modules())


ODD = {
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
    "embedding": {"target_modules": ["embed_tokens"]},
    "stacked": {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    "beside": {"modules_to_save": ["q_proj"]},
}


@pytest.mark.parametrize("kind", ODD)
def test_adapters_that_are_not_understood_are_refused_by_name(kind):
    model = sparse("experts" if kind == "stacked" else "llama")
    adapted = get_peft_model(model, LoraConfig(**{"target_modules": ["v_proj"], **ODD[kind]}))
    match = "q_proj.*trained itself" if kind == "beside" else r"layers.*has .*(lora|a ).*one plain LoRA adapter"
    match = r"embed_tokens has a Embedding" if kind == "embedding" else match
    with pytest.raises(PrunekitError, match=match), masked_adapters(adapted):
        pass
    assert not any("get_delta_weight" in vars(module) for module in adapted.modules())


def test_adapters_in_a_state_that_is_not_understood_are_refused():
    adapted = attach(sparse(), QUICK)
    adapted.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(PrunekitError, match=r"q_proj has adapters \['default', 'other'\]"), masked_adapters(adapted):
        pass
    adapted.delete_adapter("other")
    adapted.set_adapter("default")
    with masked_adapters(adapted):
        adapted.add_adapter("late", LoraConfig(target_modules=["q_proj"]))
        adapted.set_adapter("late")
        with pytest.raises(PrunekitError, match="another adapter was requested"):
            adapted(input_ids=counting()[:1])
    merged = attach(sparse(), QUICK)
    merged.merge_adapter()
    with pytest.raises(PrunekitError, match="not merged"), masked_adapters(merged):
        pass
    with pytest.raises(PrunekitError, match="carries no LoRA"), masked_adapters(sparse()):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("method", [QUICK, FullTuning(max_steps=4, batch_size=4)], ids=["lora", "full"])
def test_flags_gradients_and_modes_are_as_before(method):
    model = sparse().train()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones(16)
    recovered = recover(model, method, counting())
    assert model.training and not recovered.training and model.model.norm.weight.grad.eq(1).all()
    for one in (model, recovered):
        assert [n for n, p in one.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
        assert not any(p._backward_hooks for p in one.parameters())
    assert all(p.grad is None for p in recovered.parameters())
    assert not any("lora" in name for name, _ in recovered.named_modules())
    again = recover(model, method, counting())
    assert same(again, weights_of(recovered)) and again.recovery_log == recovered.recovery_log


def test_an_interrupt_leaves_the_sparse_model_as_it_was(monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    model = sparse()
    before = weights_of(model)
    monkeypatch.setattr("prunekit.recovery.fine_tuning.train", interrupt)
    for method in (QUICK, FullTuning()):
        with pytest.raises(KeyboardInterrupt):
            recover(model, method, counting(), inplace=True)
        assert same(model, before) and all(p.requires_grad for p in model.parameters())


def test_half_precision_keeps_zeros_too():
    model = sparsify(tiny_llama(dtype=torch.bfloat16), None, "magnitude", "2:4")
    zeros = zeros_of(model)
    recovered = recover(model, LONG, counting())
    assert all(not weight[zeros[name]].any() for name, weight in told(recovered).items())
    assert loss_of(recovered, counting()) < 0.9 * loss_of(model, counting())


def test_full_tuning_says_what_it_did(tmp_path):
    recovered = recover(sparse(), FullTuning(max_steps=4, batch_size=4), counting(), output_dir=tmp_path / "out")
    log = recovered.recovery_log
    assert log.trainable == sum(p.numel() for p in recovered.parameters()) and len(log.losses) == 4
    assert repr(log).startswith("RecoveryLog(4 steps") and "FullTuning(learning_rate=0.0001" in repr(log)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["recovery_log.json"]
    assert RecoveryLog.from_dict(json.loads((tmp_path / "out" / "recovery_log.json").read_text())) == log
    assert log.method == repr(FullTuning(max_steps=4, batch_size=4))


def test_full_tuning_lowers_the_loss_of_a_dense_model_with_weight_decay_or_without():
    decayed, plain = (recover(tiny_llama(), FullTuning(max_steps=30, batch_size=8, learning_rate=3e-3, weight_decay=w),
                              counting()) for w in (3.0, 0.0))  # fmt: skip
    assert loss_of(plain, counting()) < 0.8 * loss_of(tiny_llama(), counting())
    norms = [sum(p.norm().item() for p in model.parameters()) for model in (decayed, plain)]
    assert norms[0] < 0.95 * norms[1]


@pytest.mark.parametrize("bad", [{"learning_rate": 0}, {"weight_decay": -1}, {"epochs": 0}, {"seq_len": 1}], ids=str)
def test_settings_of_full_tuning_that_cannot_be_are_refused(bad):
    name = next(iter(bad))
    with pytest.raises(PrunekitError, match=rf"FullTuning: {name}=.* is not allowed; give an? "):
        FullTuning(**bad)


def test_weights_that_cannot_be_trained_fully_are_refused():
    model = tiny_llama(dtype=torch.float16)
    with pytest.raises(PrunekitError, match=r"embed_tokens.weight is torch.float16.*dtype='float32', or give a LoRA"):
        recover(model, FullTuning(), counting())
    assert all(p.requires_grad for p in model.parameters())
    with pytest.warns(UserWarning, match="the weights are bfloat16"):
        recover(tiny_llama(dtype=torch.bfloat16), FullTuning(max_steps=1), counting())


@pytest.mark.slow
def test_mixtures_take_full_tuning_and_keep_zeros_and_progressive_pruning_refuses_it():
    dense, model = tiny_llama(), sparse()
    zeros, sources = zeros_of(model), {"ones": counting(24), "threes": counting(24, step=3)}
    method = FullTuning(max_steps=4, batch_size=4)
    recovered = recover_on_mixture(model, dense, sources, method, Mixture(n_rounds=2))
    assert keeps(recovered, zeros) and "FullTuning" in recovered.recovery_log.method
    assert recovered.sparsity_report.remarks == (TRAINED,)
    filled = recover_on_mixture(model, dense, sources, method, Mixture(n_rounds=2), keep_zeros=False)
    assert not keeps(filled, zeros)
    with pytest.raises(PrunekitError, match="FullTuning. is not allowed; give LoRA"):
        prune_progressively(model, 0.2, counting(), FullTuning())


OPTIMIZERS = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=1e-2),
}


def steps(model, optimizer, n=5):
    for batch in counting()[: 4 * n].split(4):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("masked", [True, False])
def test_ones_own_loop_keeps_zeros_all_the_way(make, masked):
    model = sparse()
    zeros = zeros_of(model)
    with keep_zeros(model) if masked else nullcontext():
        optimizer = make(model.parameters())
        for _ in range(3):
            steps(model, optimizer, 1)
            assert keeps(model, zeros) == masked
    assert keeps(model, zeros) == masked


def test_an_optimiser_with_old_momentum_moves_zeros_only_until_the_end():
    model = tiny_llama()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    steps(model, optimizer)
    sparsify(model, None, "magnitude", 0.5, inplace=True)
    zeros = zeros_of(model)
    with keep_zeros(model):
        steps(model, optimizer, 1)
        assert not keeps(model, zeros)
    assert keeps(model, zeros)


def test_masks_of_gradients_go_when_they_are_closed_even_by_an_error():
    model = sparse()
    zeros, frozen = zeros_of(model), model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(KeyError), keep_zeros(model):
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        frozen.requires_grad_(True)  # thawed while it is open
        model(input_ids=counting()[:4], labels=counting()[:4]).loss.backward()
        weights = told(model)
        assert all(not weight.grad[zeros[name]].any() and weight.grad.any() for name, weight in weights.items())
        with torch.no_grad():
            frozen.fill_(1)
        raise KeyError
    assert keeps(model, zeros) and frozen.any()
    model.zero_grad()
    model(input_ids=counting()[:4], labels=counting()[:4]).loss.backward()
    assert all(weight.grad[zeros[name]].any() for name, weight in told(model).items())


def test_a_model_with_adapters_is_told_of_the_other_way():
    adapted = attach(tiny_llama(), QUICK)
    with pytest.raises(PrunekitError, match="open masked_adapters"), keep_zeros(adapted):
        pass


@given(seed=st.integers(0, 999), share=st.floats(0, 1), momentum=st.floats(0, 0.99), decay=st.floats(0, 1))
def test_the_zeros_of_any_matrix_stay_and_only_those(seed, share, momentum, decay):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    with torch.no_grad():
        model[0].weight.masked_fill_(torch.rand(7, 5) < share, 0)
        model[0].bias.zero_()  # a vector, which is trained
    zeros, x = model[0].weight == 0, torch.randn(16, 5)
    with keep_zeros(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=momentum, weight_decay=decay)
        for _ in range(3):
            model(x).square().sum().backward()
            optimizer.step()
    assert torch.equal(model[0].weight == 0, zeros) and model[0].bias.all()


once = cache(sparse)


@given(filled=st.lists(st.tuples(st.integers(0, 13), st.integers(0, 95)), max_size=20))
def test_a_report_is_counted_again(filled):
    model = copy.deepcopy(once())
    report, weights = model.sparsity_report, list(told(model).values())
    with torch.no_grad():
        for number, place in filled:
            weights[number].view(-1)[place % weights[number].numel()] = 1
    found = current_report(model)
    assert [row["n_zeros"] for row in found.rows] == [int((weight == 0).sum()) for weight in weights]
    lost = sum(row["n_zeros"] for row in report.rows) - sum(row["n_zeros"] for row in found.rows)
    assert found == report if lost == 0 else found.remarks[0].startswith(f"{lost} zeros of ")
    assert 0 <= lost <= len(filled)


def test_a_report_of_other_shapes_is_dropped():
    model = sparse()
    groups = pk.discover(model)
    keep = {g.name: list(range(g.n_units // 2)) for g in groups.of_kind("ffn_channel")}
    plan = pk.PruningPlan(keep, {name: groups[name].n_units for name in keep}, groups.n_parameters, groups.n_parameters)
    small = pk.prune(model, plan)
    assert current_report(small) is None and current_report(model) == model.sparsity_report
    small.sparsity_report = model.sparsity_report  # as a copied attribute would be
    zeros = {name: p == 0 for name, p in small.named_parameters() if "proj" in name}
    recovered = recover(small, QUICK, counting())
    assert not hasattr(recovered, "sparsity_report")
    assert all(not p[zeros[name]].any() for name, p in recovered.named_parameters() if name in zeros)
    model.sparsity_report = "a report"
    with pytest.raises(PrunekitError, match="sparsity_report is a str"):
        current_report(model)


def test_progressive_pruning_leaves_a_report_that_is_true():
    model = sparse()
    done = prune_progressively(model, 0.1, counting(), LoRA(max_steps=12, batch_size=4))
    assert current_report(done.model) == done.model.sparsity_report
    assert done.model.sparsity_report.sparsity < 0.3 and TRAINED in done.model.sparsity_report.remarks
