"""Turns tasks and names of published tasks into a list of tasks."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from prunekit.errors import PrunekitError
from prunekit.evaluation.standard_tasks import standard_task
from prunekit.questions import Task

Tasks = str | Mapping[str, Task] | Iterable[Task | str]


def named_tasks(
    tasks: Tasks,
    *,
    limit: int | None = None,
    data_dir: str | Path | None = None,
    shots: int = 0,
) -> list[Task]:
    """The tasks as a list, with unique names and at least one question each.

    Args:
        tasks: tasks, name → task, or names as `standard_task` takes them; mixed too.
        limit: the first so many questions of each task only.
        data_dir: where named tasks are read from, as in `standard_task`.
        shots: answered examples in front of each question of a named task.

    Raises:
        PrunekitError: there is no task or question, two tasks share a name, or what `standard_task` refuses.
    """
    given = [tasks] if isinstance(tasks, str) else list(tasks.values() if isinstance(tasks, Mapping) else tasks)
    other = next((task for task in given if not isinstance(task, Task | str)), None)
    if other is not None:
        raise PrunekitError(f"{other!r:.60} is no task; give names, such as 'boolq', or Tasks")
    options = {"limit": limit, "data_dir": data_dir, "shots": shots}
    found = [standard_task(task, **options) if isinstance(task, str) else _first(task, limit) for task in given]  # type: ignore[arg-type]
    names = [task.name for task in found]
    if not found or not all(task.questions for task in found):
        empty = [task.name for task in found if not task.questions]
        raise PrunekitError(f"no question to ask in {empty or 'an empty set of tasks'}; give at least one a task")
    if len(set(names)) < len(names):
        raise PrunekitError(f"two tasks share a name in {names}; give each task its own name")
    return found


def _first(task: Task, limit: int | None) -> Task:
    """A task cut to its first questions."""
    if limit is not None and limit < 1:
        raise PrunekitError(f"limit={limit}; a limit is at least 1 or None")
    return task if limit is None else replace(task, questions=task.questions[:limit])
