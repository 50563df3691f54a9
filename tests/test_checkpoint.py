"""What is saved loads again, in another process too, with the same logits; nothing is half-written."""

import json
import subprocess
import sys
from unittest.mock import MagicMock

import pytest
import torch
from checkpoint_helpers import Folders, cut, same_cut
from families import FAMILIES, logits, plan_keeping, relative_difference
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import prunekit as pk
from prunekit import PrunekitError, discover, export, load, prune, save


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return Folders(tmp_path_factory.mktemp("checkpoints"))


NOT_PADDED = ("olmo2", "stablelm_qk")  # norms over all heads, and norms of single heads
# Other numbers of heads in the same code, which the test of uneven cuts has; the same fields are filled up.
TWINS = (
    "llama_mqa", "llama_equal", "mistral", "qwen2_mha", "qwen2_mqa", "qwen3_equal", "gemma_mqa", "phi3_mha",
    "phi3_equal", "phi3_mqa", "phi3_peft", "gpt2_equal", "gpt2_peft", "bigcode_mha", "falcon_mha",
)  # fmt: skip
PADDED = [name for name in FAMILIES if name not in (*NOT_PADDED, *TWINS)]


# Even cuts of the other families: test_configuration_after_cut.py, and padded below, which sets the same fields.
EVEN = ("falcon_new", "stablelm", "starcoder2", "olmo2", "cohere", "glm4", "granite", "gptj", "smollm3", "mpt")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "form"), [*((name, "uneven") for name in FAMILIES), *((name, "even") for name in EVEN)]
)
def test_logits_are_the_same_after_saving_and_loading(name, form, folders):
    folder, small = folders(name, form), same_cut(name, form == "uneven")
    again, tokenizer = load(folder)
    assert tokenizer is None and type(again) is type(small) and not again.training
    assert torch.equal(logits(again), logits(small))
    assert not list(folder.glob("*.bin")) and not list(folder.parent.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", PADDED)
def test_a_padded_export_is_a_plain_checkpoint_with_the_same_logits(name, folders):
    folder, small = folders(name, "padded"), same_cut(name, True, torch.float64)
    assert json.loads((folder / "config.json").read_text())["model_type"] == small.config.model_type
    written_out = {"experts_implementation": "eager"}  # grouped products have no float64
    padded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **written_out)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert relative_difference(logits(padded.eval()), logits(small)) < FAMILIES[name].tolerance
    assert padded.num_parameters() > small.num_parameters() and not hasattr(padded.config, "prunekit")


@pytest.mark.parametrize("name", NOT_PADDED)
def test_what_cannot_be_filled_up_says_why_and_what_to_do(name, tmp_path):
    with pytest.raises(PrunekitError, match=r"each head has a norm of its own; save it with prunekit\.save"):
        export(same_cut(name, True, torch.float64), tmp_path / "out", layout="padded")
    assert not list(tmp_path.iterdir())


