"""What every test shares: quiet threads, no network, the shared inputs, and a guard over skipped tests."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples in every run, so that a change is judged by what it changes: HYPOTHESIS_PROFILE=default draws anew.
settings.register_profile("same", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or "same")

# Before anything imports torch: one thread a process, and nothing from a hub.
for name, value in {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}.items():
    os.environ.setdefault(name, value)

SHARED = Path(os.environ.get("PRUNEKIT_SHARED") or Path(__file__).parents[1].parent / "shared")
WORD = "shared"  # what the reason of a test that needs the folder says
_skipped: set[str] = set()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models, texts and oracles; skips where it is missing."""
    if not SHARED.is_dir():
        pytest.skip("needs the shared folder: PRUNEKIT_SHARED or ../shared")
    return SHARED


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct and its tokenizer, as loaded: copy the model before changing it. Skips where missing."""
    from shared import real_model  # here, since test_setup.py copies this file to where that module is not

    return real_model("smollm2")


QUICK = {"llama_gqa", "gpt2", "gemma3", "mixtral"}  # families that `make fast` asks; `make test` asks all
OF_FAMILIES = (
    "test_checkpoint",
    "test_cli_discover",
    "test_compensation",
    "test_configuration_after_cut",
    "test_curvature",
    "test_families",
    "test_odd_models",
    "test_packing",
    "test_parts",
    "test_reconstruction",
    "test_sparsify",
)

WHOLE = (
    "test_keeping_zeros",
    "test_mixture",
    "test_progressive",
    "test_public_reports",
    "test_search_campaign",
    "test_streaming",
    "test_streaming_gradients",
    "test_tour",
)


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items):
    for item in items:
        family = getattr(item, "callspec", None) and item.callspec.params.get("name")
        others = isinstance(family, str) and item.module.__name__ in OF_FAMILIES and family not in QUICK
        if others or item.module.__name__ in WHOLE:  # of these, all are slow
            item.add_marker(pytest.mark.slow)


def _note(report):
    reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else ""
    if report.skipped and WORD in reason and SHARED.is_dir():
        _skipped.add(f"{report.nodeid}: {reason}")


pytest_runtest_logreport = _note
pytest_collectreport = _note


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    """Where the shared folder is there, a test that skips for want of it fails the run."""
    if _skipped and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    if _skipped:
        terminalreporter.section(f"skipped although {SHARED.name}/ is there: the run fails", red=True)
        for line in sorted(_skipped):
            terminalreporter.write_line(line)
