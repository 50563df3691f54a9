"""The scoreboard and the ledger: made from the stored tables alone."""

import importlib
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
STORED = ROOT / "benchmarks" / "results"
MODELS = ("smollm2", "world")


@pytest.fixture(scope="module")
def script():
    """benchmarks/scoreboard.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module("scoreboard")


@pytest.fixture
def tables(tmp_path):
    """A copy of the stored tables, to change."""
    for path in STORED.glob("*.csv"):
        shutil.copy(path, tmp_path)
    return tmp_path


def row_of(script, folder, claim):
    table = script.ledger(script.Results(folder)).set_index("claim")
    (found,) = [name for name in table.index if claim in name]
    return table.loc[found]


def change(path, column, value, **rows):
    table = pd.read_csv(path)
    for name, wanted in rows.items():
        assert wanted in set(table[name])
    chosen = pd.concat([table[name] == wanted for name, wanted in rows.items()], axis=1).all(axis=1)
    table.loc[chosen, column] = value
    table.to_csv(path, index=False)


def test_the_stored_tables_are_those_of_the_figures(script, tmp_path, monkeypatch, capsys):
    """`make scoreboard` after new figures; else this fails."""
    monkeypatch.setattr("sys.argv", ["scoreboard.py", "--out", str(tmp_path)])
    script.main()
    assert "not measured" in capsys.readouterr().out
    for name in ("scoreboard.csv", "ledger.csv"):
        assert (tmp_path / name).read_text() == (STORED / name).read_text(), name


def test_a_changed_figure_turns_a_direction_round(script, tables):
    claim = "lose less than L2 scores."
    rows = {"method": "L2", "ratio": 0.2, "stage": "untuned"}
    before = row_of(script, tables, f"first-order Taylor {claim}")
    change(tables / "quality_world.csv", "perplexity", 1.5, **rows)
    after = row_of(script, tables, f"first-order Taylor {claim}")
    assert (before["world_direction"], after["world_direction"]) == ("holds", "does not hold")
    assert (before["world_agree"], after["world_agree"]) == ("3 of 3", "0 of 3") and after["world_beside"] == 1.5


def test_higher_is_better_where_the_claim_says_so(script, tables):
    claim = "With 20% gone, LoRAShear has a higher accuracy than LLM-Pruner."
    assert row_of(script, tables, claim)["smollm2_direction"] == "does not hold"
    change(tables / "recipes_smollm2.csv", "tasks", 0.9, recipe="LoRAShear")
    assert row_of(script, tables, claim)["smollm2_direction"] == "holds"


def test_a_share_of_the_dense_model_is_what_must_be_beaten(script, tables):
    claim = "LoRAShear has 98% of the dense model's accuracy"
    dense = pd.read_csv(STORED / "recipes_smollm2.csv").query("recipe == 'dense' and stage == 'pruned'")["tasks"].item()
    assert row_of(script, tables, claim)["smollm2_beside"] == pytest.approx(0.98 * dense, abs=1e-4)


@pytest.mark.parametrize("spoil", ["file", "rows", "column", "empty cells"])
def test_what_is_missing_is_not_measured(script, tables, spoil):
    path, claim = tables / "sparsity_opt.csv", "With 80% zeros"
    table = pd.read_csv(path)
    if spoil == "rows":
        table[table["method"] != "sparsegpt"].to_csv(path, index=False)
    elif spoil == "column":
        table.drop(columns="perplexity").to_csv(path, index=False)
    elif spoil == "empty cells":
        table.assign(perplexity=None).to_csv(path, index=False)
    else:
        path.unlink()
    row = row_of(script, tables, claim)
    assert row["world_direction"] == "not measured" and pd.isna(row["world_claimed"]) and pd.isna(row["world_files"])


def test_a_folder_without_tables_gives_a_scoreboard_without_figures(script, tmp_path):
    results = script.Results(tmp_path)
    ledger, board = script.ledger(results), script.scoreboard(results)
    assert (ledger[[f"{model}_direction" for model in MODELS]] == "not measured").all(axis=None)
    assert board.filter(like="perplexity").isna().all(axis=None) and len(board) == len(script.entries())


def test_every_paper_has_two_claims_or_more_each_with_a_figure_and_a_reason(script):
    table = pd.read_csv(STORED / "ledger.csv")
    counts = table["paper"].value_counts()
    assert len(counts) == 5 and counts.min() >= 2 and table["claim"].is_unique
    for column in ("paper_figure", "paper_model", "measure", "why"):
        assert table[column].str.len().min() > 4, column
    assert set(table["better"]) == {"lower", "higher"}
    assert all(len(claim.why.split()) <= 25 and claim.why.count(". ") == 0 for claim in script.CLAIMS)


def test_what_a_row_says_stands_in_the_tables_that_it_names(script):
    """By hand, for one row of the ledger and one of the scoreboard."""
    recipes = pd.read_csv(STORED / "recipes_smollm2.csv").set_index(["recipe", "stage"])["wikitext2"]
    row = row_of(script, STORED, "Recovery by LoRA lowers")
    assert row["smollm2_claimed"] == recipes["LLM-Pruner", "recovered"] < row["smollm2_beside"]
    assert row["smollm2_files"] == "recipes_smollm2.csv"
    board = pd.read_csv(STORED / "scoreboard.csv").set_index(["model", "recipe"])
    real = pd.read_csv(STORED / "real_smollm2.csv").query("way.str.startswith('default') and ratio == 0.2")["wikitext2"]
    found = board.loc["SmolLM2", "default, 20%"]
    assert found["cut_perplexity"] == pytest.approx(real.mean(), abs=1e-3) and found["cut_seeds"] == len(real) == 3
    assert (found["cut_low"], found["cut_high"]) == (real.min(), real.max())
    assert found["recovered_times_control"] == round(found["recovered_perplexity"] / recipes["dense", "recovered"], 3)


def test_kept_is_found_in_three_forms(script):
    board = pd.read_csv(STORED / "scoreboard.csv").set_index(["model", "recipe"])["kept"]
    assert board["SmolLM2", "default, 20%"] == 0.8  # as it stands
    assert board["world", "predictor, 50%"] == pytest.approx(0.5, abs=0.005)  # parameters beside the dense model's
    assert board["world", "SparseLLM, 80%"] == pytest.approx(0.2, abs=0.005)  # what is not gone


def test_the_counts_in_the_results_are_those_of_the_ledger():
    table = pd.read_csv(STORED / "ledger.csv")
    text = " ".join((ROOT / "docs/results.md").read_text().split())
    found = re.search(
        r"Of (\d+) claims (\d+) are measured on SmolLM2, and (\d+) hold; (\d+) on the world, and (\d+)", text
    )
    counts = [len(table)]
    for model in MODELS:
        directions = table[f"{model}_direction"]
        counts += [(directions != "not measured").sum(), (directions == "holds").sum()]
    assert [int(count) for count in found.groups()] == counts
