"""Models that accelerate has spread over devices: the same results, or a refusal before anything is touched.

A machine without a GPU has two places for weights, memory and disk. Modules with accelerate's hooks but all weights in
memory stand for a model on several GPUs: its forward passes run in the same way.
"""

import pandas as pd
import pytest
import torch
from accelerate import dispatch_model
from evaluation_helpers import TEXT, byte_tokenizer, choice_task, llama
from families import logits, plan_keeping
from transformers import AutoModelForCausalLM

import prunekit as pk
from prunekit import PrunekitError
from prunekit.cli import main

PARTS = ("embed_tokens", "norm", "rotary_emb", "layers.0", "layers.1", "layers.2")
IN_MEMORY = {"lm_head": "cpu", **{f"model.{part}": "cpu" for part in PARTS}}
CALIB = torch.randint(2, 250, (8, 16), generator=torch.Generator().manual_seed(0))
OFFLOADED = r"model\.layers\.1\.\S+ .*offloaded \(device_map\).* without device_map, or prune its folder with"
NO_WEIGHTS = r"no weights in model\.layers\.1\.mlp\.gate_proj\.weight \(meta device.*load the weights first"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("devices") / "m"
    llama(num_hidden_layers=3, head_dim=8).save_pretrained(path)
    return path


def in_memory(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def hooked(folder):
    return dispatch_model(in_memory(folder), IN_MEMORY, force_hooks=True)


def offloaded(folder):
    places = {**IN_MEMORY, "model.layers.1": "disk"}
    beside = folder.parent / "offloaded"
    return AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=beside).eval()


def partly_empty(folder):
    model = in_memory(folder)
    model.model.layers[1].mlp.to("meta")
    return model


def scored(model, importance, groups, calib=CALIB):
    return pk.score(model, groups.of_kind("kv_head", "ffn_channel"), importance, calib)


def plan(groups):
    keep = {g.name: list(range(1, g.n_units)) for g in groups.of_kind("kv_head", "ffn_channel")}
    return plan_keeping(groups, keep)


def without_layer(groups):
    return plan_keeping(groups, {"model.layers.0:layer": []})


def knowledge(model, groups):
    heads = groups.of_kind("kv_head")
    scores = {g.name: torch.arange(g.n_units).float() for g in heads}
    return pk.knowledge_distribution(model, byte_tokenizer(), heads, scores, tasks=[choice_task(6)]).table()


LORA = pk.LoRA(r=2, max_steps=2, batch_size=2)
WORK = {  # each of (model, groups of the model in memory)
    "magnitude": lambda model, groups: scored(model, pk.Magnitude(), groups, None),
    "taylor": lambda model, groups: scored(model, pk.Taylor(), groups),
    "activation": lambda model, groups: scored(model, pk.Activation(), groups),
    "curvature": lambda model, groups: scored(model, pk.Curvature(), groups),
    "prune": lambda model, groups: logits(pk.prune(model, plan(groups))),
    "prune inplace": lambda model, groups: logits(pk.prune(model, plan(groups), inplace=True)),
    "remove a layer": lambda model, groups: logits(pk.prune(model, without_layer(groups))),
    "compensate": lambda model, groups: logits(pk.prune(model, plan(groups), compensate=CALIB)),
    "sparsify by magnitude": lambda model, groups: logits(pk.sparsify(model, None, "magnitude", 0.5)),
    "sparsify by wanda": lambda model, groups: logits(pk.sparsify(model, CALIB, "wanda", 0.5)),
    "sparsify by sparsegpt": lambda model, groups: logits(pk.sparsify(model, CALIB, "sparsegpt", 0.5)),
    "recover": lambda model, groups: logits(pk.recover(model, LORA, CALIB)),
    "knowledge": knowledge,
}


