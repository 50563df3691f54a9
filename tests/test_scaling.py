"""The formulas of docs/scaling.md agree with models, and its figures with the formulas."""

import re

import pytest
import torch
from shared import ROOT
from transformers import LlamaConfig, LlamaForCausalLM

import prunekit as pk
from prunekit.models import count_parameters, empty_model
from prunekit.recovery.lora import attach

PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
PAGES_OWN: dict = {}
exec(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], PAGES_OWN)  # type: ignore[index]
SHAPES = PAGES_OWN["SHAPES"]
SMALL = (256, 128, 640, 3, 512)


def config(h, kv, f, layers, v):
    widths = {"hidden_size": h, "intermediate_size": f, "vocab_size": v}
    heads = {"num_attention_heads": h // 64, "num_key_value_heads": kv // 64}
    return LlamaConfig(num_hidden_layers=layers, **widths, **heads)


def small(layers=SMALL[3], dtype=torch.float32):
    torch.manual_seed(0)
    return LlamaForCausalLM(config(*SMALL[:3], layers, SMALL[4])).to(dtype).train()


def kept_for_backward(model):
    """Bytes a token that the backward pass reads, besides parameters."""
    ids = torch.randint(SMALL[4], (2, 64))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert loss.requires_grad
    return sum(n for n, _ in found.values()) / ids.numel()


def a_layer(make):
    return (kept_for_backward(make(3)) - kept_for_backward(make(1))) / 2


def layers_of(formula):
    return (PAGES_OWN[formula](*SMALL) - PAGES_OWN[formula](*SMALL[:3], 1, SMALL[4])) / 2


@pytest.mark.parametrize("shape", [SMALL, *SHAPES.values()])
def test_parameters_are_those_of_the_model(shape):
    assert PAGES_OWN["parameters"](*shape) == count_parameters(empty_model(config(*shape)))


def test_pairs_are_those_that_lora_trains():
    adapted = attach(small(), pk.LoRA(r=8))
    assert PAGES_OWN["lora"](*SMALL) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_adamw_keeps_two_means_for_each_parameter():
    model = small()
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    means = [t for state in optimizer.state.values() for t in state.values() if t.dim() > 0]
    tensors = [*model.parameters(), *(p.grad for p in model.parameters()), *means]
    assert PAGES_OWN["full_training"](*SMALL) == sum(t.nbytes for t in tensors)


def test_activations_are_those_that_the_backward_pass_reads():
    assert a_layer(small) == pytest.approx(layers_of("full_activations"), rel=0.01)
    h, _, f, *_ = SMALL
    masks_of_cpus = 3 * (6 * h + f)  # numbers of four bytes, where a GPU has one
    found = a_layer(lambda layers: attach(small(layers, torch.bfloat16), pk.LoRA(r=8)).train())
    assert found == pytest.approx(layers_of("lora_activations") + masks_of_cpus, rel=0.01)


def test_the_figures_of_the_page_are_those_of_its_formulas():
    rows = re.findall(r"^\| (\D.*?) \| ([\d,]+) \| ([\d,]+) \|$", PAGE, re.MULTILINE)
    figures = {name.split(",")[0]: [int(n.replace(",", "")) for n in found] for name, *found in rows}
    formulas = {
        "weights in bfloat16": lambda *shape: 2 * PAGES_OWN["parameters"](*shape),
        "score by Taylor": PAGES_OWN["taylor"],
        "score by curvature": PAGES_OWN["curvature"],
        "with the weights on the disk (`--streaming`)": PAGES_OWN["streamed_curvature"],
        "LoRA": PAGES_OWN["lora_training"],
        "full fine-tuning in float32": PAGES_OWN["full_training"],
        "activations with LoRA": lambda *shape: 1024 * PAGES_OWN["lora_activations"](*shape),
        "activations with full fine-tuning": lambda *shape: 1024 * PAGES_OWN["full_activations"](*shape),
    }
    assert figures == {name: [round(f(*shape) / 1e9) for shape in SHAPES.values()] for name, f in formulas.items()}
