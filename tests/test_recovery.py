"""LoRA recovery: what it wins back, what it leaves alone, and what it refuses."""

import copy
import dataclasses
import math
import random

import datasets
import numpy as np
import pytest
import torch
from test_calibration import tokenizer, words  # noqa: F401
from test_importance import tiny_llama
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from prunekit.errors import PrunekitError
from prunekit.recovery import Distillation, FullTuning, LoRA, RecoveryLog, recover
from prunekit.recovery.data import training_windows
from prunekit.recovery.lora import attach, find_targets

QUICK = LoRA(r=4, alpha=8, max_steps=4, batch_size=4)
ROUGH = {"initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0}
SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def counting(n=32, length=12, step=1):
    """Rows that count upwards modulo 50: learnable in a few dozen steps."""
    return (torch.arange(n)[:, None] * 7 + torch.arange(length) * step) % 50


def narrow(linear, *, rows=None, columns=None):
    """A smaller Linear with the rows and columns that stay."""
    weight = linear.weight.detach()
    weight = weight if rows is None else weight[rows]
    weight = weight if columns is None else weight[:, columns]
    smaller = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    smaller.weight = nn.Parameter(weight.clone())
    return smaller


def uneven_llama():
    """A LLaMA whose second layer has half the heads and a third of the FFN channels of the first."""
    model = tiny_llama(n_heads=4, n_kv=2)
    layer = model.model.layers[1]
    attn, mlp, heads, keep = layer.self_attn, layer.mlp, torch.arange(8), torch.arange(4)
    attn.q_proj, attn.o_proj = narrow(attn.q_proj, rows=heads), narrow(attn.o_proj, columns=heads)
    attn.k_proj, attn.v_proj = narrow(attn.k_proj, rows=heads[:4]), narrow(attn.v_proj, rows=heads[:4])
    mlp.gate_proj, mlp.up_proj = narrow(mlp.gate_proj, rows=keep), narrow(mlp.up_proj, rows=keep)
    mlp.down_proj = narrow(mlp.down_proj, columns=keep)
    model.config.prunekit = {"widths": [1, 2]}
    return model


def tiny_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32, **ROUGH)).eval()


def tiny_bloom():
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=50, **ROUGH)).eval()


def loss_of(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, labels=tokens).loss.item()


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(model, before):
    return all(p.equal(before[name]) for name, p in model.named_parameters()) and len(before) > 0


@pytest.mark.parametrize("build", [uneven_llama, tiny_gpt2, tiny_bloom], ids=["uneven", "conv1d-tied", "fused-tied"])
def test_recovery_lowers_the_loss_and_keeps_the_shapes(build):
    model, data = build(), counting()
    before, config = weights_of(model), copy.deepcopy(model.config.to_dict())
    recovered = recover(model, LoRA(max_steps=30, batch_size=8, learning_rate=1e-2), data)
    assert loss_of(recovered, data) < 0.8 * loss_of(model, data)
    assert recovered is not model and same(model, before) and not hasattr(model, "recovery_log")
    after = weights_of(recovered)
    assert {n: p.shape for n, p in after.items()} == {n: p.shape for n, p in before.items()}
    assert recovered.config.to_dict() == config and type(recovered) is type(model)
    assert not recovered.training and recovered.config.use_cache == model.config.use_cache
    assert recovered.get_output_embeddings().weight.equal(model.get_output_embeddings().weight)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (recovered.get_output_embeddings().weight is recovered.get_input_embeddings().weight)


def test_merging_gives_the_output_of_the_adapted_model(monkeypatch):
    seen = {}

    def keep_output(adapted, windows, method, **more):
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
        with torch.no_grad():
            seen["logits"] = adapted.eval()(input_ids=windows.tokens[:4]).logits
        return RecoveryLog((1.0,), (1.0,), 1, 1, "")

    monkeypatch.setattr("prunekit.recovery.fine_tuning.train", keep_output)
    for build in (uneven_llama, tiny_gpt2, tiny_bloom):
        model = build()
        merged = recover(model, QUICK, counting())
        logits = merged(input_ids=counting()[:4]).logits
        torch.testing.assert_close(logits, seen["logits"], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits, model(input_ids=counting()[:4]).logits, atol=1e-2)


def test_only_the_projections_change_and_the_configuration_stays():
    model = uneven_llama()
    before = weights_of(model)
    recovered = recover(model, QUICK, counting())
    changed = {n for n, p in recovered.named_parameters() if not p.equal(before[n])}
    assert {n.split(".")[-2] for n in changed} == SEVEN and len(changed) == 14
    assert recovered.config.prunekit == {"widths": [1, 2]}
    assert not any("lora" in name for name, _ in recovered.named_modules()) and not hasattr(recovered, "peft_config")


