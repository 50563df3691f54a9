"""Runs tasks of lm-evaluation-harness on a model in memory (an optional extra)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunekit.errors import PrunekitError, reason, similar
from prunekit.evaluation.standard_tasks import TASKS
from prunekit.models import evaluating


@dataclass(frozen=True, eq=False)
class HarnessResult:
    """Results of lm-evaluation-harness.

    Attributes:
        metrics: task → metric → value, as the harness reports them.
    """

    metrics: dict[str, dict[str, Any]]

    def headline(self) -> dict[str, dict[str, float]]:
        """Task → metric → value, without standard errors and non-numeric values."""

        def is_figure(name: str, value: Any) -> bool:
            return isinstance(value, int | float) and "stderr" not in name and name not in ("name", "sample_len")

        return {task: {k: v for k, v in values.items() if is_figure(k, v)} for task, values in self.metrics.items()}

    def __repr__(self) -> str:
        return f"HarnessResult({self.headline()})"


def run_harness(
    model: nn.Module,
    tokenizer: Any,
    tasks: Iterable[str],
    *,
    include_path: str | Path | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    shots: int | None = None,
) -> HarnessResult:
    """Runs lm-evaluation-harness on a model in memory.

    Args:
        model: a causal language model of `transformers`.
        tokenizer: the model's own tokenizer.
        tasks: names of the harness's tasks; prunekit's own are answered by `zero_shot`.
        include_path: folder with task files (YAML) of your own. Where it is given, the harness's own 14 s of default
            tasks are not read, and their names are not known.
        batch_size: sequences a forward pass.
        limit: questions a task at most; None asks all.
        shots: answered examples before each question; None takes each task's own number.

    Returns:
        A `HarnessResult`.

    Raises:
        PrunekitError: lm-evaluation-harness is not installed, or a task is unknown.
    """
    names = list(tasks)
    if isinstance(tasks, (str, Mapping)) or not all(isinstance(name, str) for name in names):
        raise PrunekitError(
            "give a list of names of lm-evaluation-harness's tasks; prunekit's own are answered by zero_shot"
        )
    lm_eval = import_harness()
    manager = make_manager(lm_eval, include_path, names)
    lm = lm_eval.models.huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    options: Any = {"limit": limit, "num_fewshot": shots, "bootstrap_iters": 0, "log_samples": False}
    try:
        with evaluating(model), torch.no_grad():
            found = lm_eval.simple_evaluate(model=lm, tasks=names, task_manager=manager, **options)["results"]
    except OSError as error:  # what datasets raises without a network is one
        raise PrunekitError(
            f"lm-evaluation-harness cannot read the data of {', '.join(names)} ({reason(error)}); check the network "
            "and the name of the data set"
        ) from error
    metrics = {
        task: {name.removesuffix(",none"): value for name, value in values.items() if name != "alias"}
        for task, values in found.items()
    }
    return HarnessResult(metrics)


def import_harness(why: str = "") -> Any:
    """The package `lm_eval` with the submodules used here.

    Args:
        why: it is needed, for the message.

    Raises:
        PrunekitError: it is not installed.
    """
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise PrunekitError(
            f"{why}lm-evaluation-harness cannot be used ({reason(error)}); pip install 'prunekit[harness]', "
            "or use prunekit.zero_shot, which gives the same answers"
        ) from error
    return lm_eval


@cache
def _default_tasks() -> Any:
    """The index of the harness's own tasks, which takes 14 s to read."""
    return import_harness().tasks.TaskManager()


def make_manager(lm_eval: Any, include_path: str | Path | None, names: list[str]) -> Any:
    """The harness's task index, after a check that it contains all given tasks."""
    if not names:
        raise PrunekitError("no task to run; give names of lm-evaluation-harness's tasks")
    path = None if include_path is None else str(include_path)
    manager = _default_tasks() if path is None else lm_eval.tasks.TaskManager(include_path=path, include_defaults=False)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise PrunekitError(
            f"no task {', '.join(map(repr, unknown))} in {path or 'lm-evaluation-harness'}; `lm_eval ls tasks` lists "
            f"its own, and prunekit has {', '.join(TASKS)} and mmlu_<subject>{similar(unknown[0], TASKS)}"
        )
    return manager
