"""The command line, from end to end on a tiny model, and on a real one."""

import json
import logging
import subprocess
import sys
import warnings

import pytest
import torch
from evaluation_helpers import dense_folder
from families import FAMILIES
from shared import shared_path
from transformers import AutoModelForCausalLM

from prunekit import discover, load
from prunekit.account import LossChange
from prunekit.checkpoint import origins
from prunekit.cli import main
from prunekit.cli.console import own_warnings
from prunekit.errors import DamageWarning
from prunekit.pruning import PruningPlan

COMMANDS = ("discover", "prune", "recover", "evaluate", "export", "lab", "tour")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A checkpoint folder with a tokenizer, and a text beside it."""
    return dense_folder(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A checkpoint with something locked: its table of positions."""
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    FAMILIES["gpt2"].model(dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(dense):
    return str(dense.parent / "text.txt")


@pytest.fixture(scope="module")
def cut(dense, text):
    out = dense.parent / "cut"
    assert main(["prune", str(dense), "--pruning-ratio", "0.2", "--calibration", text, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def recovered(cut, text):
    out = cut.parent / "recovered"
    options = ["--max-steps", "3", "--seq-len", "32", "--r", "2", "--batch-size", "2"]
    assert main(["recover", str(cut), "--data", text, "--out", str(out), *options]) == 0
    return out


def run_json(capsys, *arguments):
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def logits(folder):
    model, _ = load(folder)
    with torch.no_grad():
        return model(torch.arange(9)[None]).logits


def test_discover_prints_every_kind(dense, capsys):
    assert main(["discover", str(dense)]) == 0
    out = capsys.readouterr().out
    assert {group.kind for group in discover(load(dense)[0])} <= set(out.split()) and "nothing is locked" in out


def test_discover_says_what_is_locked_and_why(gpt2, capsys):
    assert main(["discover", str(gpt2)]) == 0
    assert "wpe.weight[dim 0]: transformer.wpe: rows are looked up by position" in capsys.readouterr().out


def test_discover_as_json(dense, gpt2, capsys):
    found = run_json(capsys, "discover", dense)
    sizes = {(g["kind"], g["n_units"], g["exact"]) for g in found["groups"]}
    assert {("kv_head", 4, True), ("ffn_channel", 48, True), ("layer", 1, True)} <= sizes
    assert found["n_parameters"] == sum(p.numel() for p in load(dense)[0].parameters())
    assert not found["locked"] and list(run_json(capsys, "discover", gpt2)["locked"])


@pytest.mark.parametrize("options", [(), ("--layer", "1")])
def test_discover_draws_a_layer(gpt2, tmp_path, capsys, options):
    picture = tmp_path / "layer.png"
    picture.write_text("an old one")
    assert main(["discover", str(gpt2), "--plot", str(picture), *options]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and list(tmp_path.iterdir()) == [picture]
    assert f"drawn: {picture}" in capsys.readouterr().out


def test_discover_makes_the_folder_of_a_picture(gpt2, tmp_path, capsys):
    picture = tmp_path / "no" / "such" / "layer.svg"
    assert run_json(capsys, "discover", gpt2, "--plot", picture)["plot"] == str(picture) and picture.is_file()
    assert main(["discover", str(gpt2), "--plot", str(picture / "layer.svg")]) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--plot", "OUT/a.png", "--layer", "7"), "layer 7 has no groups; layers [0, 1] have"),
        (("--plot", "OUT/a.xyz"), "ends with .png, .pdf, .svg"),
        (("--layer", "1"), "give --plot FILE.png too"),
    ],
)
def test_discover_refuses_what_it_cannot_draw(gpt2, tmp_path, capsys, options, message):
    options = [option.replace("OUT", str(tmp_path)) for option in options]
    assert main(["discover", str(gpt2), *options]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_export_fills_an_uneven_checkpoint_up_for_plain_transformers(dense, tmp_path, capsys):
    options = ("--pruning-ratio", "0.2", "--importance", "l1", "--ranking", "global")
    run_json(capsys, "prune", dense, *options, "--out", tmp_path / "uneven")
    assert main(["export", str(tmp_path / "uneven"), "--out", str(tmp_path / "plain")]) == 2
    assert "layout='padded'" in capsys.readouterr().err
    found = run_json(capsys, "export", tmp_path / "uneven", "--layout", "padded", "--out", tmp_path / "even")
    config = json.loads((tmp_path / "even" / "config.json").read_text())
    assert {"plan.json", "tokenizer.json", "model.safetensors"} <= set(found["files"]) and config[
        "model_type"
    ] == "llama"
    padded = AutoModelForCausalLM.from_pretrained(tmp_path / "even")(torch.arange(9)[None]).logits
    assert torch.allclose(padded, logits(tmp_path / "uneven"), atol=1e-5)


def test_export_knows_every_layout(dense, tmp_path, capsys):
    assert main(["export", str(dense), "--layout", "round", "--out", str(tmp_path / "x")]) == 2
    assert "plain, padded, gguf" in capsys.readouterr().err.replace("'", "") and not (tmp_path / "x").exists()
    assert main(["export", str(dense), "--out", str(tmp_path / "x")]) == 0
    assert torch.equal(logits(tmp_path / "x"), logits(dense)) and "model.safetensors" in capsys.readouterr().out


def test_prune_writes_model_plan_and_card(cut):
    plan = PruningPlan.load(cut / "plan.json")
    assert plan.pruning_ratio == pytest.approx(0.2, abs=0.005)
    assert sum(p.numel() for p in load(cut)[0].parameters()) == plan.n_parameters_kept
    card = (cut / "README.md").read_text()
    assert "curvature" in card and "ffn_channel" in card and f"{plan.n_parameters_kept:,}" in card


def test_prune_prints_one_table(dense, tmp_path, capsys):
    assert main(["prune", str(dense), "--pruning-ratio", ".1", "--importance", "l2", "--out", str(tmp_path / "x")]) == 0
    captured = capsys.readouterr()
    assert "parameters" in captured.out and "ffn_channel units" in captured.out and "before" in captured.out


def test_prune_by_a_plan_that_takes_tokens_leaves_their_tokenizer_behind(dense, tmp_path, capsys):
    model, _ = load(dense)
    size = model.config.vocab_size
    name = discover(model).of_kind("vocabulary")[0].name
    PruningPlan({name: list(range(0, size, 2))}, {name: size}, 10, 9).save(tmp_path / "plan.json")
    run_json(capsys, "prune", dense, "--plan", tmp_path / "plan.json", "--out", tmp_path / "out")
    assert load(tmp_path / "out")[0].get_input_embeddings().weight.shape[0] == len(range(0, size, 2))
    assert not list((tmp_path / "out").glob("tokenizer*"))


def test_prune_as_json_and_by_its_own_plan_again(dense, cut, tmp_path, capsys):
    options = ["--compensate", "--calibration", cut.parent / "text.txt"]  # as the default did
    found = run_json(capsys, "prune", dense, "--plan", cut / "plan.json", "--out", tmp_path / "again", *options)
    assert found["n_parameters_kept"] == PruningPlan.load(cut / "plan.json").n_parameters_kept
    assert found["kinds"]["ffn_channel"]["after"] < found["kinds"]["ffn_channel"]["before"]
    assert torch.equal(logits(tmp_path / "again"), logits(cut))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--importance", "random", "--seed", "3"),
        ("--importance", "l1", "--ranking", "global"),
        ("--importance", "l2", "--of", "units", "--kinds", "ffn_channel", "--round-to", "8"),
    ],
)
def test_prune_takes_its_options(dense, tmp_path, capsys, options):
    run_json(capsys, "prune", dense, "--pruning-ratio", "0.25", *options, "--out", tmp_path / "x")
    assert logits(tmp_path / "x").isfinite().all()


def test_protected_layer_stays_whole(dense, tmp_path, capsys):
    options = ("--importance", "l2", "--protect-layers", "0", "--pruning-ratio", "0.1")
    run_json(capsys, "prune", dense, *options, "--out", tmp_path / "x")
    assert all(".0." not in name for name in PruningPlan.load(tmp_path / "x" / "plan.json").keep)


def test_granularity_changes_the_label(dense, text, tmp_path, capsys):
    options = ("--granularity", "vector", "--calibration", text, "--n-samples", "2", "--seq-len", "16")
    found = run_json(capsys, "prune", dense, "--pruning-ratio", "0.1", *options, "--out", tmp_path / "x")
    assert "vector" in found["notes"]["importance"]


def test_even_cut_loads_with_plain_transformers(dense, tmp_path, capsys):
    options = ("--of", "units", "--importance", "l2", "--pruning-ratio", "0.5")
    run_json(capsys, "prune", dense, *options, "--out", tmp_path / "x")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert torch.equal(plain(torch.arange(9)[None]).logits, logits(tmp_path / "x"))


def test_recover_keeps_the_loss_curve_and_what_was_cut(cut, recovered):
    log = json.loads((recovered / "recovery.json").read_text())
    assert len(log["losses"]) == 3
    assert (recovered / "plan.json").read_text() == (cut / "plan.json").read_text()
    card = (recovered / "README.md").read_text()
    assert card.startswith((cut / "README.md").read_text()) and "Recovered" in card
    assert not torch.equal(logits(cut), logits(recovered))


@pytest.mark.slow
def test_recover_as_json_with_the_papers_preset(cut, text, tmp_path, capsys):
    options = ("--preset", "paper", "--max-steps", "1", "--seq-len", "32", "--learning-rate", "0.01")
    found = run_json(capsys, "recover", cut, "--data", text, *options, "--out", tmp_path / "x")
    assert found["steps"] == 1 and found["loss_first"] == found["loss_last"]
    assert "batch_size=64" in found["method"] and "learning_rate=0.01" in found["method"]


def test_evaluate_sets_models_side_by_side(dense, cut, recovered, text, capsys):
    assert main(["evaluate", *map(str, (dense, cut, recovered)), "--data", text, "--window", "64"]) == 0
    captured = capsys.readouterr()
    head = captured.out.splitlines()[0].split()
    assert head == ["dense", "cut", "recovered"]
    assert "perplexity" in captured.out and "macs" in captured.out and "windows of 64" in captured.out
    assert "no zero_shot" in captured.err


def test_evaluate_as_json_by_documents(dense, cut, tmp_path, capsys):
    stories = tmp_path / "stories.txt"
    stories.write_text("One day.<|endoftext|>\nAnother one, longer.")
    options = ("--protocol", "documents", "--separator", "<|endoftext|>", "--metrics", "perplexity")
    found = run_json(capsys, "evaluate", dense, cut, "--text", stories, *options)
    assert set(found) == {"dense", "cut"}
    assert found["cut"]["protocol"]["separator"] == "<|endoftext|>" and found["cut"]["perplexity"] > 1


def test_models_of_one_name_keep_their_paths(dense, tmp_path, capsys):
    twin = tmp_path / "dense"
    twin.symlink_to(dense)
    assert set(run_json(capsys, "evaluate", dense, twin, "--metrics", "cost")) == {str(dense), str(twin)}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_it_does_and_ends_with_an_example(command, capsys):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"prunekit {command}" in out
    assert f"\nexample:\n  prunekit {command}" in out


@pytest.mark.parametrize(("name", "meant"), [("smolm2", True), ("SmolLM2", True), ("small", False)])
def test_a_misspelt_model_is_asked_back_and_the_hub_client_is_quiet(monkeypatch, capsys, name, meant):
    client, told = logging.getLogger("huggingface_hub.utils._http"), []

    def unreachable(*_):
        told.append(client.isEnabledFor(logging.WARNING))
        raise OSError("no network")

    monkeypatch.setattr(origins, "get_hf_file_metadata", unreachable)
    before = logging.getLogger("huggingface_hub").level
    assert main(["discover", name]) == 2 and told and not any(told)
    assert logging.getLogger("huggingface_hub").level == before
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and ("(did you mean 'smollm2'?)" in err) == meant and "'world' or 'smollm2'" in err


def test_a_warning_names_what_can_be_typed_in_a_shell(capsys):
    with own_warnings():
        warnings.warn(LossChange("prune", 4.0, 8.0, 1024, "held-out windows").warning, DamageWarning, stacklevel=1)
    said = capsys.readouterr().err
    assert "--pruning-ratio" in said and "--protect-layers; prunekit recover wins" in said and "_" not in said


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"    {command} " in out for command in COMMANDS) and "example:" in out