ELSEWHERE = """
import json, os, sys
{imports}
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    expected = load_file(folder + ".safetensors")
    own = json.load(open(folder + "/config.json"))["model_type"] == "prunekit"
    assert own or not folder.endswith("uneven"), folder
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval()
    except ValueError as error:
        assert own and "prunekit" not in sys.modules and "model type `prunekit`" in str(error), (folder, error)
        continue
    assert own <= ("prunekit" in sys.modules), folder + " loads without prunekit"
    for p in model.parameters():
        p.data = p.data.clone()  # aligned as in the process that saved it
    with torch.no_grad():
        difference = model(expected["ids"], use_cache=False).logits - expected["logits"]
    # families compute in part in float32, which the logits of a padded model, of float64, were spared
    assert difference.norm() <= (1e-6 if folder.endswith("padded") else 0) * expected["logits"].norm(), folder
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    ["import transformers, prunekit", "import prunekit", ""],
)
def test_another_process_reads_the_same_with_transformers_alone(imports, folders):
    """With prunekit imported, before transformers or after, everything loads; without it, all but the uneven."""
    names = ["llama_gqa"] if imports else ["llama_gqa", "gpt2", "mixtral", "falcon_alibi"]
    paths = [str(folders(name, form)) for name in names for form in ("even", "uneven", "padded")]
    run([sys.executable, "-c", ELSEWHERE.format(imports=imports), *paths])


def run(arguments):
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_registering_costs_no_import():
    run(
        [
            sys.executable,
            "-c",
            "import sys, prunekit; sys.exit('transformers' in sys.modules or 'torch' in sys.modules)",
        ]
    )


def test_the_configuration_says_the_widths_of_each_layer_in_the_official_schema(folders):
    widths = {"llama_gqa": ("num_key_value_heads", "intermediate_size"), "gpt2": ("n_head", "n_inner")}
    for name, (heads, channels) in widths.items():
        config = AutoConfig.from_pretrained(folders(name, "uneven"))
        groups = discover(same_cut(name, True))
        said = [(layer.to_dict()[heads], layer.to_dict()[channels]) for layer in config.per_layer_config]
        sizes = {(g.layer, g.kind): g.n_units for g in groups}
        right = [(sizes.get((n, "kv_head"), 1), sizes[n, "ffn_channel"]) for n in range(2)]  # one head left is no group
        assert config.model_type == "prunekit" and config.is_heterogeneous and said == right
        with pytest.raises(RuntimeError, match="per-layer attribute"):
            getattr(config, channels)


def test_auto_classes_take_the_usual_options_and_refuse_what_cannot_be(folders):
    folder = folders("llama_gqa", "uneven")
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="float16", attn_implementation="eager", device_map="cpu", output_loading_info=True
    )
    assert model.dtype == torch.float16 and model.config._attn_implementation == "eager" and not info["missing_keys"]
    with pytest.raises(PrunekitError, match="onto one device, unquantized"):
        AutoModelForCausalLM.from_pretrained(folder, device_map="auto")
    assert AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"}).device.type == "cpu"
    for options in ({"quantization_config": {"bits": 4}}, {"tp_plan": "auto"}, {"state_dict": {"a": 1}}):
        with pytest.raises(PrunekitError, match=f"{next(iter(options))}=.* is not for cut checkpoints"):
            AutoModelForCausalLM.from_pretrained(folder, **options)
    inside = AutoModelForCausalLM.from_pretrained(folder.parent, subfolder=folder.name)
    assert torch.equal(logits(inside), logits(same_cut("llama_gqa", True)))
    with pytest.raises(PrunekitError, match="no weights to start from"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def test_a_cut_checkpoint_on_a_hub_is_fetched_without_pickles(folders, monkeypatch):
    asked = {}

    def fetch(source, allow_patterns, **options):
        asked.update(source=source, patterns=allow_patterns, **options)
        return folders("llama_gqa", "uneven")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    config = AutoConfig.from_pretrained(folders("llama_gqa", "uneven"))
    model = AutoModelForCausalLM.from_pretrained("somebody/cut", config=config, revision="main")
    assert torch.equal(logits(model), logits(same_cut("llama_gqa", True)))
    assert asked["source"] == "somebody/cut" and asked["patterns"] == ["*.json", "*.safetensors"]


def test_format_1_without_widths_still_loads(folders, tmp_path):
    small = cut("opt", uneven=True)
    save(small, tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    first = {name: config[name] for name in ("model_type", "format", "stages", "base_config")}
    (tmp_path / "old" / "config.json").write_text(json.dumps(first))
    assert torch.equal(logits(load(tmp_path / "old")[0]), logits(small))


@pytest.mark.parametrize("name", ["llama_tied", "llama_equal"])
def test_an_even_cut_that_the_configuration_can_say_is_a_plain_checkpoint(name, tmp_path):
    small = cut(name, uneven=False)
    save(small, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(plain.eval()), logits(small))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "prunekit" not in config and config["intermediate_size"] == discover(small).of_kind("ffn_channel")[0].n_units


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_ffn_widths_are_said_under_whatever_name_the_family_has(name, tmp_path):
    model = FAMILIES[name].model(dtype=torch.float32)
    groups = discover(model)
    keep = {g.name: list(range(40)) for g in groups.of_kind("ffn_channel")}
    small = prune(model, plan_keeping(groups, keep))
    save(small, tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), logits(small))


@pytest.mark.parametrize("width", [37, [37, 38]])
def test_experts_of_widths_that_grouped_products_refuse_are_saved_and_run(width, tmp_path):
    """The model is set to grouped products, as transformers does, which take multiples of 16 bytes only."""
    model = FAMILIES["mixtral"].model(dtype=torch.float32)
    experts = discover(model).of_kind("ffn_channel")
    widths = width if isinstance(width, list) else [width] * len(experts)
    keep = {g.name: list(range(n)) for g, n in zip(experts, widths, strict=True)}
    small = prune(model, plan_keeping(discover(model), keep))
    expected = logits(small)
    for module in small.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = "grouped_mm"
    save(small, tmp_path / "out")
    assert small.config._experts_implementation == "grouped_mm"
    assert torch.equal(logits(load(tmp_path / "out")[0]), expected)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "experts_implementation" in card and "take the widths" in card


@pytest.mark.slow
def test_a_loaded_cut_can_be_cut_saved_and_loaded_again(tmp_path):
    save(cut("gpt2", uneven=True), tmp_path / "one")
    model, _ = load(tmp_path / "one")
    groups = discover(model)
    keep = {g.name: list(range(1, g.n_units)) for g in groups.of_kind("ffn_channel")}
    small = prune(model, plan_keeping(groups, keep))
    save(small, tmp_path / "two")
    assert torch.equal(logits(load(tmp_path / "two")[0]), logits(small))


@pytest.mark.slow
def test_cuts_of_overlapping_groups_are_made_again_in_order(tmp_path):
    once = prune(
        FAMILIES["llama_gqa"].model(dtype=torch.float32),
        plan_keeping(discover(FAMILIES["llama_gqa"].model()), {"model.layers.0.self_attn:kv_head": [1, 2, 3]}),
    )
    small = prune(once, plan_keeping(discover(once), {"model.layers.0.self_attn:query_head": [1, 3, 5]}))
    save(small, tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")[0]), logits(small))


def test_a_model_changed_by_other_means_is_not_saved(tmp_path):
    small = cut("llama_mha", uneven=True)
    small.model.layers[0].mlp.up_proj = torch.nn.Linear(64, 99, bias=False)
    with pytest.raises(PrunekitError, match="changed by other means"):
        save(small, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_dtype_is_the_checkpoints_unless_told(tmp_path):
    save(cut("llama_mha", uneven=True, dtype=torch.float16), tmp_path / "out")
    assert {p.dtype for p in load(tmp_path / "out")[0].parameters()} == {torch.float16}
    for dtype in (torch.float32, "float32"):
        again = load(tmp_path / "out", dtype=dtype)[0]
        assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert {b.dtype for b in load(tmp_path / "out")[0].buffers()} == {torch.float32}
    assert load("world", dtype=torch.float16)[0].dtype == torch.float16
    for source in (tmp_path / "out", "world"):
        for dtype in ("float99", "int8", 8):
            with pytest.raises(PrunekitError, match=f"dtype={dtype!r} is not (known|allowed)"):
                load(source, dtype=dtype)


def test_the_tokenizer_travels_along(tmp_path):
    model, tokenizer = load("world")
    save(model, tmp_path / "out")
    _, again = load(tmp_path / "out")
    assert again("anna")["input_ids"] == tokenizer("anna")["input_ids"]


def test_an_output_folder_that_exists_is_refused_and_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(PrunekitError, match="exists; choose a new folder"):
        save(FAMILIES["llama_mha"].model(), tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    model = FAMILIES["llama_mha"].model()

    def broken(folder, **options):
        (folder / "half").write_text("written")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", broken)
    with pytest.raises(PrunekitError, match=r"cannot write .*No space left on device"):
        save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_unmerged_adapters_are_refused(tmp_path):
    wrapped = get_peft_model(FAMILIES["llama_mha"].model(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(PrunekitError, match="merge_and_unload"):
        save(wrapped, tmp_path / "out")


def test_a_cut_made_under_adapters_loads_after_merging(tmp_path):
    wrapped = FAMILIES["llama_peft"].model(dtype=torch.float32)
    groups = discover(wrapped)
    keep = {g.name: list(range(g.n_units // 2 + g.layer)) for g in groups.of_kind("ffn_channel")}
    merged = prune(wrapped, plan_keeping(groups, keep)).merge_and_unload()
    save(merged, tmp_path / "out")
    assert torch.allclose(logits(load(tmp_path / "out")[0]), logits(merged))


def test_the_public_vocabulary_is_whole_and_opens_no_room_unasked():
    assert all(hasattr(pk, name) for name in pk.__all__) and set(pk.__all__) <= set(dir(pk))
    assert sorted(name for names in pk._ROOMS.values() for name in names) == sorted(pk.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nowhere'"):
        pk.nowhere  # noqa: B018
    quick = "import sys, prunekit.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", quick], timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (OSError("no network"), "was not fetched before, and the hub cannot be reached now; give the path"),
        (HfHubHTTPError("404", response=MagicMock()), "does not load "),
    ],
)
def test_a_name_that_is_no_folder_and_no_hub_id_is_said_to_be_neither(answer, said, monkeypatch, caplog):
    """The hub is asked once; where it does not answer, its client is kept from asking for every file six times."""
    asked, options = [], {}

    def ask(url):
        asked.append(url)
        raise answer

    def refuse(source, **given):
        options.update(given)
        raise OSError("nothing there")

    monkeypatch.setattr("prunekit.checkpoint.origins.get_hf_file_metadata", ask)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(PrunekitError, match=f"^there is no folder 'qwne3', and as a hub id it {said}"):
        load("qwne3")
    offline = {"local_files_only": True} if type(answer) is OSError else {}
    assert len(asked) == 1 and options["adapter_kwargs"] == offline
    assert options.get("local_files_only", False) == bool(offline) and not caplog.records
