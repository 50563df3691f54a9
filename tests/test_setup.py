"""The set-up: lock, conda environment, Makefile, CI and hooks stay in step, and fail clearly."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONFTEST = ROOT / "tests/conftest.py"


def wanted():
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(text) for text in [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]]


def parse_pins(lines):
    parsed = (Requirement(line) for line in lines)
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in parsed}


def lock(name="constraints.txt"):
    lines = (ROOT / name).read_text().splitlines()
    return parse_pins(line for line in lines if not line.startswith("#"))


def environment_drift(text, requirements, pins):
    """What stands differently in environment.yml; empty where it is in step."""
    pip = next(entry["pip"] for entry in yaml.safe_load(text)["dependencies"] if isinstance(entry, dict))
    found = parse_pins(line for line in pip if not line.startswith("-"))
    right = {canonicalize_name(wish.name): pins.get(canonicalize_name(wish.name)) for wish in requirements}
    return set(found.items()) ^ set(right.items())


# --- versions ---------------------------------------------------------------------------------------------------------


def test_lock_pins_every_dependency_within_its_range():
    pins = lock()
    missing = [str(wish) for wish in wanted() if pins.get(canonicalize_name(wish.name)) not in wish.specifier]
    assert not missing, f"not in constraints.txt, or outside the range: {missing}"


def test_the_second_lock_pins_the_oldest_promised_versions():
    pins, wishes = lock("constraints-oldest.txt"), [wish for wish in wanted() if wish.name != "torch"]
    oldest = {canonicalize_name(wish.name): Version(str(wish.specifier).removeprefix(">=")) for wish in wishes}
    drift = {name: pins.get(name) for name, version in oldest.items() if Version(pins.get(name, "0")) != version}
    assert not drift, f"not the lower bound of pyproject.toml: {drift}"


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-oldest.txt"])
def test_lock_names_versions_only(name):
    lines = (ROOT / name).read_text().splitlines()
    odd = [line for line in lines if not re.fullmatch(r"#.*|[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line)]
    assert not odd, f"neither a comment nor name==version (no paths, hosts or local versions): {odd}"
    assert lock(name)["torch"] == "2.13.0"


def test_environment_is_in_step_with_the_lock():
    assert not environment_drift((ROOT / "environment.yml").read_text(), wanted(), lock())


@pytest.mark.parametrize("drift", ["pin", "missing", "extra"])
def test_environment_drift_is_seen(drift):
    text = (ROOT / "environment.yml").read_text()
    requirements, pins = wanted(), lock()
    if drift == "pin":
        text = text.replace(f"numpy=={pins['numpy']}", "numpy==1.0")
    elif drift == "missing":
        requirements = [*requirements, Requirement("einops>=0.8")]
    else:
        requirements = requirements[1:]
    assert environment_drift(text, requirements, pins)


def test_environment_asks_for_the_same_python():
    text = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert f"python{PROJECT['requires-python']}" in text["dependencies"]


# --- the wheel --------------------------------------------------------------------------------------------------------


def test_a_wheel_carries_all_that_the_series_reads():
    from prunekit.cli.notebooks import PARTS

    (own,) = re.findall(r"^PARTS = (\([^)]+\))", (ROOT / "setup.py").read_text(), re.M)
    assert ast.literal_eval(own) == PARTS
    shipped = {path for part in PARTS for path in ROOT.glob(part)}
    for book in sorted(ROOT.glob("notebooks/*.ipynb")):
        wanted = re.findall(r"\"\.\./([\w/.]+)\\?\"", book.read_text().replace('\\"', '"'))
        lacking = {name for name in wanted if not any(name in path.as_posix() for path in shipped)} - {"build"}
        assert not lacking, f"{book.name} reads {lacking}"


# --- make -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(tmp_path):
    """A folder with what the set-up reads, and a `fakes` folder for stand-in Pythons."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "fakes").mkdir()
    return tmp_path


def fake_python(folder, script):
    path = folder / "fakes/python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return f"PYTHON={path}"


def make(folder, *arguments):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(["make", *arguments], cwd=folder, env=clean, capture_output=True, text=True, timeout=300)


def test_help_is_the_default_and_lists_every_target():
    said = make(ROOT).stdout
    assert all(
        f"make {target} " in said
        for target in [
            "setup",
            "real",
            "lab",
            "tour",
            "book",
            "test",
            "fast",
            "test-browser",
            "test-oldest",
            "bench",
            "bench-quality",
            "lint",
            "clean",
        ]
    )


@pytest.mark.parametrize("target", ["real", "lab", "tour", "book", "test", "test-browser", "bench", "lint"])
def test_every_target_sets_up_first(bare, target):
    planned = make(bare, "-n", target).stdout
    assert "-m venv .venv" in planned
    assert planned.index("torch==2.13.0") < planned.index("[dev,harness]")


