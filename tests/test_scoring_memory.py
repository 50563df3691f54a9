"""What scoring holds in memory: the model, one set of gradients, the activations of one batch."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prunekit import HyWIA, Taylor, discover, score
from prunekit.gradients import gather_gradients


def _peak(work):
    """Most bytes of torch memory that work held at once beyond what there was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        work()
    held = peak = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def _wide_llama():
    """A LLaMA whose weights take more memory than the activations of a few tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=6, hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=128, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.slow
@pytest.mark.parametrize("importance", [Taylor(), Taylor("vector"), HyWIA()])
def test_scoring_holds_one_set_of_gradients_and_one_batch(importance, monkeypatch):
    """However many batches there are; the model itself is not copied."""
    model = _wide_llama()
    groups = discover(model)
    units, calib = groups.of_kind("kv_head", "ffn_channel"), torch.randint(0, 128, (16, 32))
    monkeypatch.setattr("prunekit.calibration.TOKENS_A_BATCH", 32)
    chosen = {member.parameter for group in units for member in group.members}
    gradients = sum(p.numel() * 4 for name, p in model.named_parameters() if name in chosen)
    batch = _peak(lambda: model(input_ids=calib[:1], labels=calib[:1]).loss.item())
    largest = max(p.numel() * 4 for p in model.parameters())
    peak = _peak(lambda: score(model, units, importance, calib))
    assert gradients < peak < gradients + 1.5 * batch + 4 * largest  # at most four copies of one weight on the way
    assert peak < 1.5 * gradients


def test_checkpointing_where_asked_gives_the_same_gradients_in_less_memory():
    model, calib = _wide_llama(), torch.randint(0, 128, (2, 256))
    name, seen = "model.layers.0.mlp.up_proj.weight", []
    hook = model.model.layers[3].mlp.register_forward_pre_hook(lambda *_: seen.append(1))
    found, peaks = [], []
    for ask in (lambda: None, model.gradient_checkpointing_enable):
        ask()
        seen.clear()
        peaks.append(_peak(lambda: found.append(gather_gradients(model, calib, [name]))))
    hook.remove()
    torch.testing.assert_close(found[1].g[name], found[0].g[name])
    assert len(seen) == 2  # forward once, and once again on the way back
    assert peaks[1] < 0.6 * peaks[0]
    assert not any("forward" in vars(layer) for layer in model.model.layers)
