"""`prunekit sparsify`: a folder with zeros and what was done, or one line and nothing."""

import json

import pytest

from prunekit import SparsityReport, load, sparsify
from prunekit.calibration import calibration_set
from prunekit.cli import main


def test_a_folder_holds_what_python_would_make(tmp_path, capsys):
    out = tmp_path / "sparse"
    options = ["--pattern", "1:4", "--method", "sparsegpt", "--n-samples", "4", "--layers", "0,1"]
    assert main(["sparsify", "world", *options, "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    model, tokenizer = load("world")
    calib = calibration_set("world", tokenizer, n_samples=4)
    expected = sparsify(model, calib, "sparsegpt", pattern=(1, 4), layers=[0, 1])
    found, _ = load(out)
    for (name, a), b in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        assert ((a == 0) == (b == 0)).all(), name
    assert told["sparsity"] == 0.75 and found.sparsity_report == expected.sparsity_report
    assert SparsityReport.from_json((out / "sparsity.json").read_text()) == expected.sparsity_report


def test_magnitude_reads_nothing_and_the_table_says_so(tmp_path, capsys):
    assert main(["sparsify", "world", "--sparsity", "0.5", "--method", "magnitude", "--out", str(tmp_path / "s")]) == 0
    said = capsys.readouterr().out
    assert "56 by magnitude" in said and "50.0%" in said
    model = str(tmp_path / "s")
    assert main(["sparsify", model, "--sparsity", "0.6", "--method", "magnitude", "--out", str(tmp_path / "t")]) == 0
    assert "not measured" in capsys.readouterr().out
    wanted = ["--sparsity", "0.6", "--method", "magnitude", "--allocation", "global"]
    assert main(["sparsify", model, *wanted, "--out", str(tmp_path / "u")]) == 2
    assert "--allocation global reads text; give --calibration" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "sparsity=None, pattern=None: give one of the two"),
        (["--sparsity", "1"], "sparsity=1.0 is not allowed; give a fraction in [0, 1)"),
        (["--pattern", "2-4"], "'2-4' is not KEPT:OF"),
        (["--pattern", "5:4"], "1 ≤ kept ≤ of"),
        (["--pattern", "2:5"], "does not divide"),
        (["--sparsity", "0.5", "--method", "best"], "method='best' is unknown"),
        (["--sparsity", "0.5", "--layers", "9"], "numbers from 0 to 7"),
        (["--sparsity", "0.5", "--allocation", "fair"], "allocation='fair' is unknown"),
    ],
)
def test_what_cannot_be_is_one_line(options, message, tmp_path, capsys):
    assert main(["sparsify", "world", *options, "--n-samples", "2", "--out", str(tmp_path / "sparse")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1]
    assert not (tmp_path / "sparse").exists()
