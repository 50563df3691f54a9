"""What is needed for some abilities only is refused by name where it is missing, and nothing else needs it."""

import subprocess
import sys

import pytest

from prunekit.errors import MissingExtraError, need

WITHOUT = """
import sys
absent = "optuna lightgbm joblib sklearn gguf lm_eval distributed nbclient nbconvert nbformat"
sys.modules.update(dict.fromkeys(absent.split()))
import prunekit as pk
from prunekit import *
from prunekit.cli import main
from prunekit.recipes import hywia, llm_pruner, lorashear, sparsellm
assert main(["recipe", "--help"]) == 0 and main(["evaluate", "--help"]) == 0
assert discover is pk.discover and not hasattr(pk, "PlanSpace") and "PlanSpace" not in pk.__all__
pk.search_space
"""


def test_what_is_missing_is_named_with_the_line_that_installs_it():
    need("search", "json", why="this")
    with pytest.raises(MissingExtraError, match=r"^this needs no_a and no_b; pip install 'prunekit\[search\]'$"):
        need("search", "json", "no_a", "no_b", why="this")


@pytest.mark.slow
def test_without_the_extras_all_but_search_is_there():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True)
    said = "prunekit.search needs joblib and lightgbm and optuna; pip install 'prunekit[search]'"
    assert done.returncode == 1 and done.stderr.strip().endswith(said)
