"""`prunekit prune`: every importance by its name, scores scaled to the loss, steps, and what is left re-fitted."""

import json
import re

import pytest
import torch
from evaluation_helpers import TEXT, byte_tokenizer, dense_folder
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

import prunekit as pk
from prunekit.cli import main
from prunekit.importance import IMPORTANCES, importance_from_name
from prunekit.pruning import compensation


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return dense_folder(tmp_path_factory.mktemp("models"))


def cut(dense, out, *options, ratio="0.2"):
    text = str(dense.parent / "text.txt")
    sizes = [] if "--n-samples" in options else ["--n-samples", "16"]
    sizes += [] if "--seq-len" in options else ["--seq-len", "64"]
    arguments = ["prune", str(dense), "--out", str(out), "--calibration", text, *sizes, *options]
    return main([*arguments, "--pruning-ratio", ratio] if ratio else arguments)


def calib(dense):
    _, tokenizer = pk.load(dense)
    return pk.calibration_set(TEXT, tokenizer, n_samples=16, seq_len=64, seed=0)


def test_every_importance_is_offered_by_its_name(capsys):
    main(["prune", "--help"])
    said = "".join(capsys.readouterr().out.split())
    offered = re.search(r"--importance\{(.*?)\}", said)[1].split(",")
    assert offered == list(IMPORTANCES) and all(map(importance_from_name, offered))


@pytest.mark.parametrize("name", ["hywia", "taylor-mixed", "block-influence", "reap"])
def test_an_importance_can_be_named(name, dense, tmp_path, capsys):
    whole = name == "block-influence"
    kinds = ("--kinds", "layer", "--of", "units") if whole else ()
    options = ("--importance", name, "--seq-len", "16", *kinds)
    routed = name == "reap"  # of experts, which this model has none of
    assert cut(dense, tmp_path / "out", *options, ratio="0.5" if whole else "0.2") == (2 if routed else 0)
    assert ("is not a group of experts; choose" in capsys.readouterr().err) == routed


@pytest.mark.slow
@pytest.mark.parametrize("fit", [None, "both"])
def test_compensation_is_that_of_the_library(fit, dense, tmp_path):
    assert cut(dense, tmp_path / "out", "--compensate", *([fit] if fit else [])) == 0
    model, _ = pk.load(dense)
    plan = pk.PruningPlan.load(tmp_path / "out" / "plan.json")
    expected = pk.prune(model, plan, compensate=calib(dense), fit=fit or "weights")
    found, wanted = load_file(tmp_path / "out" / "model.safetensors"), dict(expected.named_parameters())
    assert set(found) == set(wanted) and all(torch.equal(found[name], wanted[name]) for name in found)
    assert plan.notes["compensate"] == f"{fit or 'weights'}, where a linear layer lost inputs"
    assert "16 windows of 64 tokens" in plan.notes["calibration"]


@pytest.mark.parametrize("gaps", [None, "magnitude"])
def test_gaps_are_made_up_for_as_the_library_does(gaps, dense, tmp_path, capsys):
    options = ("--kinds", "layer", "--of", "units", "--importance", "block-influence", "--compensate")
    said = ("--gaps", gaps) if gaps else ()
    assert cut(dense, tmp_path / "out", *options, *said, ratio="0.5") == 0
    model, _ = pk.load(dense)
    plan = pk.PruningPlan.load(tmp_path / "out" / "plan.json")
    expected = dict(pk.prune(model, plan, compensate=calib(dense), gaps=gaps).named_parameters())
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert plan.removed_layers and all(torch.equal(found[name], expected[name]) for name in found)
    capsys.readouterr()
    assert cut(dense, tmp_path / "other", "--gaps", gaps or "map") == 2
    assert "makes up for whole layers that go" in capsys.readouterr().err


def test_curvature_and_a_re_fit_are_the_default(dense, tmp_path):
    assert cut(dense, tmp_path / "out") == cut(dense, tmp_path / "plain", "--compensate", "none") == 0
    model, _ = pk.load(dense)
    groups = pk.discover(model)
    scores = pk.score(model, groups.of_kind("kv_head", "ffn_channel"), pk.Curvature(), calib(dense))
    plan = pk.plan(groups, scores, 0.2)
    for name, fit in (("out", calib(dense)), ("plain", None)):
        saved = pk.PruningPlan.load(tmp_path / name / "plan.json")
        assert saved.keep == plan.keep
        assert (saved.notes["importance"], saved.notes["ranking"]) == ("curvature", "global")
        wanted = dict(pk.prune(model, plan, compensate=fit).named_parameters())
        found = load_file(tmp_path / name / "model.safetensors")
        assert all(torch.equal(found[key], wanted[key]) for key in found)
        assert ("compensate" in saved.notes) == (fit is not None)


