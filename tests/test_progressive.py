"""Progressive pruning: the driver around LHSPG, from a model and text to zeros and a plan."""

import json
import math
import shutil
import signal

import pytest
import torch
from shared import run_script
from test_importance import tiny_llama
from test_recovery import counting

from prunekit import PruningPlan, discover, plan, prune
from prunekit.digests import RECORD
from prunekit.errors import PrunekitError
from prunekit.recovery import LoRA
from prunekit.recovery.lhspg import LHSPG, update_saliency
from prunekit.recovery.progressive import prune_progressively, units_for

QUICK = LoRA(r=4, alpha=8, max_steps=10, batch_size=4, learning_rate=1e-2)


def sheared(model=None, ratio=0.2, data=None, method=QUICK, **options):
    options = {"n_periods": 3, **options}
    return prune_progressively(model or tiny_llama(), ratio, counting() if data is None else data, method, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run, and the folder that it left."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return sheared(folder=folder), folder


@pytest.fixture(scope="module")
def longer():
    return sheared(n_periods=4)


def test_the_zeroed_model_loses_nothing_when_it_is_cut_and_meets_the_budget():
    model = tiny_llama()
    before = {name: p.clone() for name, p in model.named_parameters()}
    done = sheared(model)
    small = prune(done.model, done.plan)
    torch.testing.assert_close(small(counting()).logits, done.model(counting()).logits, rtol=0, atol=1e-5)
    total = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in small.parameters()) == done.plan.n_parameters_kept
    assert abs(1 - done.plan.n_parameters_kept / total - 0.2) <= 0.005
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert type(done.model) is type(model)
    assert not any("lora" in name for name, _ in done.model.named_parameters())
    assert PruningPlan.from_json(done.plan.to_json()) == done.plan
    assert str(done.plan) in repr(done)


def test_training_lowers_the_loss_while_units_go():
    log = sheared(method=LoRA(r=4, max_steps=60, batch_size=8, learning_rate=1e-2, dropout=0.0)).log
    assert len(log.losses) == 60
    assert sum(log.losses[-5:]) < 0.8 * sum(log.losses[:5])


def test_the_same_seed_gives_the_same_plan_and_weights(finished):
    a, b = finished[0], sheared()
    assert a.plan == b.plan
    assert all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))


def test_steps_are_shared_out():
    done = sheared(method=LoRA(r=4, max_steps=20, batch_size=4), warmup=0.2, rest=0.3, n_periods=2)
    steps = done.history.groupby("period")["step"].agg(["min", "max"])
    assert steps.to_numpy().tolist() == [[4, 9], [9, 14]]
    table = done.before_the_end()
    assert table["units"].sum() == sum(len(done.plan.removed(name)) for name in done.plan.keep)
    assert bool((table["share"].between(0.1, 0.4)).all())  # a fifth of the start, and what training adds
    last = done.history[done.history["step"].isin([9, 14])].groupby(["period", "step"])["norm"].max()
    assert last.loc[1, 9] == last.loc[2, 14] == 0


def test_protected_groups_lose_nothing():
    names = ["model.layers.0.mlp:ffn_channel", "model.layers.1.self_attn:kv_head"]
    done = sheared(ratio=0.1, protect=names)
    assert not set(names) & set(done.plan.keep)
    assert sum(len(done.plan.removed(name)) for name in done.plan.keep) > 0
    assert set(done.history["group"]) <= set(done.plan.keep)


def test_units_for_gives_all_kinds_the_same_share():
    groups = discover(tiny_llama())
    wanted = units_for(groups, 0.3)
    total = {kind: sum(g.n_units for g in groups.of_kind(kind)) for kind in wanted}
    assert set(wanted) == {"kv_head", "ffn_channel"}
    least = {kind: 1 / n for kind, n in total.items()}  # what one unit more would be
    shares = {kind: wanted[kind] / total[kind] for kind in wanted}
    assert abs(shares["kv_head"] - shares["ffn_channel"]) <= max(least.values())


