"""Runs lm-evaluation-harness on a model in memory (an optional extra)."""

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from torch import nn

from prunekit.errors import PrunekitError, reason
from prunekit.evaluation.standard_tasks import TASKS, named_tasks
from prunekit.models import evaluating
from prunekit.questions import Question, Task

PREFIX = "prunekit_"  # before our tasks' names, so that none is mistaken for one of the harness's own


@dataclass(frozen=True, eq=False)
class HarnessResult:
    """Results of lm-evaluation-harness.

    Attributes:
        questions: one row per question: task, question (its number), gold, prediction (by summed
            log-likelihood), correct (`acc`), correct_norm (`acc_norm`; None where the task does not ask for it),
            log_likelihoods (a list, one a choice, in nats). Empty for tasks that are not multiple choice.
        metrics: task → metric → value, as the harness reports them.
    """

    questions: pd.DataFrame
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
    tasks: Mapping[str, Task] | Iterable[Task | str],
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
        tasks: prunekit's tasks, which need no network, or names of the harness's tasks, or both.
        include_path: folder with task files (YAML) of your own. Where it is given, or all tasks are prunekit's,
            the harness's own 14 s of default tasks are not read, and their names are not known.
        batch_size: sequences a forward pass.
        limit: questions a task at most; None asks all.
        shots: answered examples before each question; None takes each task's own number.

    Returns:
        A `HarnessResult`.

    Raises:
        PrunekitError: lm-evaluation-harness is not installed, a task is unknown or cannot be written in its form.
    """
    lm_eval = import_harness()
    given = list(tasks.values() if isinstance(tasks, Mapping) else tasks)
    ours = [task for task in given if isinstance(task, Task)]
    names = [task for task in given if isinstance(task, str)]
    with written_tasks(ours) as (folder, written), evaluating(model), torch.no_grad():
        paths = [path for path in (folder, include_path) if path is not None]
        manager = make_manager(lm_eval, paths, bool(names) and include_path is None, names)
        lm = lm_eval.models.huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        try:
            results = lm_eval.simple_evaluate(
                model=lm,
                tasks=[*written, *names],
                task_manager=manager,
                limit=limit,
                num_fewshot=shots,
                log_samples=True,
                bootstrap_iters=0,
            )
        except OSError as error:  # what datasets raises without a network is one
            raise PrunekitError(
                f"lm-evaluation-harness cannot read the data of {', '.join(names) or 'these tasks'} "
                f"({reason(error)}); check the network and the name of the data set"
            ) from error
    return read_results(results)


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


def make_manager(lm_eval: Any, paths: list[Any], defaults: bool, names: list[str]) -> Any:
    """The harness's task index, after a check that it contains all given tasks."""
    if not paths and not names:
        raise PrunekitError("no task to run; give prunekit's tasks or names of the harness's")
    manager = lm_eval.tasks.TaskManager(include_path=[str(path) for path in paths], include_defaults=defaults)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        where = "lm-evaluation-harness" if defaults else str(paths[-1])
        raise PrunekitError(
            f"no task {', '.join(map(repr, unknown))} in {where}; `lm_eval ls tasks` lists its own, "
            f"and prunekit has {', '.join(TASKS)} and mmlu_<subject>"
        )
    return manager


@contextmanager
def written_tasks(tasks: list[Task]) -> Iterator[tuple[str | None, list[str]]]:
    """Writes tasks into a temporary folder in the harness's form; yields the folder and the task names."""
    if not tasks:
        yield None, []
        return
    with tempfile.TemporaryDirectory() as folder:
        found = named_tasks(tasks)
        for task in found:
            write_task(task, Path(folder))
        yield folder, [PREFIX + task.name for task in found]


def write_task(task: Task, folder: Path) -> None:
    """Writes one task: a YAML file, and its questions as JSON lines."""
    partial = task.questions[0].contexts is not None
    separator = separator_of(task, partial)
    data = folder / f"{task.name}.jsonl"
    lines = [json.dumps(write_question(question, len(separator))) for question in task.questions]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "task": PREFIX + task.name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "answer" if partial else "context",
        "doc_to_choice": "contexts" if partial else "choices",
        "doc_to_target": "choice" if partial else "answer",
        "target_delimiter": separator,
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    }
    (folder / f"{task.name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def separator_of(task: Task, partial: bool) -> str:
    """The white space between context and choice, which the harness needs to be the same for all questions."""
    if any(len(question.choices) < 2 for question in task.questions):
        raise PrunekitError(f"task {task.name!r} has questions with a single choice; name lambada_openai in its place")
    found = {choice[: len(choice) - len(choice.lstrip())] for q in task.questions for choice in q.choices}
    if len(found) > 1 or any((q.contexts is not None) != partial for q in task.questions):
        raise PrunekitError(
            f"task {task.name!r} mixes separators {sorted(found)} or forms; lm-evaluation-harness takes one a task: "
            "split the task"
        )
    return found.pop()


def write_question(question: Question, skipped: int) -> dict[str, Any]:
    """One JSON line: the question without its separators of `skipped` characters."""
    choices = [choice[skipped:] for choice in question.choices]
    if question.contexts is None:
        return {"context": question.context, "choices": choices, "answer": question.answer}
    return {"contexts": list(question.contexts), "choice": choices[0], "answer": question.answer}


def read_results(results: Any) -> HarnessResult:
    """The harness's dictionary of results as a `HarnessResult`."""
    rows = [
        read_sample(task.removeprefix(PREFIX), sample)
        for task, samples in results["samples"].items()
        for sample in sorted(samples, key=lambda sample: sample["doc_id"])
        if "acc" in sample and len(sample["filtered_resps"]) > 1
    ]
    metrics = {
        task.removeprefix(PREFIX): {
            name.removesuffix(",none"): value for name, value in values.items() if name != "alias"
        }
        for task, values in results["results"].items()
    }
    return HarnessResult(pd.DataFrame(rows), metrics)


def read_sample(task: str, sample: dict[str, Any]) -> dict[str, Any]:
    """One row per multiple-choice question."""
    sums = [float(response[0]) for response in sample["filtered_resps"]]
    correct_norm = sample.get("acc_norm")
    return {
        "task": task,
        "question": sample["doc_id"],
        "gold": sample["doc"].get("answer"),
        "prediction": sums.index(max(sums)),
        "correct": bool(sample["acc"]),
        "correct_norm": None if correct_norm is None else bool(correct_norm),
        "log_likelihoods": sums,
    }
