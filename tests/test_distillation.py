"""Distillation: the loss is the divergence that it says, the teacher runs once, and what does not fit is refused."""

import copy
import errno
import json

import pytest
import torch
from evaluation_helpers import byte_tokenizer, llama
from hypothesis import given
from hypothesis import strategies as st
from test_importance import tiny_llama
from test_recovery import counting, same, weights_of
from torch.nn import functional

import prunekit as pk
from prunekit import Distillation, FullTuning, LoRA, PrunekitError, TeacherLogits, keep_logits, recover
from prunekit.pruning.planning import plan_without
from prunekit.recovery import teacher_logits
from prunekit.recovery.data import IGNORED, TrainingWindows
from prunekit.sparsity.zero_masks import share_of_zeros

SHORT = FullTuning(max_steps=3, batch_size=4, learning_rate=1e-3)
LONG = FullTuning(max_steps=40, batch_size=8, learning_rate=3e-3)


def pruned(model, ratio=0.3):
    groups = pk.discover(model)
    scores = pk.score(model, groups.of_kind("ffn_channel"), pk.Random(seed=1))
    return pk.prune(model, pk.plan(groups, scores, ratio, of="units", kinds=("ffn_channel",)), measure=False)


@torch.no_grad()
def divergence(teacher, model, tokens):
    p, q = (m(input_ids=tokens).logits[:, :-1].log_softmax(-1) for m in (teacher, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def drawn(seed, n=3, length=5, vocabulary=11):
    generator = torch.Generator().manual_seed(seed)
    logits, target = (torch.randn(n, length, vocabulary, generator=generator) * 3 for _ in range(2))
    return logits, target, torch.randint(vocabulary, (n, length), generator=generator)


def kept_of(target, k, temperature):
    best = (target[:, :-1] / temperature).log_softmax(-1).topk(k, -1)
    return best.indices, best.values


@given(
    seed=st.integers(0, 10**6), kl=st.sampled_from(["forward", "reverse"]), temperature=st.sampled_from([0.5, 1.0, 3.0])
)
def test_with_all_tokens_the_loss_is_the_whole_divergence(seed, kl, temperature):
    logits, target, labels = drawn(seed)
    how = Distillation(tiny_llama(), kl=kl)
    found = how.loss(logits, labels, *kept_of(target, 11, temperature), temperature)
    p, q = ((x[:, :-1] / temperature).log_softmax(-1) for x in (target, logits))
    p, q = (p, q) if kl == "forward" else (q, p)
    wanted = functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean() * temperature**2
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@given(seed=st.integers(0, 10**6), k=st.integers(1, 10), kl=st.sampled_from(["forward", "reverse"]))
def test_with_fewer_tokens_it_is_at_most_that_and_never_negative(seed, k, kl):
    logits, target, labels = drawn(seed)
    how = Distillation(tiny_llama(), kl=kl)
    part, whole = (float(how.loss(logits, labels, *kept_of(target, n, 1.0))) for n in (k, 11))
    assert (
        -1e-5 <= part <= whole + 0.02
    )  # float32 tells what is left beside the likeliest tokens from nothing only so far
    assert float(how.loss(target, labels, *kept_of(target, k, 1.0))) == pytest.approx(0, abs=1e-4)


def test_the_share_of_the_text_is_its_cross_entropy():
    logits, target, labels = drawn(0)
    kept = kept_of(target, 4, 1.0)
    plain = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    none, half, all_ = (Distillation(tiny_llama(), text_share=s).loss(logits, labels, *kept) for s in (0.0, 0.5, 1.0))
    torch.testing.assert_close(all_, plain)
    torch.testing.assert_close(half, (none + plain) / 2)


def test_tokens_that_are_not_trained_on_do_not_count():
    logits, target, labels = drawn(0)
    labels[:, 3:] = IGNORED
    how, kept = Distillation(tiny_llama(), text_share=0.3), kept_of(target, 4, 1.0)
    before = how.loss(logits, labels, *kept)
    logits[:, 2:-1] += torch.randn_like(logits[:, 2:-1])  # what predicts them
    torch.testing.assert_close(how.loss(logits, labels, *kept), before)


@pytest.mark.parametrize(
    "training", [LONG, LoRA(r=4, max_steps=40, batch_size=8, learning_rate=1e-2)], ids=["full", "lora"]
)
def test_the_model_comes_nearer_to_its_teacher(training):
    dense, tokens = tiny_llama(), counting()
    small = pruned(dense)
    trained = recover(small, Distillation(dense, training), tokens)
    assert divergence(dense, trained, tokens) < 0.5 * divergence(dense, small, tokens)
    assert same(small, weights_of(pruned(dense))) and not trained.training  # the model given is as it was
    log = trained.recovery_log
    assert log.method.startswith(f"Distillation(training={type(training).__name__}(") and len(log.losses) == 40
    assert log.losses[-1] < log.losses[0]


def test_a_copy_of_the_teacher_has_nothing_to_learn():
    dense = tiny_llama()
    trained = recover(copy.deepcopy(dense), Distillation(dense, SHORT), counting())
    assert max(trained.recovery_log.losses) < 1e-3 and divergence(dense, trained, counting()) < 1e-3


def test_the_same_seed_gives_the_same_weights_and_the_callers_random_numbers_stay():
    dense, state = tiny_llama(), torch.get_rng_state()
    a, b = (recover(pruned(dense), Distillation(dense, SHORT), counting()) for _ in range(2))
    assert same(a, weights_of(b))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    recover(pruned_once(dense), Distillation(dense, SHORT), counting())
    assert torch.equal(before, torch.get_rng_state()) and not torch.equal(state, before)


def pruned_once(dense):
    with torch.random.fork_rng():
        return pruned(dense)


def test_zeros_stay_where_they_are_kept():
    dense = tiny_llama()
    sparse = pk.sparsify(dense, None, "magnitude", 0.5)
    trained = recover(sparse, Distillation(dense, SHORT), counting())
    assert share_of_zeros(trained) >= share_of_zeros(sparse) > 0.3


def test_what_is_kept_on_disk_is_what_a_teacher_in_memory_gives(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_logits, "_A_SHARD", 7)
    dense, tokens = tiny_llama(), counting()
    kept = keep_logits(dense, tokens, tmp_path / "kept", top_k=6, temperature=2.0)
    again = TeacherLogits.load(tmp_path / "kept")
    memory = keep_logits(dense, tokens, top_k=6, temperature=2.0)
    for number in range(len(tokens)):
        for a, b, c in zip(kept[number], again[number], memory[number], strict=True):
            assert torch.equal(a, b) and a.shape == (11, 6)
            torch.testing.assert_close(a, c)  # in batches of other sizes
    small = pruned(dense)
    told = Distillation(dense, SHORT, top_k=6, temperature=2.0), Distillation(again, SHORT)
    for a, b in zip(*(recover(small, how, tokens).parameters() for how in told), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert "32 windows of 12 tokens" in repr(again) and "in memory" in repr(memory)
    assert not list((tmp_path / "kept").glob(".*"))


def test_a_run_that_was_stopped_goes_on_and_the_teacher_runs_once(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_logits, "_A_SHARD", 8)
    dense, tokens, runs = tiny_llama(), counting(), []
    predicted = teacher_logits._predicted

    def counted(*args):
        if len(runs) == 2:
            runs.append(None)
            raise KeyboardInterrupt
        runs.append(len(args[1]))
        return predicted(*args)

    monkeypatch.setattr(teacher_logits, "_predicted", counted)
    with pytest.raises(KeyboardInterrupt):
        keep_logits(dense, tokens, tmp_path / "kept")
    with pytest.raises(PrunekitError, match="holds 16 of 32 windows; call keep_logits again"):
        TeacherLogits.load(tmp_path / "kept")
    kept = keep_logits(dense, tokens, tmp_path / "kept")
    assert runs == [8, 8, None, 8, 8] and torch.equal(kept.tokens, tokens)
    keep_logits(dense, tokens, tmp_path / "kept")
    assert len(runs) == 5
    torch.testing.assert_close(kept[31][1], keep_logits(dense, tokens)[31][1])


def test_a_full_disk_is_said_by_name_and_what_was_finished_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_logits, "_A_SHARD", 8)
    saved = teacher_logits.save_file

    def full(tensors, path):
        if path.name.endswith("1.safetensors"):
            raise OSError(errno.ENOSPC, "No space left on device")
        saved(tensors, path)

    monkeypatch.setattr(teacher_logits, "save_file", full)
    with pytest.raises(PrunekitError, match="cannot write .*No space left"):
        keep_logits(tiny_llama(), counting(), tmp_path / "kept")
    names = {path.name for path in (tmp_path / "kept").iterdir()}
    assert names == {"teacher.json", "sha256.json", "windows-00000.safetensors"}
    monkeypatch.setattr(teacher_logits, "save_file", saved)
    assert len(keep_logits(tiny_llama(), counting(), tmp_path / "kept")) == 32


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"teacher": lambda: tiny_llama(seed=1)}, "predictions of another teacher"),
        ({"top_k": lambda: 3}, "another top_k"),
        ({"temperature": lambda: 2.0}, "another temperature"),
        ({"data": lambda: counting(8)}, "another n_windows"),
        ({"data": lambda: counting(step=2)}, "predictions for another text or tokenizer"),
    ],
)
def test_a_folder_of_other_predictions_is_not_taken_up(tmp_path, change, told):
    good = {"teacher": tiny_llama, "data": counting, "top_k": lambda: 4, "temperature": lambda: 1.0}
    once, then = ({name: make() for name, make in (good | more).items()} for more in ({}, change))
    keep_logits(**once, folder=tmp_path / "kept")
    with pytest.raises(PrunekitError, match=told):
        keep_logits(**then, folder=tmp_path / "kept")