def test_kinds_without_curvature_are_scored_by_taylor(dense, tmp_path):
    assert cut(dense, tmp_path / "out", "--kinds", "hidden", ratio="0.1875") == 0
    notes = pk.PruningPlan.load(tmp_path / "out" / "plan.json").notes
    assert notes["importance"] == "Taylor element first" and "compensate" not in notes


def test_windows_are_as_long_as_a_small_model_takes(dense, tmp_path):
    text = str(dense.parent / "text.txt")
    options = ["--out", str(tmp_path / "out"), "--calibration", text, "--pruning-ratio", "0.1"]
    assert main(["prune", str(dense), *options]) == 0
    assert "64 windows of 96 tokens" in pk.PruningPlan.load(tmp_path / "out" / "plan.json").notes["calibration"]


@pytest.mark.slow
def test_a_plan_can_be_carried_out_with_compensation(dense, tmp_path):
    assert cut(dense, tmp_path / "first", "--compensate", "none") == 0
    plan = str(tmp_path / "first" / "plan.json")
    assert cut(dense, tmp_path / "second", "--plan", plan, "--compensate", "--n-samples", "8", ratio=None) == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed and all(name.endswith(("o_proj.weight", "down_proj.weight")) for name in changed)


@pytest.mark.slow
def test_steps_and_scaling_are_those_of_the_library(dense, tmp_path):
    options = ("--steps", "2", "--normalize", "loss", "--ranking", "global", "--importance", "l2")
    assert cut(dense, tmp_path / "out", *options) == 0
    model, _ = pk.load(dense)
    expected = pk.plan_in_steps(model, pk.Magnitude(), 0.2, calib(dense), n_steps=2, normalize="loss", ranking="global")
    found = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert found["keep"] == expected.keep and found["notes"]["importance"] == "L2, scaled to the loss, in steps"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--compensate", "all"), "invalid choice: 'all'"),
        (("--normalize", "size"), "invalid choice: 'size'"),
        (("--normalize", "loss"), "which they do with --ranking global alone"),
        (("--steps", "0"), "n_steps=0 is not allowed; give an integer of 1 or more"),
        (("--compensate", "--streaming"), "--compensate needs the whole model in memory"),
        (("--steps", "2", "--streaming"), "--steps needs the whole model in memory"),
        (("--importance", "ablation", "--streaming"), "ablates units in memory"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options, message, dense, tmp_path, capsys):
    assert cut(dense, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--compensate", "--normalize=loss"])
def test_what_reads_text_is_refused_without_one(option, dense, tmp_path, capsys):
    arguments = ["prune", str(dense), "--out", str(tmp_path / "out"), "--pruning-ratio", "0.2", option]
    assert main([*arguments, "--importance", "l2"]) == 2
    assert f"{option.partition('=')[0]} reads text; give --calibration" in capsys.readouterr().err


@pytest.mark.slow
def test_the_worlds_text_is_the_default_of_compensation_too(tmp_path):
    options = [
        "--importance",
        "l2",
        "--compensate",
        "--n-samples",
        "2",
        "--seq-len",
        "16",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(["prune", "world", "--pruning-ratio", "0.05", *options]) == 0


def test_a_checkpoint_with_added_biases_is_not_told_to_be_padded(dense, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compensation, "mean_loss", lambda *_: 1.0)  # of a model with random weights
    assert cut(dense, tmp_path / "out", "--compensate", "bias") == 0
    told = capsys.readouterr().out
    assert "linear layers were given one): loads with prunekit\n" in told and "padded" not in told


@pytest.mark.parametrize("how", ["--streaming", "--no-streaming"])
def test_windows_fit_the_model_where_no_length_is_given(how, dense, tmp_path):
    text, out = str(dense.parent / "text.txt"), tmp_path / "out"
    options = ["--importance", "activation", "--pruning-ratio", "0.2", "--n-samples", "8", how]
    assert main(["prune", str(dense), "--calibration", text, *options, "--out", str(out)]) == 0
    assert pk.PruningPlan.load(out / "plan.json").notes["calibration"] == "8 windows of 96 tokens, seed 0"


@pytest.mark.parametrize("steps", [(), ("--steps", "2")])
def test_taylor_stands_in_where_curvature_cannot_score_a_group(steps, dense, tmp_path, capsys):
    """Experts that lie in one tensor are read by no linear layer: the default says so and scores by Taylor."""
    sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2, "max_position_embeddings": 96}
    torch.manual_seed(0)
    folder = tmp_path / "experts"
    pk.save(MixtralForCausalLM(MixtralConfig(**sizes, **heads)), folder, tokenizer=byte_tokenizer())
    (folder.parent / "text.txt").write_text(TEXT)
    assert cut(folder, tmp_path / "out", *steps) == 0
    assert "scored by taylor" in capsys.readouterr().err
    assert "Taylor" in pk.PruningPlan.load(tmp_path / "out" / "plan.json").notes["importance"]