def test_flags_modes_gradients_and_dtype_are_as_before():
    model = tiny_llama(dtype=torch.bfloat16).train()
    model.lm_head.weight.requires_grad_(False)
    recovered = recover(model, QUICK, counting())
    assert model.training and not recovered.training
    for one in (model, recovered):
        flags = {n: p.requires_grad for n, p in one.named_parameters()}
        assert not flags.pop("lm_head.weight") and all(flags.values())
        assert all(p.dtype == torch.bfloat16 and p.grad is None for p in one.parameters())
    assert not recovered.model.layers[0].mlp.up_proj.weight.equal(model.model.layers[0].mlp.up_proj.weight)


def test_inplace_changes_the_model_itself():
    model = tiny_llama()
    before = weights_of(model)
    assert recover(model, QUICK, counting(), inplace=True) is model
    assert not same(model, before) and all(p.requires_grad for p in model.parameters())


def test_a_seed_gives_the_same_weights_and_disturbs_no_one_elses_numbers():
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = torch.rand(3), np.random.rand(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    first = recover(tiny_llama_kept(), QUICK, counting())
    assert torch.rand(3).equal(expected[0]) and np.random.rand() == expected[1] and random.random() == expected[2]
    again = recover(tiny_llama_kept(), QUICK, counting())
    other = recover(tiny_llama_kept(), dataclasses.replace(QUICK, seed=1), counting())
    assert same(again, weights_of(first)) and first.recovery_log == again.recovery_log
    assert not same(other, weights_of(first))


def tiny_llama_kept():
    """A tiny LLaMA that leaves the caller's random numbers alone."""
    with torch.random.fork_rng():
        return tiny_llama()


def test_the_loss_curve_is_kept(tmp_path):
    log = recover(tiny_llama(), QUICK, counting()).recovery_log
    table = log.table()
    assert list(table.columns) == ["step", "loss", "learning_rate"] and list(table.step) == [1, 2, 3, 4]
    assert all(map(math.isfinite, log.losses)) and log.n_tokens == 32 * 12
    assert repr(log).startswith("RecoveryLog(4 steps, loss ") and "LoRA(r=4" in repr(log)
    # q, o: (16 + 16)·4; k, v: (16 + 8)·4; gate, up, down: (16 + 12)·4; two layers
    assert log.trainable == 2 * 4 * (2 * 32 + 2 * 24 + 3 * 28)
    path = log.save(tmp_path / "log.json")
    assert RecoveryLog.load(path) == log
    for text in ("{}", "no json", "[]"):
        path.write_text(text)
        with pytest.raises(PrunekitError, match="no recovery log in|is not JSON") as told:
            RecoveryLog.load(path)
        assert str(told.value).count("RecoveryLog.save wrote") == 1
    with pytest.raises(PrunekitError, match="No such file.*give the path of a file that RecoveryLog.save wrote"):
        RecoveryLog.load(tmp_path / "nothing.json")


@pytest.mark.slow
@pytest.mark.parametrize("accumulated", [8, 2])
def test_losses_are_nats_a_predicted_token(monkeypatch, accumulated):
    monkeypatch.setattr("prunekit.recovery.training._ON_DEVICE", accumulated)
    model, data = tiny_llama(), counting(8)
    log = recover(model, LoRA(max_steps=1, batch_size=8, dropout=0.0), data).recovery_log
    assert log.losses[0] == pytest.approx(loss_of(model, data), rel=1e-4)


def test_output_dir_holds_adapter_and_curve_and_nothing_lands_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recover(tiny_llama(), QUICK, counting())
    assert list(tmp_path.iterdir()) == []
    recover(tiny_llama(), QUICK, counting(), output_dir="deep/out")
    found = {p.name for p in (tmp_path / "deep" / "out").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "recovery_log.json"} <= found
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in found)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]
    with pytest.raises(PrunekitError, match="'deep/out' exists already"):
        recover(tiny_llama(), QUICK, counting(), output_dir="deep/out")