def test_units_of_different_sizes_are_refused():
    """No number of units would meet the budget, whichever layers saliency takes them from."""
    model = uneven_queries()
    with pytest.raises(PrunekitError, match="units of kind 'kv_head' have .* to .* parameters"):
        units_for(discover(model), 0.2)


def uneven_queries():
    """A LLaMA whose first layer has lost half of the query heads of each KV head."""
    model = tiny_llama(n_heads=8, n_kv=2)
    groups = discover(model)
    scores = {g.name: torch.arange(float(g.n_units)) for g in groups}
    return prune(model, plan(groups, scores, 0.5, of="units", kinds=["query_head"], protect_layers=[1]))


def test_the_model_can_be_trained_on_as_the_one_that_was_given():
    model = tiny_llama()
    model.lm_head.weight.requires_grad_(False)
    done = sheared(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in done.model.named_parameters()} == flags
    done.model(input_ids=counting(), labels=counting()).loss.backward()


def test_nothing_may_go():
    done = sheared(ratio=0.0)
    assert done.plan.pruning_ratio == 0
    assert done.history.empty


def test_steps_that_were_passed_over_are_noticed(monkeypatch):
    """As a scaler of gradients does: the last period would not have ended."""
    step = LHSPG.step
    passed = []

    def skipping(self, closure=None):
        if self.n_steps == 4 and not passed:
            passed.append(1)
            return None
        return step(self, closure)

    monkeypatch.setattr(LHSPG, "step", skipping)
    with pytest.raises(PrunekitError, match="after 9 of the 10 steps"):
        sheared()


@pytest.mark.parametrize("stop", [1, 2])
def test_a_run_that_was_stopped_goes_on(tmp_path, longer, stop):
    """Interrupted at a boundary, when the last checkpoint is a period old."""
    asked = []

    def stopping(optimizer):
        asked.append(1)
        if len(asked) == stop + 1:
            raise KeyboardInterrupt
        return update_saliency(optimizer)

    with pytest.raises(KeyboardInterrupt):
        sheared(n_periods=4, saliency=stopping, folder=tmp_path / "run")
    steps = [path.name for path in (tmp_path / "run").glob("checkpoint-*")]
    done = sheared(n_periods=4, saliency=update_saliency, folder=tmp_path / "run")
    assert done.plan == longer.plan
    assert done.log.losses == pytest.approx(longer.log.losses)
    assert done.history.equals(longer.history)
    for x, y in zip(done.model.parameters(), longer.model.parameters(), strict=True):
        assert torch.equal(x, y)
    assert stop == 1 or steps  # the second time there was a checkpoint to go on from


def test_a_finished_run_is_what_it_was(finished):
    """Called again it makes no step, and says the same."""
    first, folder = finished
    names = sorted(path.name for path in folder.iterdir())
    again = sheared(folder=folder)
    assert again.log == first.log and len(again.log.losses) == 10
    assert again.plan == first.plan and again.history.equals(first.history)
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), first.model.parameters(), strict=True))
    assert sorted(path.name for path in folder.iterdir()) == names
    assert "before_end" in first._repr_html_()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(PrunekitError, match="is a file"):
        sheared(folder=tmp_path / "run")


