"""What is needed for some abilities only is refused by name where it is missing, and nothing else needs it."""

import subprocess
import sys

import pytest

from prunekit.errors import PrunekitError
from prunekit.extras import need

WITHOUT = """
import sys
for name in ("optuna", "lightgbm", "joblib", "gguf", "lm_eval", "distributed", "nbclient", "nbconvert", "nbformat"):
    sys.modules[name] = None
import prunekit as pk
from prunekit.cli import main
from prunekit.recipes import hywia, llm_pruner, lorashear, sparsellm
assert main(["recipe", "--help"]) == 0 and main(["evaluate", "--help"]) == 0
for name in pk.__all__:
    try:
        getattr(pk, name)
    except pk.PrunekitError as error:
        print(name, error)
"""


def test_what_is_missing_is_named_with_the_line_that_installs_it():
    need("search", "json", why="this")
    with pytest.raises(PrunekitError, match=r"^this needs no_a and no_b; pip install 'prunekit\[search\]'$"):
        need("search", "json", "no_a", "no_b", why="this")


def test_without_the_extras_all_but_search_is_there():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True)
    said = [line for line in done.stdout.splitlines() if "prunekit[search]" in line]
    names = {line.split()[0] for line in said}
    assert names == {
        "AccuracyPredictor",
        "HyperparameterSpace",
        "KnobSpace",
        "PlanSpace",
        "measure_pairs",
        "search_space",
    }
    assert all("needs joblib and lightgbm and optuna; pip install 'prunekit[search]'" in line for line in said)