@pytest.mark.slow
def test_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "prunekit"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("prunekit: ") and done.stderr.count("\n") == 1 and "--help" in done.stderr


@pytest.fixture
def lab_calls(monkeypatch):
    """JupyterLab is not started: its commands and environments are kept. Nobody is root."""
    calls = []
    monkeypatch.setattr("subprocess.call", lambda command, env: calls.append((command, env)) or 0)
    monkeypatch.setattr("os.geteuid", lambda: 1000, raising=False)
    return calls


def test_lab_starts_on_the_folder(tmp_path, lab_calls, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "00_start_here.ipynb").write_text("{}")
    assert main(["lab", str(tmp_path), "--no-browser", "--port", "8899", "--jupyter=--ServerApp.ip=::1 --debug"]) == 0
    ((command, env),) = lab_calls
    assert command[:4] == [sys.executable, "-m", "jupyterlab", str(tmp_path)]
    options = ["--no-browser", "--ServerApp.port=8899", "--LabApp.default_url=/lab/tree/00_start_here.ipynb"]
    assert command[4:] == [*options, "--ServerApp.ip=::1", "--debug"] and env["OMP_NUM_THREADS"] == "1"


def test_lab_as_root_says_what_to_type(tmp_path, lab_calls, monkeypatch, capsys):
    (tmp_path / "00_start_here.ipynb").write_text("{}")
    monkeypatch.setattr("os.geteuid", lambda: 0, raising=False)
    assert main(["lab", str(tmp_path)]) == 2 and "prunekit lab --allow-root" in capsys.readouterr().err
    assert main(["lab", str(tmp_path), "--allow-root"]) == 0 and "--allow-root" in lab_calls[0][0]


