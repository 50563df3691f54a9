"""Packed rows: the tree is right, sums are those of the plain scorer in every family, and where packing is refused."""

import pytest
import torch
from evaluation_helpers import llama, sums_alone
from families import FAMILIES, VOCABULARY, Unrounded
from hypothesis import given, settings
from hypothesis import strategies as st

from prunekit.evaluation import likelihood, sequence_scores
from prunekit.evaluation.likelihood import Span, pack, unpacked
from prunekit.evaluation.sequence_scores import (
    choose_reading,
    log_likelihoods,
    packed_batches,
    plain_batches,
    span_sums,
)
from prunekit.knowledge.question_spans import Runner

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
        assert len(row.tokens) == len(row.parents) <= max(width, likelihood.GROWTH * longest)
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
        expected = sums_alone(model, spans)
        reading, computed = choose_reading(model, spans, 64, runs=9), []
        head = model.get_output_embeddings()
        with head.register_forward_hook(lambda _module, _args, out: computed.append(out.shape[:-1].numel())):
            found = span_sums(model, reading.batches(model), len(spans), reading.gathers)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        assert computed == [len(batch.places) for batch in reading.batches(model)]  # logits where something is scored
        for full in (1.0, 0.3):
            plain = span_sums(model, plain_batches(model, spans, unpacked(spans), 64, full), len(spans), gathers=False)
            torch.testing.assert_close(plain, expected, rtol=1e-10, atol=1e-10)
        runner = Runner(model, spans, 64)
        for layer in (0, 1):
            torch.testing.assert_close(runner.sums((layer,)), expected, rtol=1e-10, atol=1e-10)
    assert reading.packed == (name not in PLAIN) and runner.resumed and reading.gathers


@pytest.mark.parametrize("told", [True, False])
def test_a_window_of_attention_that_ends_is_noticed(told, monkeypatch):
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
    if not told:
        monkeypatch.setattr(sequence_scores, "_attention_window", lambda model: 999)
    spans = random_spans(n=48, longest=12)
    inside = [span for span in spans if len(span.tokens) <= 5] * 4
    with Unrounded(), torch.no_grad():
        for asked, packs in ((spans, False), (inside, True)):
            reading = choose_reading(model, asked, 64, runs=9)
            found = span_sums(model, reading.batches(model), len(asked), reading.gathers)
            torch.testing.assert_close(found, sums_alone(model, asked), rtol=1e-10, atol=1e-10)
            assert reading.packed == packs and (reading.n_tried > 0) == (packs or not told)


def test_a_model_that_raises_at_the_mask_falls_back_to_plain_rows():
    class Picky(type(llama())):
        def forward(self, input_ids=None, **kwargs):
            if "position_ids" in kwargs:
                raise TypeError("unexpected")
            return super().forward(input_ids=input_ids, **kwargs)

    model, spans = llama(), random_spans()
    model.__class__ = Picky
    with torch.no_grad():
        reading = choose_reading(model, spans, 64, runs=9)
    assert not reading.packed and len(reading.rows) == len(unpacked(spans))


def test_nothing_is_packed_where_nothing_is_shared():
    spans = [Span((n, *range(likelihood.ROW)), 4) for n in range(3)]
    with torch.no_grad():
        reading = choose_reading(llama(max_position_embeddings=256), spans, 512)
    assert not reading.packed and reading.n_tried == 0


def test_packing_is_tried_only_where_it_saves_more_than_that_takes():
    model, spans = llama(), random_spans()
    with torch.no_grad():
        assert not choose_reading(model, spans, 64).packed
        reading = choose_reading(model, [span for span in spans for _ in range(2)], 64, runs=9)
    assert reading.packed and reading.n_tried > 0


def test_a_head_whose_output_is_mixed_afterwards_is_applied_everywhere():
    class Centred(type(llama())):
        def forward(self, *args, **kwargs):
            found = super().forward(*args, **kwargs)
            found.logits = found.logits - found.logits.mean(1, keepdim=True)
            return found

    model, spans = llama(), random_spans()
    with torch.no_grad():
        assert choose_reading(model, spans, 64, runs=9).gathers
        model.__class__ = Centred
        assert not choose_reading(model, spans, 64, runs=9).gathers
        torch.testing.assert_close(
            log_likelihoods(model, spans[:1], batch_size=8).sums, sums_alone(model, spans[:1]), rtol=1e-5, atol=1e-5
        )


def test_what_is_greedy_and_what_was_run_are_told():
    model, spans = llama(), random_spans(vocabulary=258)
    with torch.no_grad():
        best = [int(model(torch.tensor([span.tokens[:-1]])).logits[0, -1].argmax()) for span in spans]
    likeliest = [
        Span((*span.tokens[:-1], token), len(span.tokens) - 1) for span, token in zip(spans, best, strict=True)
    ]
    again = [Span((*span.tokens[:-1], (token + 1) % 258), span.start) for span, token in zip(spans, best, strict=True)]
    found = log_likelihoods(model, likeliest + again, batch_size=4)
    assert found.greedy.tolist() == [True] * len(spans) + [False] * len(spans)
    assert found.n_tokens == 2 * sum(len(span.tokens) - 1 for span in spans)
    alone = log_likelihoods(model, likeliest[:1], batch_size=4)
    assert alone.n_computed == alone.n_tokens == len(likeliest[0].tokens) - 1


def test_the_choices_of_a_question_share_a_row_and_many_questions_a_long_beginning():
    draw = torch.Generator().manual_seed(3)
    some = lambda k: tuple(torch.randint(0, 99, (k,), generator=draw).tolist())  # noqa: E731
    spans = [Span((*context, *some(20)), 30) for context in [some(60) for _ in range(20)] for _ in range(4)]
    assert all(len(row.paths) % 4 == 0 for row in pack(spans))
    assert 0.95 < sum(len(row.tokens) for row in pack(spans)) / (20 * (60 + 4 * 19)) <= 1
    shots = some(600)
    spans = [Span((*shots, *some(50)), 640) for _ in range(60)]
    sizes = [len(row.tokens) for row in pack(spans)]
    assert len(sizes) == 3 and max(sizes) <= likelihood.GROWTH * 600
    assert max(len(row.tokens) for row in pack(spans, widest=1000)) <= 1000


@pytest.mark.parametrize("tokens_a_batch", [1, 40, 4096])
def test_the_size_of_batches_changes_nothing(tokens_a_batch):
    model, spans = FAMILIES["llama_gqa"].model(), random_spans()
    with Unrounded(), torch.no_grad():
        batches = list(packed_batches(model, spans, pack(spans, 16), tokens_a_batch))
        found = span_sums(model, batches, len(spans), gathers=True)
        torch.testing.assert_close(found, sums_alone(model, spans), rtol=1e-10, atol=1e-10)
    assert tokens_a_batch < 4096 or len(batches) < len(pack(spans, 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_coarser_numbers_are_packed_as_well(dtype):
    model = FAMILIES["llama_gqa"].model(dtype=dtype)
    with torch.no_grad():
        assert choose_reading(model, random_spans(), 64, runs=9).packed
