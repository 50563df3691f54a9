"""Is this computer ready for the workshop? `python tools/check_setup.py` prints a line a check and exits with 0 or 1.

It needs half a minute. Run it with the Python in which prunekit is installed.
"""

import os
import sys
from collections.abc import Callable

NEEDED = (3, 11)
MEMORY = 2.0  # GB that are free; notebook 12 with its real model needs 4


class NotReadyError(Exception):
    """What is missing, and what to do."""


def check_python() -> str:
    """The version of Python."""
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < NEEDED:
        raise NotReadyError(f"Python {found}; install 3.11 or newer, and make a new virtual environment with it")
    return f"Python {found}"


def check_memory() -> str:
    """Memory that is free now."""
    import psutil

    free = psutil.virtual_memory().available / 1e9
    if free < MEMORY:
        raise NotReadyError(f"{free:.1f} GB of memory free; close other programs until {MEMORY:.0f} GB are free")
    return f"{free:.1f} GB of memory free" + (
        "" if free >= 4 else " (enough, but not for the real model in notebook 12)"
    )


def check_torch() -> str:
    """Whether torch works, and how many threads it takes."""
    import torch

    (torch.ones(8, 8) @ torch.ones(8, 8)).sum().item()
    threads = torch.get_num_threads()
    advice = "" if threads == 1 else "; `prunekit lab` starts notebooks with one, which is faster here"
    return f"torch {torch.__version__}, {threads} thread{'s' * (threads > 1)} of {os.cpu_count()} cores{advice}"


def check_world() -> str:
    """Whether the embedded model loads and answers one question of its world."""
    import prunekit as pk
    from prunekit.world import tasks

    model, tokenizer = pk.load("world")
    question = tasks()["arc_easy"].questions[0]
    right = question.choices[question.answer].strip(" .")
    ids = tokenizer(question.context, return_tensors="pt")["input_ids"]
    written = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]  # type: ignore[operator]
    said = tokenizer.decode(written, skip_special_tokens=True).strip()
    if not said.startswith(right):
        raise NotReadyError(f"the model says {question.context!r} {said!r}, not {right!r}; install prunekit again")
    return f"the embedded model answers: {question.context} {right}"


def check_jupyter() -> str:
    """Whether JupyterLab and what the notebooks import can be imported."""
    import gguf  # noqa: F401
    import ipywidgets  # noqa: F401
    import jupyterlab
    import lightgbm  # noqa: F401
    import optuna  # noqa: F401

    return f"JupyterLab {jupyterlab.__version__}, and what the notebooks import"


CHECKS: tuple[Callable[[], str], ...] = (check_python, check_memory, check_torch, check_jupyter, check_world)


def main() -> int:
    """Run every check; 0 if all passed."""
    failed = 0
    for check in CHECKS:
        try:
            line = f"✓ {check()}"
        except ImportError as error:
            line = f"✗ {error}; install it as your teacher's instructions say, with the extras search and gguf"
        except (
            Exception
        ) as error:  # whatever is wrong with an installation is to be shown, not to stop the other checks
            line = f"✗ {error}"
        failed += line.startswith("✗")
        print(line, flush=True)
    print("Ready." if not failed else f"{failed} of {len(CHECKS)} checks failed: send these lines to your teacher.")
    return int(failed > 0)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    raise SystemExit(main())
