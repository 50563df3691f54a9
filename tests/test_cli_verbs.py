"""`prunekit recipe`, `knowledge`, `recover --method full`; in which dtype and on which device models are loaded."""

import json

import pandas as pd
import pytest
import torch
from evaluation_helpers import TEXT, dense_folder

import prunekit as pk
from prunekit.cli import main
from prunekit.recipes import hywia, llm_pruner


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A checkpoint folder with a tokenizer, and a text beside it."""
    return dense_folder(tmp_path_factory.mktemp("models"))


def run_json(capsys, *arguments):
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def weights(folder):
    return dict(pk.load(folder)[0].named_parameters())


DRAWN = ("--n-samples", "4", "--seq-len", "16")


@pytest.mark.parametrize(
    ("name", "options", "run"),
    [
        ("llm-pruner", ("--mode", "channel"), lambda model, calib: llm_pruner(model, calib, 0.5, mode="channel")),
        ("hywia", ("--rule", "uncertainty", "--layers", "0,1"), lambda model, calib: hywia(
            model, calib, 0.5, rule="uncertainty", layers=(0, 1))),
    ],
)  # fmt: skip
def test_a_recipe_is_that_of_the_library(name, options, run, dense, tmp_path, capsys):
    text = dense.parent / "text.txt"
    arguments = (name, dense, "--pruning-ratio", "0.5", "--calibration", text, *DRAWN, *options)
    found = run_json(capsys, "recipe", *arguments, "--out", tmp_path / "out")
    model, tokenizer = pk.load(dense)
    small, plan, *_ = run(model, pk.calibration_set(TEXT, tokenizer, n_samples=4, seq_len=16))
    assert pk.PruningPlan.load(tmp_path / "out" / "plan.json").keep == plan.keep
    wanted = dict(small.named_parameters())
    assert all(torch.equal(value, wanted[key]) for key, value in weights(tmp_path / "out").items())
    assert found["n_parameters_kept"] == plan.n_parameters_kept and found["recipe"] == name


def test_sparsellm_puts_zeros_in_and_trains_where_there_is_data(dense, tmp_path, capsys):
    text = dense.parent / "text.txt"
    options = ("--sparsity", "0.5", "--calibration", text, *DRAWN, "--data", text, "--max-steps", "1")
    assert main(list(map(str, ("recipe", "sparsellm", dense, *options, "--out", tmp_path / "out")))) == 0
    assert "by sparsellm" in capsys.readouterr().out and (tmp_path / "out" / "sparsity.json").is_file()


@pytest.mark.slow
def test_lorashear_prunes_while_it_trains_on_named_sources(dense, tmp_path, capsys):
    text = tmp_path / "long.txt"
    text.write_text("\n".join(f"{number} {TEXT}" for number in range(40)))
    options = ("--data", f"a={text},b={text}", "--pruning-ratio", "0.2", "--max-steps", "40", "--batch-size", "1")
    options += ("--n-periods", "2", "--folder", tmp_path / "work")
    found = run_json(capsys, "recipe", "lorashear", dense, *options, "--out", tmp_path / "out")
    plan = pk.PruningPlan.load(tmp_path / "out" / "plan.json")
    assert plan.pruning_ratio == pytest.approx(0.2, abs=0.005) and found["n_parameters_kept"] == plan.n_parameters_kept


@pytest.mark.slow
def test_the_predictor_searches_under_a_ratio(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 20)
    options = ("--pruning-ratio", "0.3", "--text", text, "--n-pairs", "10", "--n-rounds", "1", "--top-k", "2", *DRAWN)
    found = run_json(capsys, "recipe", "accuracy-predictor", "world", *options, "--out", tmp_path / "out")
    plan = pk.PruningPlan.load(tmp_path / "out" / "plan.json")
    assert plan.pruning_ratio >= 0.295 and found["n_parameters_kept"] == plan.n_parameters_kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("recipe", "hywia", "--mode", "block"), "recipe hywia has no --mode; leave it out"),
        (("recipe", "lorashear"), "recipe lorashear trains; give --data"),
        (("recipe", "accuracy-predictor"), "recipe accuracy-predictor needs --pruning-ratio"),
        (("recipe", "llm-pruner"), "recipe llm-pruner reads text; give --calibration"),
        (("recipe", "lorashear", "--data", "world", "--n-samples", "3"), "recipe lorashear reads no calibration text"),
        (("recipe", "lorashear", "--data", "world", "--calibration", "x"), "so it has no --calibration"),
        (("recipe", "llm-pruner", "--r", "4"), "--r is a setting of recovery, which reads text; give --data too"),
        (("recipe", "wanda"), "invalid choice: 'wanda'"),
        (("recover", "--data", "world", "--method", "full", "--r", "4"), "--method full has no --r"),
        (("recover", "--data", "world", "--method", "full", "--preset", "paper"), "--preset paper is for"),
        (("recover", "--data", "world", "--weight-decay", "1"), "--method lora has no --weight-decay"),
        (("recover", "--data", "world", "--text-share", "1"), "--text-share is for distillation: give --teacher DENSE"),
        (("knowledge",), "importance 'curvature' reads text; give --calibration"),
        (("prune", "--pruning-ratio", "0.1", "--dtype", "int8"), "dtype='int8' is not known"),
        (("prune", "--pruning-ratio", "0.1", "--device", "abacus"), "device='abacus' cannot be used"),
        (("prune", "--plan", "PLAN", "--streaming", "--dtype", "float16"), "--dtype needs the whole model in memory"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(arguments, message, dense, tmp_path, capsys):
    split = 2 if arguments[0] == "recipe" else 1
    text = () if "reads text" in message else ("--calibration", dense.parent / "text.txt")
    text = () if arguments[0] == "recover" else text
    if "PLAN" in arguments:
        plan = dense.parent / "plan.json"
        pk.plan(groups := pk.discover(pk.load(dense)[0]), {g.name: torch.ones(g.n_units) for g in groups}, 0.1).save(
            plan
        )
        arguments = [str(plan) if part == "PLAN" else part for part in arguments]
    given = (*arguments[:split], dense, *arguments[split:], *text, "--out", tmp_path / "out")
    assert main(list(map(str, given))) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


def test_full_tuning_trains_every_weight(dense, tmp_path, capsys):
    options = ("--data", dense.parent / "text.txt", "--method", "full", "--max-steps", "2", "--seq-len", "32")
    found = run_json(capsys, "recover", dense, *options, "--learning-rate", "0.01", "--out", tmp_path / "out")
    assert found["method"].startswith("FullTuning(learning_rate=0.01")
    before, after = weights(dense), weights(tmp_path / "out")
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_distillation_learns_from_the_model_before_pruning(dense, tmp_path, capsys):
    data = ("--data", dense.parent / "text.txt", "--max-steps", "2", "--seq-len", "32")
    run_json(capsys, "prune", dense, "--pruning-ratio", "0.2", "--importance", "l2", "--out", tmp_path / "small")
    given = ("recover", tmp_path / "small", *data, "--teacher", dense, "--text-share", "0.5", "--out", tmp_path / "out")
    found = run_json(capsys, *given)
    assert "text_share=0.5" in found["method"] and found["method"].startswith("Distillation(training=LoRA(")
    assert "Distillation(training=LoRA(" in (tmp_path / "out" / "README.md").read_text()


def test_hidden_states_are_compared_by_the_plan_in_the_folder(dense, tmp_path, capsys):
    whole = ("--kinds", "layer", "--of", "units", "--importance", "block-influence", "--calibration")
    text = dense.parent / "text.txt"
    run_json(capsys, "prune", dense, "--pruning-ratio", "0.5", *whole, text, "--out", tmp_path / "small")
    options = ("--data", text, "--max-steps", "2", "--seq-len", "32", "--teacher", dense, "--hidden-share", "0.5")
    found = run_json(capsys, "recover", tmp_path / "small", *options, "--out", tmp_path / "out")
    assert "hidden_share=0.5" in found["method"]
    (tmp_path / "small" / "plan.json").unlink()
    assert main(list(map(str, ("recover", tmp_path / "small", *options, "--out", tmp_path / "other")))) == 2
    said = capsys.readouterr().err
    assert "give the plan by which the teacher was cut" in said
    assert "(in a shell: plan.json in the folder of MODEL)" in said


def test_knowledge_is_a_table_and_a_picture_of_each_domain(dense, tmp_path, capsys):
    text, out = dense.parent / "text.txt", tmp_path / "map"
    options = (
        "--text",
        f"one={text},two={text}",
        "--importance",
        "l2",
        "--ratios",
        "0.5",
        "--path",
        tmp_path / "on.safetensors",
    )
    found = run_json(capsys, "knowledge", dense, *options, "--out", out)
    table = pd.read_csv(out / "knowledge.csv")
    known = pk.KnowledgeDistribution.load(out / "knowledge.safetensors")
    assert (out / "knowledge.png").read_bytes().startswith(b"\x89PNG") and len(table) == len(known.table())
    assert [row["domain"] for row in found["domains"]] == ["one", "two"]
    for row in found["domains"]:
        changes = table[table["domain"] == row["domain"]].set_index("group")["change"]
        assert row["change"] == pytest.approx(changes.max()) and row["group"] == changes.idxmax()


@pytest.mark.slow
def test_the_worlds_own_questions_are_asked_by_default(tmp_path, capsys):
    options = ("--importance", "l2", "--kinds", "block", "--limit", "2")
    assert main(["knowledge", "world", *options, "--out", str(tmp_path / "map")]) == 0
    said = capsys.readouterr().out
    assert "accuracy" in said and "model.layers" in said


def test_a_model_is_loaded_in_another_dtype_where_it_is_told(dense, tmp_path, capsys):
    options = ("--pruning-ratio", "0.1", "--importance", "l2", "--dtype", "bfloat16", "--device", "cpu")
    run_json(capsys, "prune", dense, *options, "--out", tmp_path / "out")
    assert {value.dtype for value in weights(tmp_path / "out").values()} == {torch.bfloat16}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
def test_a_model_is_loaded_onto_a_gpu(dense):
    assert {p.device.type for p in pk.load(dense, device="cuda")[0].parameters()} == {"cuda"}
