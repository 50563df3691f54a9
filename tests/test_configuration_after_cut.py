"""After a cut, configuration and modules agree: `transformers` and peft save the model exactly, or refuse by name."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from evaluation_helpers import llama
from families import FAMILIES, SIZED, logits, plan_keeping
from other_families import UNLISTED
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import prunekit as pk
from prunekit.models import empty_model

NAMES = (
    "llama_gqa", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "mistral", "phi3", "gpt2", "gpt_neox", "opt", "bloom",
    "mixtral", "qwen2_moe", "olmo", "qwen3_moe", "gpt_oss",
)  # fmt: skip
WITH_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")
FORMS = ("channels", "heads", "experts", "layer", "hidden", "vocabulary", "uneven")
# What a family's configuration cannot express: layers that differ, heads and FFN whose sizes follow from the hidden
# size, and embeddings scaled by a hidden size that was another.
UNSAID = {
    *((name, "uneven") for name in NAMES),
    *((name, form) for name in ("gpt2", "gpt_neox", "opt", "bloom") for form in ("heads", "hidden")),
    *((name, "hidden") for name in ("gemma", "gemma2", "gemma3")),
    ("bloom", "channels"),
}


@cache
def cut(name, form):
    """A model of which a half of these units is left, in every layer alike unless it is uneven."""
    model = {**FAMILIES, **UNLISTED}[name].model(dtype=torch.float32)
    groups = pk.discover(model)
    kinds = {"heads": "kv_head", "uneven": "ffn_channel", "channels": "ffn_channel", "experts": "expert"}
    chosen = groups.of_kind(kinds.get(form, form))
    keep = {g.name: list(range(1, 1 + g.n_units // 2 - (g.layer if form == "uneven" else 0))) for g in chosen}
    return pk.prune(model, plan_keeping(groups, {chosen[0].name: []} if form == "layer" else keep))


def answers(model):
    """Logits on tokens that every vocabulary here has, attention and experts as set."""
    with torch.no_grad():
        return model.eval()(torch.arange(16).view(2, 8), use_cache=False).logits


def loaded(folder):
    """The model as plain `transformers` loads it, experts one after the other as in the one that was saved."""
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


OF_SOME = {"experts": WITH_EXPERTS, "uneven": ("llama_gqa", "gpt2", "gemma3", "mixtral")}  # the others do the same


@pytest.mark.parametrize(
    ("name", "form"), [(name, form) for name in NAMES for form in FORMS if name in OF_SOME.get(form, NAMES)]
)
def test_save_pretrained_writes_the_model_or_refuses_by_name(name, form, tmp_path):
    small = cut(name, form)
    if (name, form) in UNSAID:
        with pytest.raises(pk.PrunekitError, match=rf"of {type(small).__name__} cannot express .* prunekit\.save\("):
            small.save_pretrained(tmp_path / "out")
        assert not list(tmp_path.iterdir())
        return
    small.save_pretrained(tmp_path / "out")
    for again in (loaded(tmp_path / "out"), pk.load(tmp_path / "out")[0]):
        again.config._experts_implementation = "eager"
        assert torch.equal(answers(again), answers(small))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["channels", "heads", "uneven"])
@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "mixtral"])
def test_a_checkpoint_of_the_trainer_loads_or_training_says_why_not(name, form, tmp_path):
    small, row = copy.deepcopy(cut(name, form)), torch.arange(8)
    settings = {"max_steps": 1, "save_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    trainer = Trainer(
        small, TrainingArguments(tmp_path / "run", **settings), train_dataset=[{"input_ids": row, "labels": row}] * 8
    )
    if (name, form) in UNSAID:
        with pytest.raises(pk.PrunekitError, match=r"cannot express this cut .*prunekit\.save\("):
            trainer.train()
        assert not files(tmp_path)
        return
    trainer.train()
    assert torch.equal(answers(loaded(tmp_path / "run" / "checkpoint-1")), answers(small))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["heads", "uneven"])
@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "gpt_neox", "mixtral", "gpt_oss"])
def test_an_adapter_trained_on_a_cut_model_finds_its_base(name, form, tmp_path):
    """Whatever the widths: peft saves the adapter and the name of the folder that the base was saved in."""
    small = copy.deepcopy(cut(name, form))
    pk.save(small, tmp_path / "base")
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(copy.deepcopy(small), config)
    adapted.save_pretrained(tmp_path / "adapter")
    assert not torch.equal(answers(adapted), answers(small))
    options = {"experts_implementation": "eager"}
    for again in (
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", **options),
        PeftModel.from_pretrained(copy.deepcopy(small), tmp_path / "adapter"),
    ):
        assert torch.equal(answers(again), answers(adapted))


@pytest.mark.parametrize("form", ["channels", "uneven"])
def test_an_adapter_without_a_task_type_finds_its_base_too(form, tmp_path):
    """Then peft loads the base with the class of its family, not with AutoModelForCausalLM."""
    pk.save(copy.deepcopy(cut("llama_gqa", form)), tmp_path / "base")
    adapted = get_peft_model(
        pk.load(tmp_path / "base")[0], LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(answers(again), answers(adapted))


def test_a_cut_checkpoint_loads_with_the_class_of_its_family_and_no_other(tmp_path):
    pk.save(copy.deepcopy(cut("llama_gqa", "uneven")), tmp_path / "cut")
    model, info = LlamaForCausalLM.from_pretrained(
        pretrained_model_name_or_path=tmp_path / "cut", output_loading_info=True, dtype=torch.float32
    )
    assert torch.equal(answers(model), answers(cut("llama_gqa", "uneven"))) and not info["missing_keys"]
    with pytest.raises(pk.PrunekitError, match="is a cut LlamaForCausalLM, no GPT2LMHeadModel; load it with prunekit"):
        GPT2LMHeadModel.from_pretrained(tmp_path / "cut")


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, lambda folder: pk.load(folder)[0]])
def test_a_loaded_cut_model_knows_where_it_lies(load, tmp_path):
    pk.save(cut("llama_gqa", "uneven"), tmp_path / "cut")
    adapted = get_peft_model(load(tmp_path / "cut"), LoraConfig(r=2, target_modules=["q_proj"]))
    assert adapted.peft_config["default"].base_model_name_or_path == str(tmp_path / "cut")


def test_a_model_that_was_cut_is_no_longer_what_lies_where_it_came_from(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    model, _ = pk.load(tmp_path / "dense")
    groups = pk.discover(model)
    small = pk.prune(model, plan_keeping(groups, {groups.of_kind("ffn_channel")[0].name: [0, 1]}))
    assert model.name_or_path == str(tmp_path / "dense") and small.name_or_path == small.config.name_or_path == ""
    assert small.cut_from == str(tmp_path / "dense")
    pk.save(small, tmp_path / "small")
    assert small.name_or_path == small.config.name_or_path == str(tmp_path / "small")


def test_two_uneven_cuts_that_come_out_even_are_said():
    small = cut("llama_gqa", "uneven")
    groups = pk.discover(small)
    evened = pk.prune(small, plan_keeping(groups, {"model.layers.0.mlp:ffn_channel": list(range(47))}))
    assert small.config.intermediate_size == 96 and evened.config.intermediate_size == 47
    assert "save_pretrained" in vars(small) and "save_pretrained" not in vars(evened)
    assert evened.config.prunekit["before"] == {"intermediate_size": 96}


@pytest.mark.slow
def test_what_can_be_said_is_said_beside_what_cannot(tmp_path):
    model = FAMILIES["mixtral"].model(dtype=torch.float32)
    keep = {g.name: [0, 1, 2] for g in pk.discover(model).of_kind("expert")}
    keep |= {pk.discover(model).of_kind("ffn_channel")[0].name: list(range(9))}
    small = pk.prune(model, plan_keeping(pk.discover(model), keep))
    assert small.config.num_local_experts == small.config.num_experts == 3 and small.config.intermediate_size == 96
    pk.save(small, tmp_path / "out")
    again = pk.load(tmp_path / "out")[0]
    assert again.config.num_local_experts == 3 and torch.equal(answers(again), answers(small))
    with pytest.raises(pk.PrunekitError, match="ffn_channel: 9 to 96 of 96 in each layer"):
        again.save_pretrained(tmp_path / "plain")


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_a_model_without_some_experts_trains_with_its_load_balancing_loss(name):
    small, ids = cut(name, "experts"), torch.arange(16).view(2, 8)
    plain = AutoModelForCausalLM.from_config(pk_free(small.config))
    assert small.num_experts == plain.num_experts == 2
    plain.load_state_dict(small.state_dict())
    losses = [model.eval()(ids, labels=ids, output_router_logits=True).loss for model in (small, plain)]
    assert torch.equal(*losses)


def pk_free(config):
    config = copy.deepcopy(config)
    del config.prunekit
    return config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name in ("qwen3", "gemma3", "gpt2", "bloom", *WITH_EXPERTS)
     for form in ("heads", "experts", "layer", "uneven") if form != "experts" or name in WITH_EXPERTS],
)  # fmt: skip
def test_optional_outputs_are_those_of_the_units_that_are_left(name, form, tmp_path):
    """Hidden states, attentions and router logits, before and after saving in whatever format."""
    small = copy.deepcopy(cut(name, form))
    small.set_attn_implementation("eager")
    pk.save(small, tmp_path / "out")
    again = pk.load(tmp_path / "out")[0]
    again.set_attn_implementation("eager")
    wanted = {"output_hidden_states": True, "output_attentions": True}
    wanted |= {"output_router_logits": True} if name in WITH_EXPERTS else {}
    with torch.no_grad():
        one, other = (written(m)(torch.arange(16).view(2, 8), use_cache=False, **wanted) for m in (small, again))
    n_layers = 1 if form == "layer" else 2
    assert len(one.hidden_states) == n_layers + 1 and len(one.attentions) == n_layers
    assert {a.shape[1] for a in one.attentions} == {4 if form == "heads" else 8}
    if name in WITH_EXPERTS:
        experts = 2 if form == "experts" else 4
        assert [r.shape for r in one.router_logits] == [(16, experts)] * n_layers and one.logits.isfinite().all()
    for which in ("hidden_states", "attentions", "router_logits"):
        pairs = zip(getattr(one, which, None) or (), getattr(other, which, None) or (), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def written(model):
    """In evaluation mode, its experts one after the other."""
    for part in model.modules():
        if hasattr(vars(part).get("config"), "_experts_implementation"):
            part.config._experts_implementation = "eager"
    return model.eval()


@pytest.mark.parametrize("kind", ["expert", "ffn_channel"])
def test_a_model_set_to_return_router_logits_can_be_cut(kind):
    model = FAMILIES["mixtral"].model(dtype=torch.float32)
    model.config.output_router_logits = True
    groups, ids = pk.discover(model), torch.arange(8)[None]
    small = pk.prune(model, plan_keeping(groups, {g.name: list(range(g.n_units // 2)) for g in groups.of_kind(kind)}))
    assert small(ids, labels=ids).aux_loss.isfinite()


@pytest.mark.slow
def test_adapters_that_were_there_when_the_model_was_cut_leave_it_saveable(tmp_path):
    """The widths are said while the adapters are on; the merged model is the one that they are true of."""
    wrapped = FAMILIES["llama_peft"].model(dtype=torch.float32)
    groups = pk.discover(wrapped)
    keep = {g.name: list(range(g.n_units // 2)) for g in groups.of_kind("ffn_channel")}
    merged = pk.prune(wrapped, plan_keeping(groups, keep)).merge_and_unload().eval()
    merged.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded(tmp_path / "out")), logits(merged))
    keep = {g.name: list(range(g.n_units // 2 + g.layer)) for g in groups.of_kind("ffn_channel")}
    uneven = pk.prune(wrapped, plan_keeping(groups, keep)).merge_and_unload()
    with pytest.raises(pk.PrunekitError, match="ffn_channel: 48 to 49 of 96"):
        uneven.save_pretrained(tmp_path / "uneven")


def test_biases_that_a_refit_adds_are_no_part_of_the_configuration(tmp_path):
    model = llama()
    groups, calib = pk.discover(model), torch.arange(64).view(4, 16)
    keep = {g.name: list(range(g.n_units // 2)) for g in groups.of_kind("ffn_channel")}
    plan = replace(plan_keeping(groups, keep), groups=groups)
    small = pk.prune(model, plan)
    assert "save_pretrained" not in vars(small)
    pk.compensate(small, model, plan, calib, fit="bias")
    with pytest.raises(pk.PrunekitError, match=r"bias: \d linear layers were given one"):
        small.save_pretrained(tmp_path / "out")


def pictured():
    """A model of pictures and text, whose language model has a configuration of its own."""
    config = AutoConfig.for_model(
        "gemma3",
        text_config={**SIZED, "model_type": "gemma3_text", "num_hidden_layers": 3, "sliding_window": 8},
        vision_config={"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8,
                       "patch_size": 14, "image_size": 28, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4, image_token_index=45, boi_token_index=46, eoi_token_index=47,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ffn_channel", "kv_head", "layer"])
def test_the_widths_of_a_language_model_inside_another_are_its_own(kind, tmp_path):
    model = pictured()
    chosen = pk.discover(model).of_kind(kind)
    keep = {chosen[0].name: []} if kind == "layer" else {g.name: list(range(g.n_units // 2)) for g in chosen}
    small = pk.prune(model, plan_keeping(pk.discover(model), keep))
    small.save_pretrained(tmp_path / "out")
    again = loaded(tmp_path / "out")
    assert torch.equal(answers(again), answers(small))
    for name in ("intermediate_size", "num_attention_heads", "num_hidden_layers"):  # as large as those that were cut
        assert getattr(again.config.vision_config, name) == getattr(model.config.vision_config, name)
    uneven = pk.prune(small, plan_keeping(pk.discover(small), {pk.discover(small).of_kind("ffn_channel")[0].name: [3]}))
    pk.save(uneven, tmp_path / "own")
    assert torch.equal(answers(pk.load(tmp_path / "own")[0]), answers(uneven))


def test_a_head_size_that_followed_from_other_fields_is_said_when_these_change():
    """Qwen2 divides its hidden size by the number of heads, unless its configuration has a head size."""
    model = FAMILIES["qwen2"].model(dtype=torch.float32)
    assert not hasattr(model.config, "head_dim")
    small = cut("qwen2", "heads")
    assert (small.config.head_dim, small.config.num_attention_heads, small.config.num_key_value_heads) == (8, 4, 2)
    assert not hasattr(cut("qwen2", "channels").config, "head_dim") and not hasattr(model.config, "head_dim")


def test_a_model_without_weights_is_cut_and_says_that_it_cannot_be_saved(tmp_path):
    model = empty_model(FAMILIES["llama_gqa"].model().config)
    groups = pk.discover(model)
    small = pk.prune(model, plan_keeping(groups, {g.name: [0, 1] for g in groups.of_kind("ffn_channel")}))
    assert small.model.layers[0].mlp.up_proj.weight.shape[0] == 2
    with pytest.raises(pk.PrunekitError, match="would write a folder that does not load"):
        small.save_pretrained(tmp_path / "out")


def test_a_module_that_the_family_does_not_have_does_not_disturb():
    model = FAMILIES["llama_gqa"].model()
    model.extra = torch.nn.Dropout(0.1)
    groups = pk.discover(model)
    small = pk.prune(model, plan_keeping(groups, {g.name: list(range(48)) for g in groups.of_kind("ffn_channel")}))
    assert small.config.intermediate_size == 48 and isinstance(small.extra, torch.nn.Dropout)