def test_lab_copies_the_series_and_keeps_what_is_there(tmp_path, lab_calls, capsys):
    mine = tmp_path / "mine/notebooks/00_start_here.ipynb"
    mine.parent.mkdir(parents=True)
    mine.write_text("{}")
    assert main(["lab", "--copy-to", str(tmp_path / "mine"), "--no-browser"]) == 0
    assert lab_calls[0][0][3] == str(mine.parent) and mine.read_text() == "{}"
    assert (mine.parent / "exercises/ex_00.py").is_file()
    assert (tmp_path / "mine/benchmarks/results/real_smollm2.csv").is_file()
    assert main(["lab", "here", "--copy-to", "there"]) == 2 and "not both" in capsys.readouterr().err


def test_lab_from_a_wheel_opens_a_copy_in_the_current_folder(tmp_path, lab_calls, monkeypatch):
    """A wheel has the series beside the package's modules, and no clone around it."""
    shipped = tmp_path / "site/prunekit/series"
    (shipped / "notebooks").mkdir(parents=True)
    (shipped / "notebooks/00_start_here.ipynb").write_text("{}")
    monkeypatch.setattr("prunekit.cli.notebooks.SHIPPED", shipped)
    monkeypatch.setattr("prunekit.cli.notebooks._clone", lambda: tmp_path / "site")
    monkeypatch.chdir(tmp_path)
    assert main(["lab"]) == main(["lab"]) == 0
    assert [command[3] for command, _ in lab_calls] == ["prunekit-series/notebooks"] * 2
    assert (tmp_path / "prunekit-series/notebooks/00_start_here.ipynb").is_file()


@pytest.mark.slow
def test_real_model_is_cut_and_recovers(tmp_path, capsys):
    model, story = shared_path("models", "stories260K"), shared_path("data", "tinystories", "sample_niklas6.txt")
    out, again = tmp_path / "cut", tmp_path / "recovered"
    options = ("--pruning-ratio", "0.2", "--n-samples", "32")
    found = run_json(capsys, "prune", model, *options, "--calibration", story, "--out", out)
    assert found["pruning_ratio"] == pytest.approx(0.2, abs=0.005)
    run_json(capsys, "recover", out, "--data", story, "--max-steps", "40", "--out", again)
    heldout = shared_path("data", "tinystories", "sample_cs336.txt")
    reports = run_json(capsys, "evaluate", model, out, again, "--data", heldout, "--metrics", "perplexity")
    before, after, recovered = (reports[name]["perplexity"] for name in ("stories260K", "cut", "recovered"))
    assert before == pytest.approx(7.54, abs=0.01)
    assert before < recovered < before + (after - before) / 2