def test_damaged_or_missing_predictions_are_named(tmp_path):
    folder = tmp_path / "kept"
    with pytest.raises(PrunekitError, match="cannot read"):
        TeacherLogits.load(folder)
    keep_logits(tiny_llama(), counting(), folder)
    (folder / "windows-00000.safetensors").write_bytes(b"{}")
    with pytest.raises(
        PrunekitError, match="windows-00000.safetensors' was changed since it was written; delete the f"
    ):
        TeacherLogits.load(folder)
    (folder / "teacher.json").write_text(json.dumps({"vocabulary": -1}))
    with pytest.raises(PrunekitError, match=r"teacher\.json"):
        TeacherLogits.load(folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(PrunekitError, match="exists and holds no predictions of a teacher"):
        keep_logits(tiny_llama(), counting(), tmp_path / "other")


def test_what_does_not_fit_is_refused_by_name():
    dense, tokens = tiny_llama(), counting()
    small, kept = pruned(dense), keep_logits(dense, tokens, top_k=5)
    config = copy.deepcopy(dense.config)
    config.vocab_size = 60
    for other in (type(dense)(config), keep_logits(type(dense)(config), tokens)):
        with pytest.raises(PrunekitError, match="the teacher predicts over 60 tokens and the model over 50"):
            recover(small, Distillation(other, SHORT), tokens)
    with pytest.raises(PrunekitError, match="the teacher is the model itself"):
        recover(small, Distillation(small, SHORT), tokens)
    for data in (counting(step=2), counting(length=9), counting(40)):
        with pytest.raises(PrunekitError, match="predictions were kept for other windows"):
            recover(small, Distillation(kept, SHORT), data)
    with pytest.raises(PrunekitError, match="temperature=2.0, but the predictions were kept with 1"):
        Distillation(kept, temperature=2.0)
    with pytest.raises(PrunekitError, match="top_k=9, but the predictions were kept with 5"):
        Distillation(kept, top_k=9)
    for bad in ({"text_share": 1.5}, {"kl": "both"}, {"temperature": 0}, {"top_k": 0}, {"training": None}):
        with pytest.raises(PrunekitError, match=f"Distillation: {next(iter(bad))}="):
            Distillation(dense, **bad)
    with pytest.raises(PrunekitError, match="Distillation: teacher="):
        Distillation("dense")


def test_fewer_windows_than_were_kept_are_those_at_the_beginning():
    dense, tokens = tiny_llama(), counting()
    kept = keep_logits(dense, tokens)
    a = recover(pruned(dense), Distillation(kept, SHORT), tokens[:20])
    b = recover(pruned(dense), Distillation(dense, SHORT), tokens[:20])
    for one, other in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_windows_with_labels_are_trained_on_replies_alone():
    dense, tokens = tiny_llama(), counting()
    labels = tokens.clone()
    labels[:, :6] = IGNORED
    windows = TrainingWindows(tokens, labels)
    a, b = (recover(pruned(dense), Distillation(dense, SHORT), data) for data in (windows, tokens))
    assert not same(a, weights_of(b))
    assert a.recovery_log.losses[0] != b.recovery_log.losses[0]


def test_an_overconfident_model_is_pushed_back():
    """Its likeliest tokens hold all that float32 can tell from one; what is left has a gradient all the same."""
    logits = torch.zeros(1, 2, 100)
    logits[..., :2] = 26.0
    logits.requires_grad_(True)
    ids, best = torch.tensor([[[0, 1]]]), torch.tensor([[[0.4, 0.4]]]).log()
    Distillation(tiny_llama()).loss(logits, torch.zeros(1, 2, dtype=torch.long), ids, best).backward()
    assert logits.grad[0, 0, 0] == pytest.approx(0.1, abs=1e-3)
    assert logits.grad[0, 0, 2:].sum() == pytest.approx(-0.2, abs=1e-3)


def test_a_stream_needs_a_number_of_windows_and_stops_there():
    def endless():
        while True:
            yield "the cat sat "

    teacher, options = llama(), {"tokenizer": byte_tokenizer(), "seq_len": 16}
    with pytest.raises(PrunekitError, match="data is a stream, of which training reads a part only; give n_windows"):
        keep_logits(teacher, endless(), **options)
    assert len(keep_logits(teacher, endless(), n_windows=5, **options)) == 5


@pytest.mark.parametrize("folder", ["", ".", "/"])
def test_a_folder_without_a_name_is_refused(folder):
    with pytest.raises(PrunekitError, match="has no name of its own; give the path of a new folder"):
        keep_logits(tiny_llama(), counting(), folder)


def test_predictions_that_are_not_finite_are_not_kept(tmp_path):
    teacher = tiny_llama()
    with torch.no_grad():
        teacher.lm_head.weight.fill_(3e38)
    with pytest.raises(PrunekitError, match="the teacher's logits are not finite: load it in float32 or bfloat16"):
        keep_logits(teacher, counting(), tmp_path / "kept")
    assert not list((tmp_path / "kept").glob("*.safetensors"))


def test_a_shard_that_is_gone_is_named_and_computed_again(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_logits, "_A_SHARD", 8)
    dense, tokens = tiny_llama(), counting()
    kept = keep_logits(dense, tokens, tmp_path / "kept")
    whole = kept[9][1].clone()
    shard = tmp_path / "kept" / "windows-00001.safetensors"
    shard.unlink()
    with pytest.raises(PrunekitError, match="windows-00001"):
        recover(pruned(dense), Distillation(kept, SHORT), tokens)
    note = tmp_path / "kept" / "sha256.json"
    note.write_text(json.dumps({k: v for k, v in json.loads(note.read_text()).items() if k != shard.name}))
    torch.testing.assert_close(keep_logits(dense, tokens, tmp_path / "kept")[9][1], whole)
    for number in (-1, 32):
        with pytest.raises(IndexError):
            kept[number]
    assert len(list(kept)) == 32


def test_more_tokens_than_there_are_is_all_of_them():
    kept = keep_logits(tiny_llama(), counting(), top_k=1000)
    assert kept[0][0].shape == (11, 50) and Distillation(kept, top_k=1000).top_k == 1000


def deep(n_layers=4):
    config = tiny_llama().config.to_dict() | {"num_hidden_layers": n_layers}
    torch.manual_seed(0)
    return type(tiny_llama())(tiny_llama().config.__class__(**config)).float().eval()


def plan_of(model, n_hidden, *layers):
    """A plan that takes whole layers and hidden channels."""
    groups = pk.discover(model)
    hidden = groups.of_kind("hidden")[0]
    gone = {f"model.layers.{number}:layer": [0] for number in layers} | {hidden.name: range(0, n_hidden * 3, 3)}
    return plan_without(groups, gone, {})


@torch.no_grad()
def apart(dense, small, tokens, behind, channels):
    """How far hidden states are apart, worked out from what transformers returns beside logits."""
    theirs, ours = (m(input_ids=tokens, output_hidden_states=True).hidden_states for m in (dense, small))
    parts = []
    for number, layer in enumerate(behind[:-1]):  # behind the last layer transformers gives the normed stream
        target, found = theirs[layer + 1][:, :-1, channels], ours[number + 1][:, :-1]
        parts.append(((found - target).square().sum(-1) / target.square().sum(-1)).mean())
    return float(torch.stack(parts).mean())


def test_hidden_states_come_nearer_to_the_teachers_through_the_plan():
    """With adapters, whose wrapper stands around the model; without them below."""
    training = LoRA(r=4, max_steps=40, batch_size=8, learning_rate=1e-2)
    dense, tokens = deep(), counting()
    plan = plan_of(dense, 3, 1)
    small = pk.prune(dense, plan, measure=False)
    channels = [channel for channel in range(16) if channel not in (0, 3, 6)]
    with_, without = (
        recover(small, Distillation(dense, training, hidden_share=share, plan=plan if share else None), tokens)
        for share in (0.7, 0.0)
    )
    was, now, plain = (apart(dense, model, tokens, (1, 2, 3), channels) for model in (small, with_, without))
    assert now < 0.7 * was and now < 0.85 * plain


def test_the_difference_is_that_of_the_stream_behind_each_gap():
    dense, tokens = deep(), counting(4)
    plan = plan_of(dense, 3, 1)
    small = pk.prune(dense, plan, measure=False)
    how = FullTuning(max_steps=1, batch_size=4, learning_rate=1e-9)
    trained = recover(small, Distillation(dense, how, hidden_share=1.0, plan=plan), tokens)
    channels, seen = [channel for channel in range(16) if channel not in (0, 3, 6)], {}
    for model, numbers in ((dense, (1, 2, 3)), (small, (0, 1, 2))):
        seen[model] = []
        for number in numbers:
            model.model.layers[number].register_forward_hook(lambda m, a, y, into=seen[model]: into.append(y[:, :-1]))
        with torch.no_grad():
            model(tokens)
    pairs = [(h, t[..., channels]) for h, t in zip(seen[small], seen[dense], strict=True)]
    wanted = [((h - t).square().sum(-1) / t.square().sum(-1)).mean() for h, t in pairs]
    assert trained.recovery_log.losses[0] == pytest.approx(float(torch.stack(wanted).mean()), rel=1e-5)


def test_hidden_states_of_a_copy_are_no_difference_and_nothing_is_learnt():
    dense = tiny_llama()
    trained = recover(copy.deepcopy(dense), Distillation(dense, SHORT, hidden_share=1.0), counting())
    assert trained.recovery_log.losses == (0.0, 0.0, 0.0) and same(trained, weights_of(dense))


def test_tokens_that_are_not_trained_on_do_not_count_for_hidden_states():
    dense, tokens = tiny_llama(), counting(4)
    small, labels = pruned(dense), counting(4)
    labels[:, 6:] = IGNORED
    how = FullTuning(max_steps=1, batch_size=4)
    short = recover(small, Distillation(dense, how, hidden_share=1.0), tokens[:, :6])
    masked = recover(small, Distillation(dense, how, hidden_share=1.0), TrainingWindows(tokens, labels))
    assert short.recovery_log.losses[0] == pytest.approx(masked.recovery_log.losses[0], rel=1e-5)


def test_hidden_states_that_cannot_be_compared_are_refused(tmp_path):
    dense, tokens = deep(), counting()
    plan = plan_of(dense, 3, 1)
    small = pk.prune(dense, plan, measure=False)
    with pytest.raises(PrunekitError, match=r"has 3 layers of 13 hidden channels, and 4 of 16 of the teacher's"):
        recover(small, Distillation(dense, SHORT, hidden_share=0.5), tokens)
    read = pk.PruningPlan.load(plan.save(tmp_path / "plan.json"))
    assert recover(small, Distillation(dense, SHORT, hidden_share=0.5, plan=read), tokens)
    with pytest.raises(PrunekitError, match="the plan is of another dense model; give the one by which the teacher"):
        recover(small, Distillation(tiny_llama(), SHORT, hidden_share=0.5, plan=plan), tokens)
    with pytest.raises(PrunekitError, match="plan= is for hidden states; give hidden_share too"):
        Distillation(dense, SHORT, plan=plan)
    with pytest.raises(PrunekitError, match=r"hidden_share=0.5 compares hidden states, and of this teacher only"):
        Distillation(keep_logits(dense, tokens), SHORT, hidden_share=0.5)
