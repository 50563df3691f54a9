"""Packed rows: the tree is right, sums are those of the plain scorer in every family, and where packing is refused."""

import pytest
import torch
from evaluation_helpers import llama
from families import FAMILIES, VOCABULARY, Unrounded
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit.evaluation import packing
from prunekit.evaluation.likelihood import Span, log_likelihoods
from prunekit.evaluation.packing import choose_batches, pack, packed_batches, plain_batches, span_sums, unpacked
from prunekit.knowledge.running import Runner

PLAIN = {"bloom", "falcon_alibi", "mpt"}  # ALiBi counts places, not positions


def random_spans(n=24, longest=12, vocabulary=VOCABULARY, seed=5):
    """Contexts that many share, each with a few endings, some of them alike."""
    draw = torch.Generator().manual_seed(seed)
    some = lambda k: torch.randint(1, vocabulary, (k,), generator=draw).tolist()  # noqa: E731
    contexts = [some(2 + i % (longest - 4)) for i in range(n // 4)]
    return [Span((*contexts[i % len(contexts)], *some(1 + i % 3)), len(contexts[i % len(contexts)])) for i in range(n)]


sequences = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=9), min_size=1, max_size=30)


@settings(deadline=None, max_examples=60)
@given(sequences, st.integers(1, 20))
def test_every_spans_nodes_spell_its_tokens(lists, width):
    spans = [Span(tuple(tokens), 1 + len(tokens) // 3) for tokens in lists]
    rows = pack(spans, width)
    assert sorted(span for row in rows for span in row.paths) == [*range(len(spans))]
    for row in rows:
        depths, seen = row.depths(), row.visible(len(row.tokens) + 2)
        longest = max(map(len, row.paths.values()))
        assert len(row.tokens) == len(row.parents) <= max(width, longest)
        assert seen[-1].nonzero()[0].tolist() == [len(row.tokens) + 1]
        for span, path in row.paths.items():
            assert tuple(row.tokens[node] for node in path) == spans[span].tokens[:-1]
            assert [depths[node] for node in path] == [*range(len(path))]
            for place, node in enumerate(path):
                assert seen[node].nonzero()[0].tolist() == path[: place + 1]
        prefixes = {
            tuple(row.tokens[n] for n in path[: k + 1]) for path in row.paths.values() for k in range(len(path))
        }
        assert len(row.tokens) == len(prefixes)  # nothing stands twice in a row


def test_spans_that_read_the_same_share_a_plain_row():
    spans = [Span((1, 2, 3), 2), Span((1, 2, 4), 2), Span((1, 3, 4), 2)]
    assert [sorted(row.paths) for row in unpacked(spans)] == [[0, 1], [2]]


@pytest.mark.parametrize("name", FAMILIES)
def test_sums_are_those_of_the_plain_scorer_and_what_packs_is_known(name):
    """In float64 throughout, so that a mask that leaks cannot pass for rounding; resumed at layers, too."""
    model, spans = FAMILIES[name].model(), random_spans()
    with Unrounded(), torch.no_grad():
        expected = log_likelihoods(model, spans, batch_size=8)
        batches, packed = choose_batches(model, spans, 64)
        torch.testing.assert_close(span_sums(model, batches, len(spans)), expected, rtol=1e-10, atol=1e-10)
        plain = span_sums(model, plain_batches(model, spans, 64), len(spans))
        torch.testing.assert_close(plain, expected, rtol=1e-10, atol=1e-10)
        runner = Runner(model, spans, 64)
        for layer in (0, 1):
            torch.testing.assert_close(runner.sums((layer,)), expected, rtol=1e-10, atol=1e-10)
    assert packed == (name not in PLAIN) and runner.resumed


def test_a_window_of_attention_that_ends_is_noticed():
    """Mistral's mask of its own ends after 4 tokens, the one that is handed over does not."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    model = MistralForCausalLM(MistralConfig(vocab_size=48, sliding_window=4, **sizes)).double().eval()
    for spans, packed in ((random_spans(longest=12), False), (random_spans(longest=5), None)):
        with Unrounded(), torch.no_grad():
            batches, chosen = choose_batches(model, spans, 64)
            expected = log_likelihoods(model, spans, batch_size=8)
            torch.testing.assert_close(span_sums(model, batches, len(spans)), expected, rtol=1e-10, atol=1e-10)
        assert packed is None or chosen == packed


def test_a_model_that_raises_at_the_mask_falls_back_to_plain_rows():
    class Picky(type(llama())):
        def forward(self, input_ids=None, **kwargs):
            if "position_ids" in kwargs:
                raise TypeError("unexpected")
            return super().forward(input_ids=input_ids, **kwargs)

    model = llama()
    model.__class__ = Picky
    with torch.no_grad():
        batches, packed = choose_batches(model, random_spans(), 64)
    assert not packed and all([*batch.inputs] == ["input_ids"] for batch in batches)


def test_nothing_is_packed_where_the_trial_could_not_fail():
    """All spans long and apart: a row each, so that there is nothing to share and nothing to see."""
    spans = [Span((n, *range(packing.ROW)), 4) for n in range(3)]
    with torch.no_grad():
        assert not choose_batches(llama(max_position_embeddings=256), spans, 512)[1]


@pytest.mark.parametrize("tokens_a_batch", [1, 40, 4096])
def test_the_size_of_batches_changes_nothing(tokens_a_batch):
    model, spans = FAMILIES["llama_gqa"].model(), random_spans()
    with Unrounded(), torch.no_grad():
        expected = log_likelihoods(model, spans, batch_size=8)
        batches = packed_batches(model, spans, pack(spans, 16), tokens_a_batch)
        torch.testing.assert_close(span_sums(model, batches, len(spans)), expected, rtol=1e-10, atol=1e-10)
    assert tokens_a_batch < 4096 or len(batches) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_coarser_numbers_are_packed_as_well(dtype):
    model = FAMILIES["llama_gqa"].model(dtype=dtype)
    with torch.no_grad():
        assert choose_batches(model, random_spans(), 64)[1]