def evaluated(model):
    options = {"text": TEXT, "tasks": [choice_task(6)], "perplexity_options": {"window": 32}}
    return pk.evaluate(model, byte_tokenizer(), ["perplexity", "zero_shot"], **options).to_json()


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, pd.DataFrame):
        return a.equals(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def weights(model):
    return {name: None if p.is_meta else p.detach().clone() for name, p in model.named_parameters()}


def check_untouched(model, before):
    after = weights(model)
    assert after.keys() == before.keys()
    assert all(a is before[n] is None or torch.equal(a, before[n]) for n, a in after.items())


@pytest.mark.parametrize("name", WORK)
def test_hooks_of_accelerate_change_no_result(name, folder):
    groups = pk.discover(in_memory(folder))
    assert same(WORK[name](hooked(folder), groups), WORK[name](in_memory(folder), groups))


@pytest.mark.parametrize(
    ("make", "message", "name"),
    [
        *((offloaded, OFFLOADED, name) for name in WORK),
        (partly_empty, NO_WEIGHTS, "prune"),
        (partly_empty, NO_WEIGHTS, "recover"),
    ],
)
def test_weights_that_are_elsewhere_are_refused_and_nothing_is_touched(make, message, name, folder):
    model, groups = make(folder), pk.discover(in_memory(folder))
    before = weights(model)
    with pytest.raises(PrunekitError, match=message):
        WORK[name](model, groups)
    check_untouched(model, before)


def test_load_spreads_a_model_and_reads_the_disk_in_place(folder, tmp_path):
    model, _ = pk.load(folder, device_map={**IN_MEMORY, "model.layers.1": "disk"})
    assert sum(p.is_meta for p in model.parameters()) == 9
    assert evaluated(model) == evaluated(in_memory(folder))
    with pytest.raises(PrunekitError, match=OFFLOADED):
        pk.save(model, tmp_path / "out")


@pytest.mark.parametrize("device_map", ["auto", {**IN_MEMORY, "model.layers.1": "disk"}])
def test_load_spreads_an_uneven_cut(device_map, folder, tmp_path):
    model = in_memory(folder)
    groups = pk.discover(model)
    uneven = {g.name: list(range(1 + n, g.n_units)) for n, g in enumerate(groups.of_kind("ffn_channel"))}
    small = pk.prune(model, plan_keeping(groups, uneven), measure=False)
    pk.save(small, tmp_path / "small")
    spread, _ = pk.load(tmp_path / "small", device_map=device_map, offload_folder=tmp_path / "beside")
    assert any(p.is_meta for p in spread.parameters()) == (device_map != "auto")
    assert evaluated(spread) == evaluated(small)
    if device_map == "auto":  # all of it lies in memory, so its configuration is as if it were loaded plainly
        with pytest.raises(PrunekitError, match="save_pretrained would write a folder that does not load"):
            spread.save_pretrained(tmp_path / "plain")
    else:
        with pytest.raises(
            PrunekitError, match="cannot spread the model of .* offload_folder= for weights on the disk"
        ):
            pk.load(tmp_path / "small", device_map=device_map)


def test_a_map_keeps_the_precision_of_the_file(folder, tmp_path):
    """The configuration of the uncut model may say another one, as after a training in float32."""
    model = in_memory(folder)
    model.config.dtype = torch.bfloat16
    groups = pk.discover(model)
    uneven = {g.name: list(range(1 + n, g.n_units)) for n, g in enumerate(groups.of_kind("ffn_channel"))}
    pk.save(pk.prune(model, plan_keeping(groups, uneven), measure=False), tmp_path / "small")
    for options in ({}, {"device_map": "auto"}):
        assert {p.dtype for p in pk.load(tmp_path / "small", **options)[0].parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "everywhere"}, "device_map='everywhere' is not allowed; give 'auto'"),
        ({"device_map": {"": "cuda:99"}}, "device='cuda:99' cannot be used"),
        ({"device_map": {"model": "disk", "lm_head": "meta"}}, "device='meta' cannot be used"),
        ({"offload_folder": "beside"}, "offload_folder= is for weights that device_map= puts on the disk"),
        ({"device_map": "auto", "merge_adapter": True}, "load whole; leave out device_map="),
        ({"device_map": "auto", "source": "world"}, "load whole; leave out device_map="),
    ],
)
def test_what_cannot_be_spread_is_refused(options, message, folder):
    with pytest.raises(PrunekitError, match=message):
        pk.load(**{"source": folder, **options})


@pytest.mark.parametrize("make", [hooked, offloaded])
def test_a_spread_model_is_evaluated_as_in_memory(make, folder):
    assert evaluated(make(folder)) == evaluated(in_memory(folder))


def test_a_cut_model_can_be_spread_and_evaluated(folder, tmp_path):
    model = in_memory(folder)
    small = pk.prune(model, plan(pk.discover(model)))
    before = evaluated(small)
    spread = dispatch_model(small, {**IN_MEMORY, "model.layers.1": "disk"}, offload_dir=tmp_path)
    assert any(p.is_meta for p in spread.parameters())
    assert evaluated(spread) == before


def test_a_structure_without_any_weights_is_still_cut(folder):
    model = in_memory(folder)
    small = pk.prune(model.to("meta"), plan(pk.discover(model)), measure=False)
    assert all(p.is_meta for p in small.parameters())


def test_the_meta_device_is_refused_for_loading(folder, tmp_path, capsys):
    with pytest.raises(PrunekitError, match="device='meta' cannot be used: .* no weights; give 'cpu', or 'cuda'"):
        pk.load(folder, device="meta")
    options = ("--pruning-ratio", "0.1", "--importance", "l2", "--device", "meta", "--out", str(tmp_path / "out"))
    assert main(["prune", str(folder), *options]) == 2
    assert "device='meta' cannot be used" in capsys.readouterr().err and not (tmp_path / "out").exists()
