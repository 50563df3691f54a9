"""The published tasks as lm-evaluation-harness's own YAML files define them, over rows of local files."""

import csv
import json
from itertools import islice
from pathlib import Path

import yaml

YAML = {
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "lambada": "lambada/lambada_openai.yaml",
}
SPLIT = {"arc_easy": "test", "arc_challenge": "test", "openbookqa": "test", "lambada": "test"}
PREFIX = "local_"


def write_harness_tasks(folder, data_dir, names, limit, shots=0):
    """Writes a YAML file a task, which includes the harness's own, and the rows it asks; returns their names."""
    import lm_eval.tasks

    own = Path(lm_eval.tasks.__file__).parent
    for name in names:
        subject = name.removeprefix("mmlu_") if name.startswith("mmlu_") else None
        config = own / (f"mmlu/default/{name}.yaml" if subject else YAML[name])
        splits = mmlu_rows(data_dir, subject, limit) if subject else rows_of(data_dir, name, limit)
        files = {split: write_rows(folder / f"{name}.{split}.jsonl", rows) for split, rows in splits.items()}
        told = {
            "include": str(config),
            "task": PREFIX + name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
            "num_fewshot": shots,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(told))
    return [PREFIX + name for name in names]


def write_tasks(folder, tasks):
    """Writes a YAML file a task of prunekit's, whose choices follow one space, or nothing; returns their names."""
    for task in tasks:
        partial = task.questions[0].contexts is not None
        separator = " " if task.questions[0].choices[0].startswith(" ") else ""
        rows = [
            {"contexts": q.contexts, "choice": q.choices[0].removeprefix(separator), "answer": q.answer}
            if partial
            else {"context": q.context, "choices": [c.removeprefix(separator) for c in q.choices], "answer": q.answer}
            for q in task.questions
        ]
        files = {"test": write_rows(folder / f"{task.name}.jsonl", rows)}
        told = {
            "task": PREFIX + task.name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": "answer" if partial else "context",
            "doc_to_choice": "contexts" if partial else "choices",
            "doc_to_target": "choice" if partial else "answer",
            "target_delimiter": separator,
            "metric_list": [
                {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")
            ],
        }
        (folder / f"{task.name}.yaml").write_text(yaml.safe_dump(told))
    return [PREFIX + task.name for task in tasks]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows_of(data_dir, name, limit):
    """The rows as the hub has them; those after the ones asked are the training split."""
    folder = Path(data_dir) / "zeroshot" / {"lambada": "lambada_openai"}.get(name, name)
    split = SPLIT.get(name, "validation")
    (file,) = [file for file in folder.glob(f"{split}*.jsonl")]
    with file.open(encoding="utf-8") as lines:
        rows = [as_on_the_hub(name, json.loads(line)) for line in islice(lines, limit + 30)]
    return {split: rows[:limit]} | ({} if name == "lambada" else {"train": rows[limit:]})


def as_on_the_hub(name, row):
    if name == "boolq":
        return {"passage": row["passage"], "question": row["question"], "label": int(row["answer"])}
    if name == "hellaswag":  # what the file has as one text
        return {**row, "ctx_a": row["ctx"], "ctx_b": ""}
    if name == "lambada":
        return {"text": f"{row['context']} {row['continuation']}"}
    return row


def mmlu_rows(data_dir, subject, limit):
    found = {}
    for split in ("test", "dev"):
        with (Path(data_dir) / "mmlu" / split / f"{subject}_{split}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(islice(csv.reader(file), limit if split == "test" else None))
        found[split] = [{"question": r[0], "choices": r[1:5], "answer": "ABCD".index(r[5])} for r in rows]
    return found


def differences(ours, theirs):
    """Questions that both answer otherwise, and the largest difference of a log-likelihood in nats.

    Args:
        ours: a `ZeroShotResult`.
        theirs: the harness's dictionary of results.

    Returns:
        Rows (task, question, what differs), and a number.
    """
    wrong, furthest, n = [], 0.0, 0
    for task, rows in ours.questions.groupby("task", sort=False):
        samples = sorted(theirs["samples"][PREFIX + task], key=lambda sample: sample["doc_id"])
        for (_, row), sample in zip(rows.iterrows(), samples, strict=True):
            n += 1
            said = sample["filtered_resps"] if len(row["log_likelihoods"]) > 1 else [sample["filtered_resps"][0]]
            sums = [float(response[0]) for response in said]
            furthest = max(furthest, *(abs(a - b) for a, b in zip(row["log_likelihoods"], sums, strict=True)))
            for metric, column in (("acc", "correct"), ("acc_norm", "correct_norm")):
                if metric in sample and bool(sample[metric]) != bool(row[column]):
                    wrong.append((task, row["question"], metric, row["log_likelihoods"], sums))
    assert n == len(ours.questions)
    return wrong, furthest


def run(model, tokenizer, folder, names, batch_size=1):
    """The harness's dictionary of results."""
    import lm_eval
    import lm_eval.models.huggingface
    import lm_eval.tasks

    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    lm = lm_eval.models.huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    return lm_eval.simple_evaluate(
        model=lm, tasks=names, task_manager=manager, log_samples=True, bootstrap_iters=0, verbosity="ERROR"
    )
