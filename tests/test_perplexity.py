import math

import pytest
import torch
from evaluation_helpers import N_POSITIONS, TEXT, bloom, byte_tokenizer, gpt2, llama, opt, sums_alone
from hypothesis import given
from hypothesis import strategies as st
from shared import real_model, shared_path
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from prunekit.errors import PrunekitError
from prunekit.evaluation import measure_perplexity, perplexity
from prunekit.evaluation.likelihood import Span
from prunekit.evaluation.sequence_scores import log_likelihoods
from prunekit.evaluation.windows import cut_windows
from prunekit.text import leading_bos


def by_hand(model, windows):
    """exp of the mean loss, one window at a time: [(tokens, first scored position)]."""
    nll, n = 0.0, 0
    with torch.no_grad():
        for tokens, start in windows:
            log_p = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
            nll -= sum(log_p[i - 1, tokens[i]].item() for i in range(start, len(tokens)))
            n += len(tokens) - start
    return math.exp(nll / n), n


def ids_of(text):
    return byte_tokenizer(adds_bos=False)(text)["input_ids"]


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_every_window_begins_with_bos_and_all_tokens_of_the_text_are_scored(build, batch_size):
    model, ids = build(), ids_of(TEXT)
    expected, n_tokens = by_hand(model, [([0, *ids[i : i + 49]], 1) for i in range(0, len(ids), 49)])
    result = measure_perplexity(model, byte_tokenizer(), TEXT, window=50, batch_size=batch_size)
    assert len(ids) % 49 > 1, "the last window is to be a short one"
    assert result.value == pytest.approx(expected, rel=1e-6)
    assert result.n_tokens == n_tokens == len(ids)
    assert (result.window, result.stride, result.bos, result.protocol) == (50, None, True, "windows")
    assert result.description == "non-overlapping windows of 50 over the whole text, BOS first in each"


def test_each_module_has_its_own_mode_afterwards():
    """A frozen part that was in evaluation mode inside a model in training stays there."""
    model = llama().train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    perplexity(model, byte_tokenizer(), TEXT)
    assert {name: module.training for name, module in model.named_modules()} == before


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), byte_tokenizer(adds_bos=False)], ids=["adds BOS", "does not"])
def test_the_papers_protocol_has_no_bos_whatever_the_tokenizer_does(tokenizer):
    model, ids = llama(), ids_of(TEXT)
    expected, n_tokens = by_hand(model, [(ids[i : i + 50], 1) for i in range(0, len(ids), 50)])
    result = measure_perplexity(model, tokenizer, TEXT, window=50, protocol="papers")
    assert result.value == pytest.approx(expected, rel=1e-6)
    assert result.n_tokens == n_tokens == len(ids) - math.ceil(len(ids) / 50)
    assert result.description.endswith("no BOS (the papers' protocol)") and not result.bos


def test_strided_windows_score_every_token_once():
    model, ids = llama(), ids_of(TEXT)
    windows = [([0, *ids[:39]], 1)] + [([0, *ids[i : i + 39]], 25) for i in range(15, len(ids) - 24, 15)]
    expected, n_tokens = by_hand(model, windows)
    result = measure_perplexity(model, byte_tokenizer(), TEXT, window=40, stride=15)
    assert result.value == pytest.approx(expected, rel=1e-6)
    assert result.n_tokens == n_tokens == len(ids)
    assert "strided by 15" in result.description


@given(st.integers(0, 40), st.integers(2, 12), st.none() | st.integers(1, 12), st.sampled_from([None, 99]))
def test_bos_is_first_in_each_window_and_nowhere_else_and_no_token_is_scored_twice(n, window, stride, bos):
    stride = stride and min(stride, window)
    spans = cut_windows(range(n), window, stride, bos)
    assert all(len(span.tokens) <= window for span in spans)
    scored = [token for span in spans for token in span.tokens[span.start :]]
    if bos is None:
        assert all(99 not in span.tokens for span in spans)
        firsts = range(0, n, window) if stride in (None, window) else range(1)
        assert scored == [token for token in range(n) if token not in firsts]
    else:
        assert all(span.tokens[0] == 99 and 99 not in span.tokens[1:] for span in spans)
        assert scored == list(range(n))