def test_data_comes_in_every_form(tokenizer, tmp_path):  # noqa: F811
    text = words(1, 40)
    windows = training_windows(text, tokenizer, 8).tokens
    text_alone = torch.arange(1, 36).view(5, 7)
    assert windows.equal(torch.cat([torch.zeros(5, 1, dtype=torch.long), text_alone], 1))
    (tmp_path / "a.txt").write_text(text)
    rows = datasets.Dataset.from_dict({"input_ids": [[0, *range(1, 20)], list(range(20, 40))]})
    column = datasets.Dataset.from_dict({"text": [text]})
    for data in (tmp_path / "a.txt", [text], column, rows):
        assert training_windows(data, tokenizer, 8).tokens.equal(windows)
    assert training_windows(windows, None, 3).tokens is windows
    assert training_windows(rows, None, 8).tokens.equal(torch.arange(40).view(5, 8))  # without a tokenizer as they are
    model = tiny_llama()
    first = recover(model, QUICK, text, tokenizer=tokenizer, seq_len=8)
    assert first.recovery_log.n_tokens == 40
    assert same(recover(model, QUICK, windows), weights_of(first))
    by_method = recover(model, dataclasses.replace(QUICK, seq_len=10), text, tokenizer=tokenizer)
    assert by_method.recovery_log.n_tokens == 40


def test_data_that_will_not_do_is_refused(tokenizer):  # noqa: F811
    model = tiny_llama()
    with pytest.raises(PrunekitError, match="is text: give tokenizer="):
        recover(model, QUICK, "w1 w2 w3")
    with pytest.raises(PrunekitError, match="holds no text"):
        recover(model, QUICK, "  ", tokenizer=tokenizer)
    with pytest.raises(PrunekitError, match="has 4 tokens with BOS and one window needs seq_len=128"):
        recover(model, QUICK, "w1 w2 w3", tokenizer=tokenizer)
    with pytest.raises(PrunekitError, match="num_rows: 0 .* holds no text"):
        recover(model, QUICK, datasets.Dataset.from_dict({"input_ids": []}))
    with pytest.raises(PrunekitError, match="at least 1 sample of 2 tokens"):
        recover(model, QUICK, counting()[:0])
    with pytest.raises(PrunekitError, match="the model knows 0 to 49"):
        recover(model, QUICK, counting() + 50)
    with pytest.raises(PrunekitError, match="seq_len=1 is not allowed"):
        recover(model, QUICK, words(1, 40), tokenizer=tokenizer, seq_len=1)


@pytest.mark.parametrize("method", ["lora", None, LoRA])
def test_an_unknown_method_is_refused(method):
    with pytest.raises(PrunekitError, match=r"is not allowed; give LoRA"):
        recover(tiny_llama(), method, counting())


