"""The calibration set, the documents under it, and the gradients gathered over it."""

import json

import datasets
import pytest
import torch
from evaluation_helpers import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from test_importance import CALIB, tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prunekit.calibration import calibration_set, mean_loss
from prunekit.documents import read_documents
from prunekit.errors import PrunekitError
from prunekit.gradients import gather_gradients
from prunekit.recovery.data import training_windows
from prunekit.text import tokenize


@pytest.fixture(scope="module")
def tokenizer():
    """One token a word: `<s>` is 0, `w1` to `w99` are 1 to 99; adds BOS, and knows no other words."""
    vocabulary = {"<s>": 0, **{f"w{i}": i for i in range(1, 100)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", model_max_length=8)


def words(start, stop):
    return " ".join(f"w{i}" for i in range(start, stop))


def test_windows_are_pieces_of_the_text(tokenizer):
    calib = calibration_set(words(1, 100), tokenizer, n_samples=5, seq_len=10, seed=0)
    assert calib.dtype == torch.int64 and calib.shape == (5, 10)
    assert (calib[:, 0] == 0).all() and (calib[:, 1:].diff(dim=1) == 1).all()
    without = calibration_set(words(1, 100), tokenizer, n_samples=5, seq_len=10, bos=False)
    assert (without.diff(dim=1) == 1).all() and (without > 0).all()


def test_windows_do_not_overlap_where_the_text_is_long_enough(tokenizer):
    for seed in range(5):
        calib = calibration_set(words(1, 100), tokenizer, n_samples=9, seq_len=11, seed=seed)
        assert len(calib[:, 1:].unique()) == calib[:, 1:].numel()
    assert calibration_set(words(1, 20), tokenizer, n_samples=9, seq_len=11).shape == (9, 11)


@given(st.integers(0, 2**31), st.integers(2, 9), st.sampled_from([None, False]))
def test_held_out_windows_share_no_token_with_the_others_and_begin_alike(tokenizer, seed, seq_len, bos):
    options = {"n_samples": 5, "seq_len": seq_len, "seed": seed, "bos": bos}
    seen, held_out = (calibration_set(words(1, 100), tokenizer, **options, held_out=held) for held in (False, True))
    marks = int(bos is None)
    assert seen.shape == held_out.shape == (5, seq_len)
    assert not {*seen[:, marks:].flatten().tolist()} & {*held_out[:, marks:].flatten().tolist()}
    assert all((drawn[:, 0] == 0).all() == bool(marks) for drawn in (seen, held_out))


def test_a_text_that_leaves_nothing_to_hold_out_says_so(tokenizer):
    options = {"n_samples": 2, "seq_len": 4, "held_out": True}
    assert len(calibration_set(words(1, 10), tokenizer, **options)) == 1
    with pytest.raises(PrunekitError, match=r"8 tokens, of which n_samples=2 windows of 3 tokens of text leave none"):
        calibration_set(words(1, 9), tokenizer, **options)


def test_a_seed_gives_the_same_windows_and_another_seed_others(tokenizer):
    first, again, other = (calibration_set(words(1, 100), tokenizer, seq_len=4, seed=s) for s in (0, 0, 1))
    assert first.equal(again) and not first.equal(other)


def test_bos_is_in_front_of_windows_and_the_separator_is_split_off(tokenizer):
    calib = calibration_set("w1 w2<|endoftext|>w1 w2", tokenizer, n_samples=3, seq_len=5)
    assert calib.equal(torch.tensor([0, 1, 2, 1, 2]).expand(3, 5))
    kept = calibration_set("w1 <|endoftext|> w2", tokenizer, n_samples=1, seq_len=4, separator=None)
    assert kept.tolist() == [[0, 1, 0, 2]]  # an unknown word


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(2, 9), st.sampled_from([True, False]))
def test_bos_is_first_in_every_window_where_the_tokenizer_adds_it_and_nowhere_else(lengths, seq_len, adds):
    made = byte_tokenizer(adds_bos=adds)
    documents = ["x" * length for length in lengths]
    if sum(lengths) + len(lengths) - 1 < seq_len - adds:
        return
    calib = calibration_set(documents, made, n_samples=4, seq_len=seq_len)
    windows = training_windows([*documents, "y" * seq_len], made, seq_len).tokens
    for tokens in (calib, windows):
        assert tokens.shape[1] == seq_len and not (tokens[:, 1:] == 0).any()
        assert (tokens[:, 0] == 0).all() == adds
    assert "\n".join(documents).startswith(made.decode(windows[0, adds:])[: sum(lengths)])


def test_a_line_break_stands_between_documents():
    made = byte_tokenizer()
    assert made.decode(tokenize(["one", "two", "three"], made)) == "one\ntwo\nthree"
    assert made.decode(tokenize(["one"], made)) == "one"


def test_calibration_reads_the_world_as_its_model_was_trained():
    from prunekit import load

    model, made = load("world")
    losses = [
        mean_loss(model, calibration_set("world", made, n_samples=8, seq_len=128, bos=bos)) for bos in (None, False)
    ]
    assert losses[0] < 1.15 and losses[0] < losses[1] - 0.02


def test_only_as_much_is_tokenised_as_is_needed(tokenizer):
    assert len(tokenize([words(1, 12)] * 100, tokenizer, enough=30)) == 33
    assert len(tokenize([words(1, 12)] * 100, tokenizer)) == 1100


@pytest.mark.parametrize("size", [{"n_samples": 0}, {"seq_len": 1}])
def test_impossible_sizes_are_refused(tokenizer, size):
    with pytest.raises(PrunekitError, match="(n_samples=0|seq_len=1) is not allowed"):
        calibration_set("w1 w2 w3", tokenizer, **size)


def test_a_text_that_is_too_short_says_how_short(tokenizer):
    with pytest.raises(PrunekitError, match=r"has 4 tokens and one window needs seq_len=64"):
        calibration_set("w1 w2 w3", tokenizer)


@pytest.mark.parametrize("empty", ["", "  \n", [], [" "], "<|endoftext|>", iter(())])
def test_an_empty_text_is_refused(tokenizer, empty):
    with pytest.raises(PrunekitError, match="holds no text"):
        calibration_set(empty, tokenizer)


def test_documents_come_from_every_kind_of_source(tmp_path):
    two = ["one text", "another text"]
    (tmp_path / "a.txt").write_text("one text<|endoftext|>\nanother text\n")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in two) + "\n\n")
    (tmp_path / "a.json").write_text(json.dumps(two))
    (tmp_path / "b.json").write_text(json.dumps({"text": "one text"}))
    assert read_documents(tmp_path / "a.txt", separator="<|endoftext|>") == two
    assert read_documents(str(tmp_path / "a.txt")) == [(tmp_path / "a.txt").read_text()]
    assert read_documents(tmp_path / "a.jsonl") == two
    assert read_documents(str(tmp_path / "a.json")) == two
    assert read_documents(tmp_path / "b.json") == two[:1]
    assert read_documents([*two, "  "]) == two
    assert read_documents({"text": t} for t in two) == two
    assert read_documents(datasets.Dataset.from_dict({"text": two, "n": [1, 2]})) == two
    assert read_documents("just some text. And more") == ["just some text. And more"]
    for text in ("word", "~nobody says so", "a\0b", "x y " * 300, "w" * 2000, "one line.\nanother.txt"):
        assert read_documents(text) == [text]