@pytest.mark.parametrize(("n", "window", "stride"), [(7, 3, 1), (12, 5, 4), (5, 5, 2), (13, 4, 3), (2, 2, 1)])
def test_strided_windows_have_context_and_no_token_twice(n, window, stride):
    spans = cut_windows(range(n), window, stride)
    scored = [token for span in spans for token in span.tokens[span.start :]]
    assert scored == list(range(1, n))
    assert all(len(span.tokens) <= window and span.start >= min(window - stride, span.tokens[0] + 1) for span in spans)


def test_a_last_window_of_one_token_scores_nothing():
    assert [span.n_scored for span in cut_windows(range(9), 4)] == [3, 3]


def test_documents_are_scored_one_by_one_and_long_ones_in_windows():
    model = llama()
    texts = ["a short one", "another", "a very long one " * 12]
    pieces, step = [ids_of(text.strip()) for text in texts], N_POSITIONS - 1
    windows = [([0, *ids[i : i + step]], 1) for ids in pieces for i in range(0, len(ids), step)]
    expected, n_tokens = by_hand(model, windows)
    joined = "\n<|end|>\n".join(texts) + "<|end|>"
    result = measure_perplexity(model, byte_tokenizer(), joined, protocol="documents", separator="<|end|>")
    assert result.value == pytest.approx(expected, rel=1e-6)
    assert result.n_tokens == n_tokens
    assert "split at '<|end|>'" in result.description


def test_bos_goes_by_the_tokenizer_unless_it_is_told():
    model, (adds, knows, has_none) = llama(), (byte_tokenizer(), byte_tokenizer(False), byte_tokenizer(bos=None))
    results = [measure_perplexity(model, tokenizer, TEXT, window=64) for tokenizer in (adds, knows, has_none)]
    assert [result.bos for result in results] == [True, False, False]
    assert results[1].value == results[2].value == measure_perplexity(model, adds, TEXT, window=64, bos=False).value
    assert results[0].value == measure_perplexity(model, knows, TEXT, window=64, bos=True).value != results[1].value


