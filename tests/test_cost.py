import pytest
import torch
from evaluation_helpers import N_POSITIONS, gpt2, llama
from peft import LoraConfig, get_peft_model

from prunekit.compat import cache_name
from prunekit.errors import PrunekitError
from prunekit.evaluation import Cost, cost
from prunekit.evaluation.footprint import LiveBytes, time_decode, time_prefill

SEQ, HIDDEN, FFN, VOCABULARY, HEADS, KV_HEADS, D_HEAD, LAYERS = 32, 32, 48, 258, 4, 2, 8, 2


def macs_by_hand(batch=1):
    projections = HIDDEN * D_HEAD * (2 * HEADS + 2 * KV_HEADS)
    attention = 2 * SEQ * HEADS * D_HEAD
    layer = projections + attention + 3 * HIDDEN * FFN
    return batch * SEQ * (LAYERS * layer + HIDDEN * VOCABULARY)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_macs_are_those_counted_by_hand(attention):
    model = llama(attn_implementation=attention)
    rotary = SEQ * D_HEAD // 2  # older versions of transformers make the angles by a matrix product
    assert cost(model, seq_len=SEQ, repeats=1).macs - macs_by_hand() in (0, rotary)
    assert cost(model, seq_len=SEQ, batch_size=3, repeats=1).macs - macs_by_hand(3) in (0, rotary, 3 * rotary)


def test_narrower_layers_cost_less():
    model = llama()
    dense = cost(model, seq_len=SEQ, repeats=1)
    mlp = model.model.layers[0].mlp
    for name, width in (("gate_proj", (20, HIDDEN)), ("up_proj", (20, HIDDEN)), ("down_proj", (HIDDEN, 20))):
        setattr(mlp, name, torch.nn.Linear(width[1], width[0], bias=False))
    cut = cost(model, seq_len=SEQ, repeats=1)
    assert dense.macs - cut.macs == SEQ * 3 * HIDDEN * (FFN - 20)
    assert dense.n_parameters - cut.n_parameters == 3 * HIDDEN * (FFN - 20)
    assert dense.weight_bytes - cut.weight_bytes == 4 * 3 * HIDDEN * (FFN - 20)
    assert cut.peak_bytes < dense.peak_bytes


def test_tied_parameters_count_once():
    model = gpt2()
    found = cost(model, seq_len=SEQ, repeats=1)
    tied = model.lm_head.weight.numel()
    assert found.n_parameters == sum(p.numel() for p in model.state_dict().values()) - tied
    assert found.weight_bytes == 4 * found.n_parameters + sum(b.nbytes for b in model.buffers())


def test_peak_memory_does_not_depend_on_what_ran_before():
    model = llama()
    first, second = (cost(model, seq_len=SEQ, repeats=1) for _ in range(2))
    assert first.peak_bytes == second.peak_bytes
    logits = 4 * SEQ * VOCABULARY
    assert first.weight_bytes + logits < first.peak_bytes < first.weight_bytes + 3 * logits
    assert cost(model, seq_len=SEQ, batch_size=4, repeats=1).peak_bytes > first.peak_bytes + 2 * logits
    assert "scratch" in first.peak_measured


def test_live_bytes_forget_what_is_gone():
    weight = torch.zeros(100)
    with LiveBytes([weight]) as live:
        one = weight + 1
        del one
        two = (weight * 2)[:50].view(5, 10)
    assert live.peak == 400
    assert two.shape == (5, 10)


def test_latency_is_the_median_in_milliseconds_after_warming_up(monkeypatch):
    """A clock that stands still but for what the model is told to take."""
    now, delays = [0.0], iter([9, 9, 0.02, 0.04, 0.03])
    monkeypatch.setattr("prunekit.evaluation.footprint.time.perf_counter", lambda: now[0])

    def model(input_ids, use_cache):
        now[0] += next(delays)

    found = time_prefill(model, torch.zeros(1, 4, dtype=torch.long), repeats=3)
    assert (found.p10, found.median, found.p90) == pytest.approx((22, 30, 38))


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("prompt", [4, N_POSITIONS])
def test_decoding_feeds_one_token_to_a_growing_cache(prompt, adapted):
    model, seen = llama(), []

    def note(module, args, kwargs):
        cache = kwargs.get(cache_name(kwargs) or "")
        seen.append((kwargs["input_ids"].shape[1], cache.get_seq_length() if cache is not None else 0))

    model.register_forward_pre_hook(note, with_kwargs=True)
    if adapted:  # whose signature names no cache
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        time_decode(model, torch.zeros(1, prompt, dtype=torch.long), repeats=4)
    start = min(prompt, N_POSITIONS - 6)
    assert seen == [(start, 0)] + [(1, start + i) for i in range(6)]


def test_decoding_starts_again_where_the_context_is_short():
    model, seen = llama(max_position_embeddings=4), []
    model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].shape[1]), with_kwargs=True)
    with torch.no_grad():
        time_decode(model, torch.zeros(1, 4, dtype=torch.long), repeats=4)
    assert len(seen) == 8


def test_the_model_stays_as_it_was_and_the_result_is_plain():
    model = llama().train()
    found = cost(model, repeats=2)
    assert model.training
    assert (found.seq_len, found.batch_size, found.repeats, found.device) == (64, 1, 2, "cpu")
    assert Cost.from_dict(found.to_dict()) == found
    assert "MACs for 1 × 64 tokens" in repr(found)
    assert cost(model, device="cpu", repeats=1).n_parameters == found.n_parameters


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_counts_the_same_and_leaves_the_model_on_the_cpu():
    model = llama()
    here, there = cost(model, seq_len=SEQ), cost(model, seq_len=SEQ, device="cuda")
    assert (here.macs, here.n_parameters, here.weight_bytes) == (there.macs, there.n_parameters, there.weight_bytes)
    assert there.peak_bytes > there.weight_bytes
    assert there.prefill.median > 0
    assert "CUDA" in there.peak_measured
    assert next(model.parameters()).device.type == "cpu"


REFUSED = {
    "seq_len": ({"seq_len": 0}, "seq_len=0"),
    "batch_size": ({"batch_size": 0}, "batch_size=0"),
    "repeats": ({"repeats": 0}, "repeats=0"),
    "too long": ({"seq_len": N_POSITIONS + 1}, f"at most {N_POSITIONS}"),
    "no such device": ({"device": "toaster"}, "device='toaster'"),
    "no numbers": ({"device": "meta"}, "device='meta' cannot be used: it keeps shapes"),
    "no device there": ({"device": "cuda:77"}, "device='cuda:77' cannot be used"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused(options, message):
    with pytest.raises(PrunekitError, match=message):
        cost(llama(), **options)


def test_a_model_of_one_position_cannot_decode():
    with pytest.raises(PrunekitError, match="no next one"):
        cost(llama(max_position_embeddings=1), seq_len=1)


def test_the_cost_of_a_large_model_is_read_again():
    large = cost(llama(), seq_len=4, repeats=1).to_dict() | {"macs": 8_600_000_000, "n_parameters": 7 * 10**9}
    assert Cost.from_dict(large).macs == 8_600_000_000