def test_the_world_gives_its_training_documents():
    assert len(read_documents("world")) > 100


def test_an_existing_file_wins_over_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "world").write_text("a file of that name")
    assert read_documents("world") == ["a file of that name"]


def test_instructions_are_written_in_the_papers_template():
    record = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    (text,) = read_documents([record])
    assert "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n3" in text
    (text,) = read_documents([{**record, "input": ""}])
    assert "### Input" not in text


@pytest.mark.parametrize("missing", ["nowhere.txt", "no/where", "data.parquet", "with space.jsonl"])
def test_a_path_that_is_no_file_is_named(missing):
    with pytest.raises(PrunekitError, match=f"{missing}.* is not a file"):
        read_documents(missing)


def test_sources_that_hold_no_text_are_refused(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "fields.jsonl").write_text('{"body": "x"}')
    with pytest.raises(PrunekitError, match="cannot read .*bad.json"):
        read_documents(tmp_path / "bad.json")
    with pytest.raises(PrunekitError, match="cannot read .*bytes.txt"):
        read_documents(tmp_path / "bytes.txt")
    with pytest.raises(PrunekitError, match="fields.jsonl.*no text in a record with body"):
        read_documents(tmp_path / "fields.jsonl")
    with pytest.raises(PrunekitError, match="no text in 3"):
        read_documents([3])
    for source in (3, {"text": "x"}):
        with pytest.raises(PrunekitError, match="cannot read documents from"):
            read_documents(source)
    with pytest.raises(PrunekitError, match="is not a file"):
        read_documents(tmp_path)


NAMES = ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight")


