"""What a step did to the loss: measured, carried, and warned of where it is much."""

import json
import math
import warnings

import pytest
import torch
from families import plan_keeping
from test_importance import tiny_llama

from prunekit import (
    PrunekitError,
    PruningPlan,
    calibration_set,
    discover,
    load,
    plan,
    prune,
    recover,
    save,
    score,
    sparsify,
)
from prunekit import account as accounts
from prunekit.account import LIMIT, LossChange
from prunekit.calibration import mean_loss
from prunekit.cli import main
from prunekit.errors import DamageWarning
from prunekit.gradients import gather_gradients
from prunekit.importance import Magnitude, Taylor
from prunekit.recovery import FullTuning
from prunekit.recovery.log import RecoveryLog

MEASURED = LossChange("prune", 4.07, 8.35, 1024, "8 held-out windows of 128 tokens")
INFINITE = LossChange("prune", 4.07, math.inf, 64, "1 held-out window of 64 tokens")
UNMEASURED = LossChange("recover", None, None, 0, "give held_out=…")


def tokens(n=6, seq=16, seed=0):
    return torch.randint(0, 48, (n, seq), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model():
    return tiny_llama().double()


@pytest.fixture
def groups(model):
    return discover(model)


def quick_plan(model, groups, calib=None):
    importance = Magnitude(p=2) if calib is None else Taylor()
    return plan(groups, score(model, groups.of_kind("kv_head", "ffn_channel"), importance, calib), 0.2)


@pytest.fixture
def losses(monkeypatch):
    """What is measured instead of the model: these, one after the other; exceptions are raised."""

    def set_losses(*values):
        left = iter(values)

        def measured(*_):
            value = next(left)
            if isinstance(value, BaseException):
                raise value
            return value

        monkeypatch.setattr(accounts, "loss_on", measured)

    return set_losses


def test_a_change_prints_in_one_line_and_knows_what_is_large():
    assert repr(MEASURED) == (
        "loss 4.07 → 8.35 nats per token (perplexity 58.56 → 4230) on 8 held-out windows of 128 tokens"
    )
    assert MEASURED.rise == pytest.approx(4.28) and MEASURED.is_large and "recover()" in MEASURED.warning
    assert INFINITE.is_large and INFINITE.perplexity_after == math.inf and "inf" in repr(INFINITE)
    assert repr(UNMEASURED) == "loss not measured: give held_out=…" and math.isnan(UNMEASURED.rise)
    assert not UNMEASURED.is_large and UNMEASURED.warning is None
    just = LossChange("prune", 0.0, LIMIT, 64, "")
    assert not just.is_large and LossChange("prune", 3.0, 3.001 + LIMIT, 64, "").is_large


@pytest.mark.parametrize("change", [MEASURED, INFINITE, UNMEASURED])
def test_a_change_survives_strict_json(change):
    text = json.dumps(change.to_dict(), allow_nan=False)
    assert LossChange.from_dict(json.loads(text)) == change


@pytest.mark.parametrize("fields", [None, [], {"step": "prune"}, MEASURED.to_dict() | {"before": "4"}])
def test_what_is_no_change_is_refused(fields):
    with pytest.raises(PrunekitError, match="is no loss change; give what LossChange"):
        LossChange.from_dict(fields)


def test_prune_measures_on_held_out_tokens_before_and_after(model, groups):
    small = prune(model, quick_plan(model, groups), held_out=tokens())
    change = small.loss_change
    assert change.before == pytest.approx(mean_loss(model, tokens()))
    assert change.after == pytest.approx(mean_loss(small, tokens()))
    assert (change.n_tokens, change.tokens_from) == (96, "6 held-out windows of 16 tokens")
    assert not hasattr(model, "loss_change")


def test_without_held_out_tokens_it_is_what_the_scores_saw_and_says_so(model, groups):
    chosen = quick_plan(model, groups, tokens(80, 16))
    change = prune(model, chosen).loss_change
    assert change.n_tokens == 1024 and "64 windows of 16 tokens that the scores saw (not held out)" in repr(change)
    assert "tokens" not in json.loads(chosen.to_json())
    read = PruningPlan.from_json(chosen.to_json())
    assert read == chosen and "held_out=calibration_set(" in repr(prune(model, read).loss_change)
    assert not prune(model, quick_plan(model, groups)).loss_change.is_measured  # magnitude reads no text
    refit = prune(model, read, compensate=tokens()).loss_change
    assert "that the re-fit saw" in refit.tokens_from


def test_gradients_that_were_gathered_first_know_their_tokens(model, groups):
    units = groups.of_kind("ffn_channel")
    gathered = gather_gradients(model, tokens(), [m.parameter for g in units for m in g.members])
    assert torch.equal(score(model, units, Taylor(), gathered).tokens, tokens())


def test_measuring_changes_nothing_and_can_be_left_out(model, groups):
    chosen = quick_plan(model, groups, tokens())
    measured, plain = prune(model, chosen), prune(model, chosen, measure=False)
    assert not hasattr(plain, "loss_change")
    for a, b in zip(measured.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


def test_much_harm_is_warned_of_with_figures_and_advice(model, groups, losses):
    losses(4.0, 8.0)
    with pytest.warns(DamageWarning, match=r"prune: loss 4.00 → 8.00 .*factor 1.5 .*smaller pruning_ratio") as caught:
        prune(model, quick_plan(model, groups), held_out=tokens())
    assert caught[0].filename == __file__
    losses(4.0, 4.4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune(model, quick_plan(model, groups), held_out=tokens())


def test_a_loss_that_is_not_finite_counts_as_infinite(model):
    model.lm_head.weight.data.fill_(1e308)
    assert accounts.loss_on(model, tokens()) == math.inf


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_a_measurement_that_fails_does_not_lose_the_model(model, groups, losses, failure, inplace):
    chosen = quick_plan(model, groups)
    losses(4.0, failure)
    small = prune(model, chosen, held_out=tokens(), inplace=inplace)
    assert sum(p.numel() for p in small.parameters()) == chosen.n_parameters_kept
    assert repr(small.loss_change).startswith("loss not measured: ")


def test_held_out_tokens_that_cannot_be_stop_everything_first(model, groups):
    before = {name: tuple(p.shape) for name, p in model.named_parameters()}
    with pytest.raises(PrunekitError, match="token ids"):
        prune(model, quick_plan(model, groups), held_out=tokens() + 48, inplace=True)
    with pytest.raises(PrunekitError, match="held_out=.*give a dense tensor"):
        sparsify(model, tokens(), "wanda", 0.5, held_out=[1, 2], inplace=True)
    assert before == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert all(bool((p != 0).any()) for p in model.parameters())


def test_where_tokens_go_nothing_is_measured(model, groups):
    taken = plan_keeping(groups, {groups.of_kind("vocabulary")[0].name: list(range(40))})
    assert "new numbers" in repr(prune(model, taken, held_out=tokens()).loss_change)


def test_the_card_says_it(model, groups, losses, tmp_path):
    losses(4.0, 8.0)
    with pytest.warns(DamageWarning):
        small = prune(model, quick_plan(model, groups), held_out=tokens())
    card = (save(small, tmp_path / "out") / "README.md").read_text()
    assert f"What `prune` did: {small.loss_change}. **That is much.**" in card


def test_the_card_says_it_of_each_step(model, groups, losses, tmp_path):
    losses(4.0, 4.2, 4.2, 4.5)
    small = prune(model, quick_plan(model, groups), held_out=tokens())
    cut = small.loss_change
    again = sparsify(small, tokens(), "magnitude", 0.5, measure=False)
    assert not hasattr(again, "loss_change") and again.earlier_changes == (cut,) and small.loss_change == cut
    then = sparsify(small, tokens(), "magnitude", 0.5)
    card = (save(then, tmp_path / "out") / "README.md").read_text()
    assert card.index(f"What `prune` did: {cut}.") < card.index(f"What `sparsify` did: {then.loss_change}.")


@pytest.mark.slow
def test_what_a_cut_did_is_known_after_training_and_after_another_cut(model, groups):
    small = prune(model, quick_plan(model, groups), held_out=tokens())
    cut = small.loss_change
    trained = recover(small.float(), FullTuning(max_steps=1, learning_rate=1e-5), tokens(), held_out=tokens(seed=3))
    assert trained.earlier_changes == (cut,) and trained.loss_change.step == "recover"
    left = discover(trained)
    again = prune(trained, plan_keeping(left, {left.of_kind("ffn_channel")[0].name: [0, 1]}), measure=False)
    assert again.earlier_changes == (cut, trained.loss_change) and not hasattr(again, "loss_change")


def test_sparsify_carries_it_in_its_report_and_checkpoint(model, losses, tmp_path):
    losses(4.0, 5.0)
    with pytest.warns(DamageWarning, match="less sparsity"):
        sparse = sparsify(model, tokens(), "wanda", 0.5, held_out=tokens(seed=1))
    assert sparse.sparsity_report.loss == sparse.loss_change and "loss 4.00 → 5.00" in repr(sparse.sparsity_report)
    found, _ = load(save(sparse, tmp_path / "out"))
    assert found.sparsity_report.loss == sparse.loss_change
    seen = sparsify(model, tokens(), "magnitude", 0.5, measure=False)
    assert not hasattr(seen, "loss_change") and seen.sparsity_report.loss is None


def test_sparsify_without_text_says_that_nothing_was_measured(model):
    assert "not measured" in repr(sparsify(model, None, "magnitude", 0.5).sparsity_report)
    assert "that sparsify saw" in sparsify(model, tokens(), "magnitude", 0.5).loss_change.tokens_from


@pytest.mark.slow
def test_recover_says_which_tokens_it_trained_on(model, tmp_path):
    short = FullTuning(max_steps=2, learning_rate=1e-3)
    recovered = recover(model.float(), short, tokens(), output_dir=tmp_path / "log")
    change = recovered.loss_change
    assert "that the training saw (not held out)" in repr(change) and change.rise < 0
    log = recovered.recovery_log
    assert log.loss_change == change and RecoveryLog.from_dict(json.loads(json.dumps(log.to_dict()))) == log
    assert json.loads((tmp_path / "log" / "recovery_log.json").read_text()) == log.to_dict()
    held_out = recover(model, short, tokens(), held_out=tokens(seed=3)).loss_change
    assert held_out.tokens_from == "6 held-out windows of 16 tokens"


def test_a_recovery_that_ruins_is_warned_of(model):
    with pytest.warns(DamageWarning, match="recover: loss .* a lower learning_rate"):
        recover(model.float(), FullTuning(max_steps=6, learning_rate=3.0), tokens())


def test_held_out_windows_are_others_than_those_of_the_same_call():
    _, tokenizer = load("world")
    options = {"n_samples": 12, "seq_len": 32, "seed": 5}
    seen = calibration_set("world", tokenizer, **options)
    held_out = calibration_set("world", tokenizer, **options, held_out=True)
    assert held_out.shape == seen.shape
    assert not {tuple(row) for row in seen.tolist()} & {tuple(row) for row in held_out.tolist()}
    assert torch.equal(seen, calibration_set("world", tokenizer, **options))
    with pytest.raises(PrunekitError, match="leave none to hold out"):
        calibration_set("a b c d e f g h", tokenizer, n_samples=2, seq_len=4, held_out=True)


def test_the_command_line_warns_on_standard_error_and_ends_well(tmp_path, capsys):
    out = tmp_path / "small"
    options = ["--pruning-ratio", "0.5", "--importance", "random"]
    assert main(["prune", "world", *options, "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "prunekit: prune: loss " in said.err and "8 held-out windows of 128 tokens" in said.out
    noted = LossChange.from_dict(PruningPlan.load(out / "plan.json").notes["loss"])
    assert noted.is_large and str(noted) in (out / "README.md").read_text()


def test_the_command_line_says_what_to_give_where_nothing_was_measured(tmp_path, capsys):
    save(tiny_llama(), tmp_path / "model")
    options = ["--pruning-ratio", "0.2", "--importance", "l2", "--out", str(tmp_path / "out")]
    assert main(["prune", str(tmp_path / "model"), *options]) == 0
    assert "prunekit: loss not measured: give --calibration with a text file" in capsys.readouterr().err
    assert "loss" not in PruningPlan.load(tmp_path / "out" / "plan.json").notes


@pytest.mark.slow
def test_the_command_line_holds_out_a_part_of_the_training_text(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(["the red fox sees a blue bird and the bird sees the fox ."] * 400))
    options = ["--data", str(text), "--seq-len", "32", "--max-steps", "1", "--json", "--out", str(tmp_path / "out")]
    assert main(["recover", "world", *options]) == 0
    told = json.loads(capsys.readouterr().out)["loss"]
    assert "held-out windows of 32 tokens" in told["tokens_from"] and told["step"] == "recover"
    assert "Before and after: loss" in (tmp_path / "out" / "README.md").read_text()