@pytest.mark.parametrize(
    "bad",
    [
        {"r": 0}, {"alpha": 0}, {"dropout": 1.0}, {"learning_rate": 0.0}, {"learning_rate": math.nan},
        {"batch_size": 0}, {"epochs": 0}, {"epochs": math.inf}, {"max_steps": 0}, {"warmup": -1}, {"seq_len": 1},
        {"targets": ()}, {"targets": "q_proj"},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(bad):
    with pytest.raises(PrunekitError, match=rf"LoRA: {next(iter(bad))}=.* is not allowed"):
        LoRA(**bad)


def test_the_papers_settings_have_their_name():
    paper = LoRA.paper()
    assert (paper.r, paper.alpha, paper.dropout) == (8, 16, 0.05)
    assert (paper.learning_rate, paper.batch_size, paper.epochs, paper.warmup, paper.seq_len) == (1e-4, 64, 2, 100, 256)


def test_the_batch_follows_the_data():
    assert [LoRA().windows_a_step(n) for n in (1, 31, 64, 1000)] == [1, 1, 2, 8]
    assert LoRA.paper().windows_a_step(1000) == 64 and LoRA.paper().windows_a_step(10) == 10


@pytest.mark.slow
def test_a_batch_too_large_for_memory_is_accumulated(monkeypatch):
    method = LoRA(max_steps=2, batch_size=8, dropout=0.0)
    at_once = recover(tiny_llama(), method, counting())
    monkeypatch.setattr("prunekit.recovery.training._ON_DEVICE", 2)
    in_parts = recover(tiny_llama(), method, counting())
    assert len(in_parts.recovery_log.losses) == 2
    for (name, p), q in zip(at_once.named_parameters(), in_parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=name)


def test_epochs_warm_up_and_steps_are_what_was_asked_for():
    log = recover(tiny_llama(), LoRA(epochs=2, batch_size=8, warmup=4, learning_rate=1e-3), counting()).recovery_log
    assert len(log.losses) == 8
    assert max(log.learning_rates) == pytest.approx(1e-3) and log.learning_rates[4] == max(log.learning_rates)
    assert log.learning_rates[0] < log.learning_rates[3] and log.learning_rates[-1] < 5e-4


def test_targets_are_found_by_type_and_named_by_their_ends():
    assert {name.rpartition(".")[2] for name in find_targets(tiny_llama())} == SEVEN
    assert {n.rpartition(".")[2] for n in find_targets(tiny_gpt2())} == {"c_attn", "c_proj", "c_fc"}
    assert len(find_targets(tiny_bloom())) == 8
    assert find_targets(tiny_llama(), ("0.self_attn.q_proj",)) == ["model.layers.0.self_attn.q_proj"]
    before = weights_of(tiny_llama())
    recovered = recover(tiny_llama(), dataclasses.replace(QUICK, targets=("v_proj", "q_proj")), counting())
    changed = {n.split(".")[-2] for n, p in recovered.named_parameters() if not p.equal(before[n])}
    assert changed == {"q_proj", "v_proj"}


def test_targets_that_cannot_be_adapted_are_refused():
    with pytest.raises(PrunekitError, match="no projection is called 'w_proj'; this model has down_proj, gate_proj"):
        recover(tiny_llama(), LoRA(targets=("q_proj", "w_proj")), counting())
    shared_weight = tiny_llama()
    layers = shared_weight.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(PrunekitError, match="up_proj shares its weight"):
        recover(shared_weight, LoRA(targets=("up_proj",)), counting())
    adapted = tiny_llama()
    attach(adapted, QUICK)
    with pytest.raises(PrunekitError, match="carries adapters already"):
        recover(adapted, QUICK, counting())


def test_a_loss_that_breaks_is_refused_and_the_model_survives():
    model = tiny_llama()
    before = weights_of(model)
    with pytest.raises(PrunekitError, match=r"not finite at step \d+: learning_rate=1e\+30 is too high"):
        recover(model, LoRA(max_steps=20, batch_size=4, learning_rate=1e30), counting(), inplace=True)
    assert same(model, before) and all(p.requires_grad for p in model.parameters())


def test_an_interrupt_leaves_the_model_without_adapters(monkeypatch):
    def interrupt(adapted, windows, method, **more):
        raise KeyboardInterrupt

    model = tiny_llama()
    before = weights_of(model)
    monkeypatch.setattr("prunekit.recovery.fine_tuning.train", interrupt)
    with pytest.raises(KeyboardInterrupt):
        recover(model, QUICK, counting(), inplace=True)
    assert same(model, before) and all(p.requires_grad for p in model.parameters())


def test_a_training_that_ended_is_taken_up_and_another_one_is_refused(tmp_path, monkeypatch):
    """Its checkpoints are those of the same model, data, method and teacher; whole models keep none."""
    run = tmp_path / "run"
    distilling = Distillation(tiny_llama(), QUICK)
    first = recover(uneven_llama(), distilling, counting(), keep_zeros=False, folder=run)
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-4"]
    monkeypatch.setattr("transformers.Trainer.train", None)
    again = recover(uneven_llama(), distilling, counting(), keep_zeros=False, folder=run, inplace=True)
    assert same(again, weights_of(first)) and again.recovery_log.losses == first.recovery_log.losses
    for method in (QUICK, dataclasses.replace(distilling, teacher=uneven_llama())):
        with pytest.raises(PrunekitError, match="holds something else than this run"):
            recover(uneven_llama(), method, counting(), keep_zeros=False, folder=run)
    with pytest.raises(PrunekitError, match="folder= keeps checkpoints of LoRA's pairs, not of whole models"):
        recover(tiny_llama(), FullTuning(max_steps=2), counting(), folder=tmp_path / "full")
    assert not (tmp_path / "full").exists()


def test_windows_that_processes_cannot_share_out_evenly_are_said(monkeypatch, caplog):
    for module in ("prunekit.processes", "prunekit.recovery.training"):
        monkeypatch.setattr(f"{module}.n_processes", lambda: 3)
    with caplog.at_level("WARNING", "prunekit"):
        recover(tiny_llama(), QUICK, counting())
    assert "4 windows a step cannot be shared out evenly among 3 processes: a step takes 3" in caplog.text


def test_weights_that_are_not_finite_are_named():
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(PrunekitError, match="model.norm.weight has NaN"):
        recover(model, QUICK, counting())


@pytest.mark.parametrize("method", [QUICK, FullTuning(max_steps=2)])
def test_a_finished_training_keeps_its_curve_whatever_fails_afterwards(tmp_path, monkeypatch, method):
    """The last measurement fails here, as an interrupt would end it."""
    monkeypatch.setattr("prunekit.recovery.fine_tuning.closed", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        recover(tiny_llama(), method, counting(), output_dir=tmp_path / "out")
    assert RecoveryLog.load(tmp_path / "out" / "recovery_log.json").losses