def reference(model, calib):
    """Gradient of the mean loss, and mean squared per-sample gradient, by autograd alone."""
    parameters = [dict(model.named_parameters())[n] for n in NAMES]
    grads = [torch.autograd.grad(model(input_ids=s, labels=s).loss, parameters) for s in calib.split(1)]
    stacked = [torch.stack(g) for g in zip(*grads, strict=True)]
    return [g.mean(0) for g in stacked], [g.square().mean(0) for g in stacked]


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("tokens_a_batch", [12, 30, 1024])
def test_gradients_are_those_of_the_mean_loss(monkeypatch, second, tokens_a_batch):
    monkeypatch.setattr("prunekit.calibration.TOKENS_A_BATCH", tokens_a_batch)
    model = tiny_llama(dtype=torch.float64)
    g, h = reference(model, CALIB)
    found = gather_gradients(model, CALIB, NAMES, second=second)
    assert set(found.g) == set(NAMES) and found.n_samples == 4
    assert found.loss == pytest.approx(model(input_ids=CALIB, labels=CALIB).loss.item())
    for i, name in enumerate(NAMES):
        torch.testing.assert_close(found.g[name], g[i])
        if found.h is not None:
            torch.testing.assert_close(found.h[name], h[i])
    assert (found.h is not None) == second
    assert "2 parameters; 4 samples" in repr(found)


def test_tied_embeddings_collect_both_uses():
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    g, _ = reference(model, CALIB)
    torch.testing.assert_close(gather_gradients(model, CALIB, NAMES).g[NAMES[1]], g[1], rtol=1e-4, atol=1e-6)


def test_the_model_is_left_as_it_was_even_when_interrupted(monkeypatch):
    model = tiny_llama().train()
    model.model.layers[1].eval()
    frozen, kept = model.lm_head.weight, model.model.embed_tokens.weight
    frozen.requires_grad_(False)
    kept.grad = torch.ones_like(kept)
    modes = [m.training for m in model.modules()]
    found = gather_gradients(model, CALIB, ["lm_head.weight"])
    assert found.g["lm_head.weight"].abs().sum() > 0

    def interrupt(*args, **kwargs):
        assert not model.training
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        gather_gradients(model, CALIB, NAMES)
    assert [m.training for m in model.modules()] == modes
    assert not frozen.requires_grad and frozen.grad is None
    assert kept.requires_grad and kept.grad.eq(1).all()
    assert sum(p.requires_grad for p in model.parameters()) == len(list(model.parameters())) - 1
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters() if p._post_accumulate_grad_hooks)


def test_half_precision_sums_are_kept_in_float32():
    model = tiny_llama(dtype=torch.bfloat16)
    found = gather_gradients(model, CALIB, NAMES, second=True)
    assert {t.dtype for t in (*found.g.values(), *found.h.values())} == {torch.float32}


def test_what_the_loss_does_not_depend_on_gets_zeros():
    model = tiny_llama()
    model.spare = torch.nn.Linear(2, 2)
    assert gather_gradients(model, CALIB, ["spare.weight", NAMES[0]]).g["spare.weight"].eq(0).all()


@pytest.mark.parametrize(
    ("calib", "message"),
    [
        ([[1, 2]], "not list"),
        (CALIB.float(), "not torch.float32"),
        (CALIB.bool(), "not torch.bool"),
        (CALIB[0], r"not torch.int64 \(12,\)"),
        (CALIB[:0], "at least 1 sample of 2 tokens"),
        (CALIB[:, :1], "at least 1 sample of 2 tokens"),
        (CALIB + 100, "the model knows 0 to 49"),
        (CALIB - 100, "the model knows 0 to 49"),
        (CALIB.repeat(1, 200), "seq_len=2400, but the model takes at most 2048"),
    ],
)
def test_bad_calibration_tensors_are_refused(calib, message):
    with pytest.raises(PrunekitError, match=message):
        gather_gradients(tiny_llama(), calib, NAMES)


def test_smaller_integers_will_do():
    found = [gather_gradients(tiny_llama(), c, NAMES).g[NAMES[0]] for c in (CALIB, CALIB.to(torch.int32))]
    assert found[0].equal(found[1])


def test_unknown_parameters_are_refused():
    with pytest.raises(PrunekitError, match="no parameter 'nowhere'"):
        gather_gradients(tiny_llama(), CALIB, [NAMES[0], "nowhere"])
    with pytest.raises(PrunekitError, match="no parameter given"):
        gather_gradients(tiny_llama(), CALIB, [])


def test_what_is_not_finite_is_named():
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(PrunekitError, match="model.norm.weight has NaN"):
        gather_gradients(model, CALIB, NAMES)
    huge = tiny_llama(dtype=torch.float16)
    with torch.no_grad():
        huge.lm_head.weight.fill_(6e4)
        huge.lm_head.weight[::2] = -6e4
    with pytest.raises(PrunekitError, match="the loss is (nan|inf) though all weights are finite"):
        gather_gradients(huge, CALIB, NAMES)
    with pytest.raises(PrunekitError, match="no data"):
        gather_gradients(tiny_llama().to("meta"), CALIB, NAMES)


def test_a_gradient_that_overflows_is_named():
    model = tiny_llama()
    model.model.embed_tokens.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(PrunekitError, match="the gradient of model.embed_tokens.weight is not finite"):
        gather_gradients(model, CALIB, NAMES)