def test_a_half_written_checkpoint_is_passed_over(tmp_path, finished):
    shutil.copytree(finished[1], tmp_path / "run")
    newest = max((tmp_path / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    (newest / RECORD).unlink()  # which is written last
    assert sheared(folder=tmp_path / "run").plan == finished[0].plan


def test_a_folder_of_another_run_is_refused(tmp_path, finished):
    folder = finished[1]
    before = sorted(path.name for path in folder.iterdir())
    louder = tiny_llama()  # the same but for one layer's weights, as after a recovery
    louder.model.layers[1].mlp.up_proj.weight.data *= 3
    protect = ["model.layers.0.self_attn:kv_head"]
    others = ({"ratio": 0.3}, {"data": counting(step=2)}, {"model": tiny_llama(seed=1)}, {"model": louder},
              {"n_periods": 2}, {"protect": protect}, {"rest": 0.3})  # fmt: skip
    for other in others:
        with pytest.raises(PrunekitError, match="holds something else"):
            sheared(folder=folder, **other)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(PrunekitError, match="holds something else"):
        sheared(folder=tmp_path / "mine")
    assert sorted(path.name for path in folder.iterdir()) == before


def test_no_pickle_is_read_that_could_run_code(finished):
    """What the Trainer keeps is read with `weights_only`."""
    newest = max(finished[1].glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    torch.load(newest / "optimizer.pt", weights_only=True)
    assert json.loads((newest / "trainer_state.json").read_text())["global_step"] == 10


@pytest.mark.slow
def test_a_loss_that_breaks_stops_and_keeps_the_last_good_state(tmp_path, finished):
    model = tiny_llama()
    before = {name: p.clone() for name, p in model.named_parameters()}

    def poisoned(optimizer):
        if optimizer.n_steps > 3:  # from here on the gradients are not numbers
            optimizer.units[0].lora[0].tensor.register_hook(lambda gradient: gradient * math.nan)
        return update_saliency(optimizer)

    with pytest.raises(
        PrunekitError, match=r"not finite in step 5.*step 4 left it.*last good state is in .*checkpoint-3"
    ):
        sheared(model, saliency=poisoned, folder=tmp_path / "run")
    with pytest.raises(PrunekitError, match="no checkpoint was kept"):
        sheared(model, saliency=poisoned)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert sheared(model, folder=tmp_path / "run").plan == finished[0].plan  # the good state is one to go on from


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, "pruning_ratio=1.0"),
        ({"ratio": math.nan}, "pruning_ratio=nan"),
        ({"ratio": 0.99}, "largest|at most|can"),
        ({"n_periods": 0}, "n_periods=0"),
        ({"n_periods": 50}, "n_periods=50 do not fit into 10 steps"),
        ({"warmup": 1.0}, "warmup=1.0"),
        ({"rest": -0.1}, "rest=-0.1"),
        ({"warmup": 0.6, "rest": 0.6}, "do not fit"),
        ({"protect": ["nothing"]}, "no group is called 'nothing'"),
        ({"protect": "model.layers.0.mlp:ffn_channel"}, "give a list, each entry a text"),
        ({"protect": None}, "give a list, each entry a text"),
        ({"protect": [3]}, "protect\\[0\\]=3 is not allowed"),
        ({"protect": ["model.layers.0:layer"]}, "of kind 'layer', and only groups of kind kv_head and ffn_channel"),
        ({"method": "fast"}, "method='fast' is not allowed; give LoRA"),
        ({"model": "a/path"}, "model='a/path' is not allowed"),
        ({"data": "a text without a tokenizer"}, "tokenizer"),
        ({"data": torch.full((4, 12), 99)}, "token ids"),
        ({"method": LoRA(targets=("none",))}, "no projection is called 'none'"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_left(options, message, tmp_path):
    with pytest.raises(PrunekitError, match=message):
        sheared(folder=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()  # so that the corrected call finds nothing in its way


WORK = """
import os, signal, sys, torch
from test_progressive import sheared
from prunekit.recovery.lhspg import LHSPG, update_saliency

def saliency(optimizer):
    if sys.argv[2] == "killed" and optimizer.redundant and sum(map(len, optimizer.redundant.values())):
        os.kill(os.getpid(), signal.SIGKILL)
    return update_saliency(optimizer)

done = sheared(saliency=saliency, folder=sys.argv[1] or None)
total = sum(p.double().abs().sum() for p in done.model.parameters()).item()
print(f"RESULT {total:.6f} {sum(len(done.plan.removed(name)) for name in done.plan.keep)}", flush=True)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path, finished):
    folder = tmp_path / "run"
    (tmp_path / "work.py").write_text(WORK)
    assert run_script(tmp_path / "work.py", str(folder), "killed").returncode == -signal.SIGKILL
    assert list(folder.glob("checkpoint-*"))
    done, straight = sheared(folder=folder), finished[0]
    assert done.plan == straight.plan
    assert all(torch.equal(a, b) for a, b in zip(done.model.parameters(), straight.model.parameters(), strict=True))