def test_bos_is_seen_also_where_it_stands_for_unknown_words():
    inner = Tokenizer(models.WordLevel({"<s>": 0, "w": 1}, unk_token="<s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")
    assert tokenizer("a")["input_ids"] == [0] and leading_bos(tokenizer) is None
    assert leading_bos(tokenizer, True) == 0


def test_default_window_is_128_and_no_more_than_the_model_takes():
    roomy = llama(max_position_embeddings=512)
    assert measure_perplexity(roomy, byte_tokenizer(), TEXT).window == 128
    assert measure_perplexity(llama(), byte_tokenizer(), TEXT).window == N_POSITIONS


def test_a_path_is_read_and_the_function_gives_the_results_value(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    model = llama()
    value = perplexity(model, byte_tokenizer(), path, window=60)
    assert value == perplexity(model, byte_tokenizer(), str(path), window=60)
    assert value == perplexity(model, byte_tokenizer(), TEXT, window=60)


def test_the_model_keeps_its_mode():
    model = llama().train()
    perplexity(model, byte_tokenizer(), TEXT, window=60)
    assert model.training


@pytest.mark.parametrize("build", [llama, gpt2, bloom, opt])
def test_what_several_spans_share_changes_nothing(build):
    model = build()
    spans = [Span((5, 6, 7, 9), 3), Span((5, 6, 7, 3, 4, 8), 3), Span((5, 6, 9), 2), Span((5, 6, 9, 1), 1)]
    spans += [Span((4, 6, 7, 3), 3), Span((4, 6, 7, 2, 2), 3)]
    together = log_likelihoods(model, spans, batch_size=8).sums
    torch.testing.assert_close(together, sums_alone(model, spans), rtol=1e-5, atol=0)


REFUSED = {
    "empty text": ({"text": ""}, "holds no text"),
    "white space": ({"text": " \n"}, "holds no text"),
    "shorter than a window": ({"text": "short", "window": 50}, "6 tokens, less than one window of 50"),
    "missing file": ({"text": "no/such/file.txt"}, "is not a file"),
    "window too long": ({"window": 200}, f"at most {N_POSITIONS}"),
    "window too short": ({"window": 1}, "window=1 is not allowed; give an integer of 2"),
    "document window": ({"window": 0, "protocol": "documents"}, "window=0 is not allowed"),
    "stride": ({"window": 40, "stride": 41}, "between 1 and the window"),
    "stride 0": ({"window": 40, "stride": 0}, "stride=0 is not allowed"),
    "protocol": ({"protocol": "sentences"}, "'windows', 'documents', 'papers'"),
    "BOS in the papers' windows": ({"bos": True, "protocol": "papers"}, "protocol='windows'"),
    "strided papers' windows": ({"stride": 3, "protocol": "papers"}, "stride=3.*protocol='windows'"),
    "BOS where there is none": ({"bos": True, "tokenizer": byte_tokenizer(bos=None)}, "no BOS token"),
    "separator in windows": ({"separator": "."}, "protocol='documents'"),
    "separator missing": ({"separator": "<|>", "protocol": "documents"}, "does not occur"),
    "separator empty": ({"separator": "", "protocol": "documents"}, "does not occur"),
    "only separators": ({"text": "<|><|>", "separator": "<|>", "protocol": "documents"}, "contains only"),
    "one token each": ({"text": "a b", "separator": " ", "protocol": "documents", "bos": False}, "single token"),
    "batch size": ({"window": 40, "batch_size": 0}, "batch_size=0 is not allowed"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused(options, message):
    options = dict(options)
    with pytest.raises(PrunekitError, match=message):
        perplexity(llama(), options.pop("tokenizer", byte_tokenizer()), options.pop("text", TEXT), **options)


def test_nan_weights_are_named():
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(PrunekitError, match=r"not finite.*layers\.1\.mlp\.up_proj\.weight"):
        perplexity(model, byte_tokenizer(), TEXT, window=60)


def test_overflow_with_finite_weights_says_so():
    model = llama().half()
    model.lm_head.weight.data[:] = 6e4
    model.model.norm.weight.data[:] = 6e4
    with pytest.raises(PrunekitError, match="all weights are finite.*float32"):
        perplexity(model, byte_tokenizer(), TEXT, window=60)


def test_a_foreign_tokenizer_is_refused():
    with pytest.raises(PrunekitError, match="belongs to another model"):
        perplexity(llama(vocab_size=40), byte_tokenizer(), TEXT, window=60)


@pytest.fixture(scope="module")
def stories():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = shared_path("models", "stories260K")
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize(
    ("options", "expected", "n_tokens"),
    [
        ({"protocol": "documents", "separator": "<|endoftext|>"}, 3.548, 1804),
        ({"protocol": "papers"}, 6.294, 1867),
        ({}, 7.537, 1882),
    ],
    ids=["stories", "the papers' windows", "windows with BOS"],
)
def test_a_real_model_has_its_known_perplexity(stories, options, expected, n_tokens):
    result = measure_perplexity(*stories, shared_path("data", "tinystories", "sample_cs336.txt"), **options)
    assert result.value == pytest.approx(expected, abs=2e-3)
    assert result.n_tokens == n_tokens


@pytest.mark.slow
def test_gemma_has_the_perplexity_of_a_plain_loop_over_windows():
    model, tokenizer = real_model("gemma")
    text = shared_path("data", "tinystories", "sample_niklas6.txt").read_text(encoding="utf-8")[:4000]
    bos, *ids = tokenizer(text)["input_ids"]
    expected, n_tokens = by_hand(model, [([bos, *ids[i : i + 127]], 1) for i in range(0, len(ids), 127)])
    result = measure_perplexity(model, tokenizer, text)
    assert result.value == pytest.approx(expected, rel=1e-4) and result.value == pytest.approx(13.3, abs=0.1)
    assert (result.n_tokens, result.bos) == (n_tokens, True)
    assert perplexity(model, tokenizer, text, protocol="papers") == pytest.approx(78.6, abs=0.1)