@pytest.mark.parametrize(
    ("script", "says"),
    [("exit 1", "Python 3.11"), ("case $2 in *ensurepip*) exit 1;; esac", "python3-venv"), ("exec nothing", "3.11")],
)
def test_missing_python_is_one_clear_line(bare, script, says):
    done = make(bare, "setup", fake_python(bare, script))
    told = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode and len(told) == 1 and says in told[0]
    assert not (bare / ".venv").exists()


def test_no_python_at_all_is_one_clear_line(bare):
    done = make(bare, "setup", "PYTHON=there-is-no-such-python")
    assert done.returncode and "install it" in done.stderr


def installed_by(pip):
    """A stand-in Python whose venv holds a `python` that runs the shell line `pip` instead of installing."""
    return f"""
if [ "$1 $2" = "-m venv" ]; then
  mkdir -p .venv/bin; printf '#!/bin/sh\\n{pip}\\n' > .venv/bin/python; chmod +x .venv/bin/python
fi"""


def test_set_up_that_stops_half_way_leaves_no_stamp(bare):
    python = fake_python(bare, installed_by("case $5 in torch*) exit 0;; esac; exit 1"))
    assert make(bare, "setup", python).returncode
    assert (bare / ".venv/bin/python").exists() and not (bare / ".venv/.installed").exists()


def test_second_call_does_not_set_up_again_until_the_lock_changes(bare):
    python = fake_python(bare, installed_by("exit 0"))
    assert make(bare, "setup", python).returncode == 0
    assert (bare / ".venv/.installed").exists()
    assert "Nothing" in make(bare, "setup", "PYTHON=false").stdout
    later = (bare / ".venv/.installed").stat().st_mtime + 10
    os.utime(bare / "constraints.txt", (later, later))
    assert make(bare, "setup", "PYTHON=false").returncode


def test_ci_runs_lint_and_test_with_the_real_models():
    script = (ROOT / ".ci/run").read_text()
    assert "set -euo pipefail" in script and re.findall(r"^make (\w+)$", script, re.M) == ["lint", "real", "test"]
    assert script.index("make test\n") < script.index("test-browser")
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_hooks_are_all_local():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [entry["repo"] for entry in hooks["repos"]] == ["local"]
    assert all(hook["language"] == "system" for entry in hooks["repos"] for hook in entry["hooks"])


# --- the guard over skipped tests -------------------------------------------------------------------------------------


def run_pytest(folder, shared, body, *arguments):
    shutil.copy(CONFTEST, folder)
    (folder / "test_it.py").write_text(body)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments, str(folder)]
    env = {**os.environ, "PRUNEKIT_SHARED": str(shared)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


SKIPS = "import pytest\ndef test_real(): pytest.skip('needs the shared folder')\ndef test_ok(): pass\n"
SKIPS_FILE = "import pytest\npytest.skip('no shared folder', allow_module_level=True)\n"


@pytest.mark.slow
@pytest.mark.parametrize(("body", "workers"), [(SKIPS, ["-n", "2"]), (SKIPS_FILE, [])], ids=["test", "file"])
def test_skip_for_want_of_shared_fails_where_shared_is(tmp_path, body, workers):
    (tmp_path / "shared").mkdir()
    done = run_pytest(tmp_path, tmp_path / "shared", body, *workers)
    assert done.returncode == 1 and "the run fails" in done.stdout


def test_skip_for_want_of_shared_passes_where_it_is_not(tmp_path):
    done = run_pytest(tmp_path, tmp_path / "missing", SKIPS + "def test_fixture(shared): pass\n")
    assert done.returncode == 0 and "2 skipped" in done.stdout


@pytest.mark.slow
def test_other_skips_pass(tmp_path):
    (tmp_path / "shared").mkdir()
    done = run_pytest(tmp_path, tmp_path / "shared", SKIPS.replace("needs the shared folder", "no CUDA here"))
    assert done.returncode == 0


def test_files_name_no_machine_and_no_registry():
    files = [
        ROOT / name
        for name in (
            "Makefile",
            "pyproject.toml",
            "constraints.txt",
            "constraints-oldest.txt",
            "environment.yml",
            ".ci/run",
        )
    ]
    assert not [
        path.name for path in files if re.search(r"https?://|index-url|find-links|/home/|/tmp/", path.read_text())
    ]


def test_readme_and_changelog_know_this_version():
    assert PROJECT["version"] in (ROOT / "CHANGELOG.md").read_text()
    assert Path(ROOT / "LICENSE").read_text().lstrip().startswith("Apache License")
