"""Bad input: each place that refuses it says what was given and what to do, and leaves nothing behind."""

import shutil

import pytest
import torch
from evaluation_helpers import TEXT, byte_tokenizer, llama
from safetensors.torch import load_file, save_file

import prunekit as pk
from prunekit.cli import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders and files, good and bad, by name."""
    root = tmp_path_factory.mktemp("inputs")
    llama(head_dim=8).save_pretrained(root / "good")
    byte_tokenizer().save_pretrained(root / "good")
    llama(head_dim=8, num_key_value_heads=4, intermediate_size=40).save_pretrained(root / "mute")  # no tokenizer
    _broken_models(root)
    (root / "text.txt").write_text(TEXT)
    (root / "empty.txt").write_text(" \n ")
    (root / "short.txt").write_text("One day")
    (root / "latin.txt").write_bytes(b"caf\xe9")
    (root / "full").mkdir()
    (root / "full" / "kept.txt").write_text("mine")
    return root


def _broken_models(root):
    (root / "pickled").mkdir()
    shutil.copy(root / "good" / "config.json", root / "pickled")
    (root / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    for name in ("notjson", "nan", "torn"):
        shutil.copytree(root / "good", root / name)
    (root / "notjson" / "config.json").write_text("{'model_type': llama")
    weights = load_file(root / "nan" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, root / "nan" / "model.safetensors", {"format": "pt"})
    whole = (root / "torn" / "model.safetensors").read_bytes()
    (root / "torn" / "model.safetensors").write_bytes(whole[: len(whole) // 2])


@pytest.fixture
def refused(place, tmp_path, monkeypatch, capsys):
    """Run a command inside the inputs; it must end with 2, one line, and nothing new anywhere."""

    def run(command):
        monkeypatch.chdir(place)
        before = sorted(place.rglob("*"))
        assert main([part.replace("OUT", str(tmp_path / "out")) for part in command.split()]) == 2
        captured = capsys.readouterr()
        said = [line for line in captured.err.replace("\r", "\n").splitlines() if line.startswith("prunekit: ")]
        assert len(said) == 1 and captured.err.endswith(said[0] + "\n") and captured.out == ""
        assert "Traceback" not in captured.err
        assert sorted(place.rglob("*")) == before and not list(tmp_path.iterdir())
        return said[0]

    return run


PRUNE = {
    "ratio of one": ("good --pruning-ratio 1.0", ["pruning_ratio=1.0", "[0, 1)"]),
    "ratio below zero": ("good --pruning-ratio -0.1", ["pruning_ratio=-0.1", "[0, 1)"]),
    "ratio that is no number": ("good --pruning-ratio NaN", ["pruning_ratio=nan", "[0, 1)"]),
    "ratio too large for the model": ("good --importance l2 --pruning-ratio 0.95", ["0.95", "at most"]),
    "no ratio and no plan": ("good", ["--pruning-ratio", "--plan"]),
    "a ratio and a plan": ("good --pruning-ratio 0.2 --plan text.txt", ["--plan", "leave out --pruning-ratio"]),
    "a seed and a plan": ("good --plan text.txt --seed 0", ["--plan", "leave out --seed"]),
    "a window and a plan": ("good --plan text.txt --seq-len 64", ["--plan", "leave out --seq-len"]),
    "samples and a plan": ("good --plan text.txt --n-samples 16", ["--plan", "leave out --n-samples"]),
    "unknown importance": ("good --pruning-ratio 0.2 --importance magic", ["'magic'", "taylor", "l2", "random"]),
    "granularity of a magnitude": (
        "good --pruning-ratio 0.2 --importance l1 --granularity vector",
        ["'l1'", "granular"],
    ),
    "unknown granularity": (
        "good --pruning-ratio 0.2 --granularity row --calibration text.txt",
        ["'row'", "'element'"],
    ),
    "unknown ranking": ("good --importance l2 --pruning-ratio 0.2 --ranking best", ["'best'", "'local'", "'global'"]),
    "unknown measure": ("good --importance l2 --pruning-ratio 0.2 --of bytes", ["'bytes'", "'parameters'"]),
    "unknown kind": ("good --importance l2 --pruning-ratio 0.2 --kinds nose", ["'nose'", "ffn_channel"]),
    "a layer that is not there": ("good --importance l2 --pruning-ratio 0.2 --protect-layers 9", ["9", "0 to 1"]),
    "no calibration text": ("good --pruning-ratio 0.2", ["'curvature'", "--calibration", "l2"]),
    "empty calibration text": ("good --pruning-ratio 0.2 --calibration empty.txt", ["empty.txt", "holds no text"]),
    "missing calibration text": (
        "good --pruning-ratio 0.2 --calibration gone.txt",
        ["'gone.txt' is not a file that exists", ".jsonl"],
    ),
    "unknown kind before the model": (
        "./gone --importance l2 --pruning-ratio 0.2 --kinds nose",
        ["'nose'", "'kv_head'"],
    ),
    "misspelt option": ("good --prunning-ratio 0.2", ["--prunning-ratio", "prunekit prune --help"]),
    "text that is not UTF-8": ("good --pruning-ratio 0.2 --calibration latin.txt", ["latin.txt", "UTF-8"]),
    "calibration shorter than a window": (
        "good --pruning-ratio 0.2 --calibration short.txt",
        ["8 tokens", "seq_len=96"],
    ),
    "no window": ("good --pruning-ratio 0.2 --calibration text.txt --n-samples 0", ["n_samples=0", "1 or more"]),
    "no tokenizer": ("mute --pruning-ratio 0.2 --calibration text.txt", ["no tokenizer", "tokenizer.json"]),
    "no such folder": ("./gone --importance l2 --pruning-ratio 0.2", ["'./gone'", "does not exist"]),
    "a folder that is no checkpoint": ("full --importance l2 --pruning-ratio 0.2", ["'full'", "config.json"]),
    "only a pickle": ("pickled --importance l2 --pruning-ratio 0.2", ["'pickled'", "pytorch_model.bin", "safetensors"]),
    "config.json that is not JSON": (
        "notjson --importance l2 --pruning-ratio 0.2",
        ["notjson", "config.json", "not JSON"],
    ),
    "weights that are NaN": ("nan --importance l2 --pruning-ratio 0.2", ["layers.1.mlp.up_proj", "NaN"]),
    "weights cut short": ("torn --importance l2 --pruning-ratio 0.2", ["torn", "cannot be read"]),
    "a plan that is not there": ("good --plan gone.json", ["'gone.json'", "No such file"]),
    "a configuration for a plan": ("good --plan good/config.json", ["no pruning plan: it has no 'keep'"]),
    "a plan that is no JSON": ("good --plan text.txt", ["no pruning plan", "JSON"]),
}


@pytest.mark.parametrize("name", PRUNE)
def test_prune_refuses(name, refused):
    options, expected = PRUNE[name]
    said = refused(f"prune {options} --out OUT")
    assert all(part in said for part in expected), said


OTHERS = {
    "no command": ("", ["COMMAND", "--help"]),
    "unknown command": ("shrink good", ["'shrink'", "prune", "evaluate"]),
    "unknown option": ("discover good --fast", ["--fast"]),
    "discover what is cut short": ("discover torn", ["torn", "cannot be read"]),
    "discover what is only pickled": ("discover pickled", ["'pickled'", "pytorch_model.bin", "safetensors"]),
    "discover what is not JSON": ("discover notjson", ["notjson", "config.json", "not JSON"]),
    "discover without a model": ("discover ./gone", ["'./gone'", "does not exist"]),
    "prune without a place": ("prune good --pruning-ratio 0.2", ["--out"]),
    "prune into a full folder": ("prune ./gone --pruning-ratio 0.2 --out full", ["'full' exists", "new folder"]),
    "prune into a file": (
        "prune ./gone --importance l2 --pruning-ratio 0.2 --out text.txt/x",
        ["text.txt", "cannot write"],
    ),
    "recover into a full folder": ("recover ./gone --data text.txt --out full", ["'full' exists", "new folder"]),
    "recover a model with NaN": ("recover nan --data text.txt --out OUT", ["layers.1.mlp.up_proj", "NaN"]),
    "recover on too little": ("recover good --data short.txt --out OUT", ["8 tokens", "seq_len=96"]),
    "recover without a tokenizer": ("recover mute --data text.txt --out OUT", ["no tokenizer"]),
    "a rank of zero": ("recover good --data text.txt --out OUT --r 0", ["LoRA: r=0", "from 1 to"]),
    "an unknown preset": ("recover good --data text.txt --out OUT --preset quick", ["'quick'", "paper"]),
    "evaluate on nothing": ("evaluate good", ["'good'", "--data", "--metrics"]),
    "evaluate on too little": ("evaluate good --data short.txt --metrics perplexity", ["8 tokens", "window of 96"]),
    "an unknown metric": ("evaluate ./gone --metrics speed", ["'speed'", "'perplexity'", "'zero_shot'", "'cost'"]),
    "an unknown protocol": (
        "evaluate good --data text.txt --metrics perplexity --protocol all",
        ["'all'", "'documents'"],
    ),
    "a separator in windows": (
        "evaluate good --data text.txt --metrics perplexity --separator //",
        ["'//'", "documents"],
    ),
    "a separator that is not there": (
        "evaluate good --data text.txt --metrics perplexity --protocol documents --separator //",
        ["'//'", "does not occur"],
    ),
    "a window too long": ("evaluate good --data text.txt --metrics perplexity --window 500", ["window=500", "96"]),
    "a stride beyond the window": (
        "evaluate good --data text.txt --metrics perplexity --window 32 --stride 64",
        ["stride=64", "32"],
    ),
    "questions of another world": ("evaluate good --metrics zero_shot", ["--tasks", "world", "--metrics"]),
    "the same model twice": ("evaluate good good --metrics cost", ["'good'", "twice"]),
    "no notebooks": ("lab full", ["'full'", "no notebooks"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_commands_refuse(name, refused):
    command, expected = OTHERS[name]
    said = refused(command)
    assert all(part in said for part in expected), said


def test_full_folder_is_left_as_it_was(place, refused):
    refused("prune good --pruning-ratio 0.2 --importance l2 --out full")
    assert [p.name for p in (place / "full").iterdir()] == ["kept.txt"]


def test_plan_of_another_model(place, refused):
    groups = pk.discover(llama(num_hidden_layers=3))
    plan = pk.plan(groups, pk.score(llama(num_hidden_layers=3), groups, pk.Magnitude()), 0.2)
    plan.save(place / "other.json")
    said = refused("prune good --plan other.json --out OUT")
    assert "another model" in said and "layers.2" in said


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1, 2]",
        '{"keep": {}}',
        '{"keep": [], "n_units": {}, "n_parameters": 1, "n_parameters_kept": 1}',
        '{"keep": {"a": [0, 5]}, "n_units": {"a": 3}, "n_parameters": 1, "n_parameters_kept": 1}',
        '{"keep": {"a": []}, "n_units": {"a": 3}, "n_parameters": 1, "n_parameters_kept": 1}',
    ],
)
def test_broken_plan(text, place, refused):
    (place / "broken.json").write_text(text)
    assert "plan" in refused("prune good --plan broken.json --out OUT")


@pytest.mark.parametrize("ratio", [1.0, -0.1, float("nan"), float("inf"), True, "0.2"])
def test_api_refuses_a_ratio_outside_its_range(ratio, place):
    model, _ = pk.load(place / "good")
    groups = pk.discover(model)
    with pytest.raises(pk.PrunekitError, match=r"pruning_ratio=.*\[0, 1\)"):
        pk.plan(groups, pk.score(model, groups, pk.Magnitude()), ratio)


def test_api_says_the_same_of_texts(place):
    model, tokenizer = pk.load(place / "good")
    with pytest.raises(pk.PrunekitError, match="holds no text"):
        pk.calibration_set(place / "empty.txt", tokenizer)
    for read in (pk.calibration_set, lambda text, none: pk.perplexity(model, none, text)):
        with pytest.raises(pk.PrunekitError, match="(tokenizer=None|is text).*no tokenizer gets one by tokenizer.json"):
            read(place / "text.txt", None)
    with pytest.raises(pk.PrunekitError, match="8 tokens and one window needs seq_len=16"):
        pk.calibration_set(place / "short.txt", tokenizer, seq_len=16)
    with pytest.raises(pk.PrunekitError, match="8 tokens, less than one window of 96"):
        pk.perplexity(model, tokenizer, place / "short.txt")


def test_api_saves_over_nothing(place):
    model, _ = pk.load(place / "good")
    with pytest.raises(pk.PrunekitError, match="'.*full' exists"):
        pk.save(model, place / "full")


def interrupt(*args, **options):
    raise KeyboardInterrupt


def test_interrupt_while_saving_leaves_nothing(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", interrupt)
    options = ["--pruning-ratio", "0.2", "--importance", "l2", "--out", str(tmp_path / "out")]
    assert main(["prune", str(place / "good"), *options]) == 130
    assert capsys.readouterr().err.startswith("prunekit: interrupted")
    assert not list(tmp_path.iterdir())
