"""The published tasks by name: prompts, choices and few-shot examples as in lm-evaluation-harness 0.4."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from prunekit.errors import PrunekitError
from prunekit.evaluation.records import (
    LETTERS,
    Record,
    folders_of,
    read_arc,
    read_boolq,
    read_csv,
    read_files,
    read_hellaswag,
    read_hub,
    read_lambada,
    read_mmlu,
    read_openbookqa,
    read_piqa,
    read_winogrande,
)
from prunekit.questions import Question, Task

SEED = 1234  # lm-evaluation-harness's fewshot_random_seed


@dataclass(frozen=True)
class StandardTask:
    """A published task.

    Attributes:
        name: name here and in lm-evaluation-harness.
        hub: id of the data set on the hub.
        config: its configuration there; None where it has but one.
        split: the evaluated split, as there.
        read: a row → its question.
        normalize: whether the papers' tables count `acc_norm`.
        shots_split: where few-shot examples come from; None where the harness has none.
        first_shots: whether they are the first ones of that split, in place of a random draw for each question.
    """

    name: str
    hub: str
    config: str | None
    split: str
    read: Callable[[Record], Question]
    normalize: bool
    shots_split: str | None = "train"
    first_shots: bool = False


TASKS = {
    task.name: task
    for task in (
        StandardTask("boolq", "aps/super_glue", "boolq", "validation", read_boolq, False),
        StandardTask("piqa", "baber/piqa", None, "validation", read_piqa, True),
        StandardTask("hellaswag", "Rowan/hellaswag", None, "validation", read_hellaswag, True),
        StandardTask("winogrande", "allenai/winogrande", "winogrande_xl", "validation", read_winogrande, False),
        StandardTask("arc_easy", "allenai/ai2_arc", "ARC-Easy", "test", read_arc, False),
        StandardTask("arc_challenge", "allenai/ai2_arc", "ARC-Challenge", "test", read_arc, True),
        StandardTask("openbookqa", "allenai/openbookqa", "main", "test", read_openbookqa, True),
        StandardTask("mmlu", "cais/mmlu", None, "test", read_mmlu, False, "dev", True),
        StandardTask("lambada", "EleutherAI/lambada_openai", "default", "test", read_lambada, False, None),
    )
}

SUBJECTS = (
    "abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge", "college_biology",
    "college_chemistry", "college_computer_science", "college_mathematics", "college_medicine", "college_physics",
    "computer_security", "conceptual_physics", "econometrics", "electrical_engineering", "elementary_mathematics",
    "formal_logic", "global_facts", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
    "high_school_european_history", "high_school_geography", "high_school_government_and_politics",
    "high_school_macroeconomics", "high_school_mathematics", "high_school_microeconomics", "high_school_physics",
    "high_school_psychology", "high_school_statistics", "high_school_us_history", "high_school_world_history",
    "human_aging", "human_sexuality", "international_law", "jurisprudence", "logical_fallacies", "machine_learning",
    "management", "marketing", "medical_genetics", "miscellaneous", "moral_disputes", "moral_scenarios",
    "nutrition", "philosophy", "prehistory", "professional_accounting", "professional_law", "professional_medicine",
    "professional_psychology", "public_relations", "security_studies", "sociology", "us_foreign_policy", "virology",
    "world_religions",
)  # fmt: skip

SEVEN = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")  # of the papers' tables


def is_standard(name: str) -> bool:
    """Whether a published task has this name."""
    return name in TASKS or name.removeprefix("mmlu_") in SUBJECTS


def standard_task(name: str, *, limit: int | None = None, data_dir: str | Path | None = None, shots: int = 0) -> Task:
    """A published task.

    Args:
        name: `"boolq" "piqa" "hellaswag" "winogrande" "arc_easy" "arc_challenge" "openbookqa" "mmlu" "lambada"`, or
            one subject of MMLU, such as `"mmlu_anatomy"`.
        limit: the first so many questions only; of MMLU so many of each subject.
        data_dir: a folder with a folder `name` in it, or one level below, which holds the data set in the hub's form
            (`validation.jsonl`, `test.jsonl` or Parquet files) or in the original one (PIQA's `valid.jsonl` with
            `valid-labels.lst`, MMLU's `test/anatomy_test.csv` and `dev/anatomy_dev.csv`). By default the hub is read.
        shots: answered examples in front of each question, drawn as lm-evaluation-harness draws them: MMLU's first
            ones, of the others a random draw from the training split for each question.

    Raises:
        PrunekitError: there is no such task; its files are missing or malformed; limit or shots out of range.

    Source: lm-evaluation-harness 0.4.13, the YAML files of these tasks.
    """
    if not is_standard(name):
        raise PrunekitError(
            f"no task {name!r}; there are {', '.join(TASKS)} and mmlu_<subject>, such as mmlu_anatomy. Any other task "
            "of lm-evaluation-harness runs through prunekit.evaluation.harness.run_harness"
        )
    if (limit is not None and limit < 1) or shots < 0:
        raise PrunekitError(f"limit={limit}, shots={shots}; a limit is at least 1 or None, shots are at least 0")
    spec = TASKS[name] if name in TASKS else TASKS["mmlu"]
    if spec.name != "mmlu":
        return Task(name, name, tuple(_asked(spec, None, limit, data_dir, shots)), spec.normalize)
    subjects = SUBJECTS if name == "mmlu" else (name.removeprefix("mmlu_"),)
    questions = [question for subject in subjects for question in _asked(spec, subject, limit, data_dir, shots)]
    return Task(name, "mmlu", tuple(questions), spec.normalize)


def _asked(
    spec: StandardTask, subject: str | None, limit: int | None, data_dir: str | Path | None, shots: int
) -> Iterator[Question]:
    """Questions with a prefix: MMLU's description and answered examples."""
    description = "" if subject is None else (
        f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    )  # fmt: skip
    pool = _pool(spec, subject, data_dir, shots)
    draw = random.Random(SEED)
    for row in islice(_rows(spec, subject, spec.split, data_dir), limit):
        question = spec.read(row)
        examples = pool[:shots] if spec.first_shots else _draw(draw, pool, shots, spec, _answered(question))
        front = description + "".join(f"{example}\n\n" for example in examples)
        question = replace(question, domain=subject or question.domain)
        if question.contexts is None:
            yield replace(question, context=front + question.context)
        else:
            yield replace(question, contexts=tuple(front + context for context in question.contexts))


def _pool(spec: StandardTask, subject: str | None, data_dir: str | Path | None, shots: int) -> list[str]:
    """The answered examples to draw from, as texts."""
    if not shots:
        return []
    if spec.shots_split is None:
        raise PrunekitError(f"shots={shots}: {spec.name} has no split of examples; give shots=0")
    questions = [spec.read(row) for row in _rows(spec, subject, spec.shots_split, data_dir)]
    if len(questions) < shots + (spec.split != "test"):
        raise PrunekitError(f"shots={shots}: {spec.name} has {len(questions)} examples; give fewer")
    return [_answered(question) for question in questions]


def _answered(question: Question) -> str:
    """A question with its answer, as an example."""
    contexts = question.contexts or (question.context,) * len(question.choices)
    return contexts[question.answer] + question.choices[question.answer]


def _draw(draw: random.Random, pool: list[str], shots: int, spec: StandardTask, own: str) -> list[str]:
    """Examples for one question, drawn in turn with those of the questions before it.

    The harness draws one more for tasks that it has no test split of, lest the question be among them.

    Source: lm-evaluation-harness, `ContextSampler.sample`.
    """
    if not shots or spec.split == "test":
        return draw.sample(pool, shots)
    found = [example for example in draw.sample(pool, shots + 1) if example != own][:shots]
    return found if len(found) == shots else draw.sample([example for example in pool if example != own], shots)


def _rows(spec: StandardTask, subject: str | None, split: str, data_dir: str | Path | None) -> Iterator[Record]:
    """Rows of a split, from the hub or from a folder."""
    if data_dir is None:
        return read_hub(spec.hub, subject or spec.config, split)
    folders = folders_of(data_dir, (spec.name, spec.hub.split("/")[-1]))
    if subject is not None:
        for folder in folders:
            if (file := folder / split / f"{subject}_{split}.csv").is_file():
                return read_csv(file, ("question", *LETTERS, "answer"))
    below = [subject] if subject else [".", *([spec.config] if spec.config else []), "data"]
    for folder in [folder / name for folder in folders for name in below]:
        if folder.is_dir() and (rows := read_files(folder, split)) is not None:
            return rows
    raise PrunekitError(_missing(spec, subject, split, Path(data_dir)))


def _missing(spec: StandardTask, subject: str | None, split: str, root: Path) -> str:
    """An error for missing data: lists what was searched and what is accepted."""
    folder = root / spec.name
    if subject is not None:
        return (
            f"mmlu_{subject}: no file {folder / split / f'{subject}_{split}.csv'}; give that (the original form), or "
            f"{folder / subject / split}.jsonl or .parquet with the hub's columns, or data_dir=None to read {spec.hub}"
        )
    original = f", {folder / 'valid.jsonl'} with valid-labels.lst (the original form)" if spec.name == "piqa" else ""
    return (
        f"{spec.name}: no file {folder / split}.jsonl; give that or a .parquet file, with the columns of {spec.hub}"
        f"{original}; or data_dir=None to read {spec.hub} from the hub"
    )


Tasks = str | Mapping[str, Task] | Iterable[Task | str]


def named_tasks(
    tasks: Tasks, *, limit: int | None = None, data_dir: str | Path | None = None, shots: int = 0
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
    found = [
        standard_task(each, **options)  # type: ignore[arg-type]
        if isinstance(each, str)
        else replace(each, questions=each.questions[:limit])
        for each in given
    ]
    names = [task.name for task in found]
    if not found or not all(task.questions for task in found):
        empty = [task.name for task in found if not task.questions]
        raise PrunekitError(f"no question to ask in {empty or 'an empty set of tasks'}; give at least one a task")
    if len(set(names)) < len(names):
        raise PrunekitError(f"two tasks share a name in {names}; give each task its own name")
    return found
