"""Commands with wrong words for their options, from a seed: each ends with code 2 and one line."""

import random
import shutil
from pathlib import Path

import pytest
from evaluation_helpers import TEXT, byte_tokenizer, llama

import prunekit as pk
from prunekit.cli import main

SEED = 0
COMMANDS = {
    # verb → what it is always given, and its options; none of these ends well with a wrong value
    "discover": (["MODEL"], ("--plot", "--layer")),
    "prune": (
        ["MODEL", "--out", "OUT", "--calibration", "TEXT"],
        ("--pruning-ratio", "--importance", "--kinds", "--ranking", "--n-samples", "--seq-len", "--seed", "--round-to",
         "--min-units", "--protect-layers", "--n-steps", "--fit", "--dtype", "--device", "--max-shard-size", "--plan"),
    ),
    "sparsify": (
        ["MODEL", "--out", "OUT", "--calibration", "TEXT"],
        ("--sparsity", "--pattern", "--method", "--allocation", "--layers", "--n-samples", "--seq-len", "--seed"),
    ),
    "recover": (
        ["MODEL", "--out", "OUT", "--data", "TEXT"],
        ("--r", "--alpha", "--dropout", "--learning-rate", "--batch-size", "--epochs", "--max-steps", "--warmup",
         "--targets", "--seq-len", "--seed", "--method", "--weight-decay", "--preset"),
    ),
    "evaluate": (["MODEL", "--data", "TEXT"], ("--metrics", "--window", "--stride", "--protocol")),
    "knowledge": (["MODEL", "--out", "OUT", "--text", "TEXT"], ("--ratios", "--kinds", "--importance", "--limit")),
    "export": (["MODEL", "--out", "OUT"], ("--layout", "--max-shard-size")),
    "recipe": (
        ["llm-pruner", "MODEL", "--out", "OUT", "--calibration", "TEXT"],
        ("--pruning-ratio", "--mode", "--layers", "--ranking", "--normalize", "--n-steps"),
    ),
}  # fmt: skip
WORDS = ("-1", "9" * 20, "9" * 5000, "inf", "nan", "word", "", "\x1b[31m", "x" * 400, "1e400", "0x1", "-0.5", "1,,x")
GOOD = {  # option → what of these it takes
    "--kinds": ("",), "--layers": ("",), "--protect-layers": ("",), "--alpha": ("9" * 20,), "--warmup": ("9" * 20,),
}  # fmt: skip


@pytest.mark.slow
def test_commands_end_with_2_and_one_line_whatever_an_option_is_given(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pk.save(llama(), tmp_path / "model", tokenizer=byte_tokenizer())
    (tmp_path / "text.txt").write_text(TEXT * 3)
    capsys.readouterr()  # the bar of saving
    places = {"MODEL": "model", "OUT": "out", "TEXT": "text.txt"}
    faults, rng, n_cases = [], random.Random(SEED), 0
    for verb, (given, options) in COMMANDS.items():
        for option in options:
            for word in rng.sample(WORDS, 3):
                n_cases += 1
                arguments = [verb, *(places.get(each, each) for each in given), f"{option}={word}"]
                if verb == "prune" and option != "--pruning-ratio":
                    arguments.append("--pruning-ratio=0.2")
                if verb == "sparsify" and option not in ("--sparsity", "--pattern"):
                    arguments.append("--sparsity=0.5")
                fault = command_fault(arguments, capsys, word in GOOD.get(option, ()))
                faults += [f"{arguments}: {fault}"] if fault else []
                shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert not faults, "\n".join(faults)
    assert n_cases > 150


def command_fault(arguments, capsys, is_good):
    """What is wrong with how a command ends; None for nothing."""
    try:
        code = main(arguments)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    said = capsys.readouterr().err
    if code == 0:
        return None if is_good else "accepted"
    is_refused = code == 2 and said.startswith("prunekit: ") and "\x1b" not in said and not Path("out").exists()
    return None if is_refused else f"ends with {code}: {said[-80:]}"
