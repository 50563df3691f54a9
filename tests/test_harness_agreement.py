"""Published tasks, question by question: prunekit and lm-evaluation-harness's own task files over the same rows.

Run as a script it compares them on a model of one's own, task by task:

    python tests/test_harness_agreement.py MODEL ../shared/data --tasks boolq,mmlu_anatomy --limit 200 --shots 0
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import pytest
from harness_tasks import PREFIX, YAML, differences, rows_of, run, write_harness_tasks, write_rows
from shared import shared_path

from prunekit.evaluation import zero_shot

SUBJECTS = ("mmlu_anatomy", "mmlu_professional_law")


@pytest.fixture(scope="module")
def stories():
    pytest.importorskip("lm_eval", reason="needs pip install 'prunekit[harness]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = shared_path("models", "stories260K")
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


@pytest.mark.slow
def test_both_answer_the_first_rows_of_each_published_set_alike(stories, tmp_path):
    data, names = shared_path("data"), [*YAML, *SUBJECTS]
    local = write_harness_tasks(tmp_path, data, names, limit=4)
    ours = zero_shot(*stories, names, limit=4, data_dir=data)
    theirs = run(*stories, tmp_path, local, batch_size=4)
    wrong, furthest = differences(ours, theirs)
    assert not wrong and furthest < 1e-3
    assert len(ours.questions) == 4 * len(names) and ours.questions["n_cut"].max() > 100  # some were cut, by both
    said = theirs["results"][f"{PREFIX}lambada"]["perplexity,none"]
    assert ours.perplexities()["lambada"] == pytest.approx(said, rel=1e-4)
    for name in names:
        assert ours.by("task").loc[name, "acc"] == pytest.approx(theirs["results"][PREFIX + name]["acc,none"])


@pytest.mark.slow
def test_both_draw_the_same_examples(stories, tmp_path):
    """MMLU's first ones from the real files; of two others a random draw from a training split."""
    for name in ("winogrande", "arc_easy"):
        for split, rows in rows_of(shared_path("data"), name, 5).items():
            (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
            write_rows(tmp_path / "data" / name / f"{split}.jsonl", rows)
    for names, data in (
        (SUBJECTS[:1], shared_path("data")),
        (("winogrande", "arc_easy"), tmp_path / "data"),
    ):
        local = write_harness_tasks(tmp_path, shared_path("data"), names, limit=5, shots=2)
        ours = zero_shot(*stories, names, limit=5, data_dir=data, shots=2)
        wrong, furthest = differences(ours, run(*stories, tmp_path, local, batch_size=4))
        assert not wrong and furthest < 1e-3


def test_the_subjects_are_the_harnesss():
    tasks = pytest.importorskip("lm_eval.tasks", reason="needs pip install 'prunekit[harness]'")
    from prunekit.evaluation.standard_tasks import SUBJECTS as OURS

    files = (Path(tasks.__file__).parent / "mmlu" / "default").glob("mmlu_*.yaml")
    assert sorted(OURS) == sorted(file.stem.removeprefix("mmlu_") for file in files)


def main():
    """Compare on a model of one's own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--tasks", default=",".join(YAML))
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--shots", type=int, default=0)
    args = parser.parse_args()
    given = AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
    for name in args.tasks.split(","):
        with tempfile.TemporaryDirectory() as folder:
            local = write_harness_tasks(Path(folder), args.data, [name], args.limit, args.shots)
            before = time.process_time()
            ours = zero_shot(*given, [name], limit=args.limit, shots=args.shots, data_dir=args.data)
            between = time.process_time()
            theirs = run(*given, Path(folder), local, batch_size=4)
            after = time.process_time()
            wrong, furthest = differences(ours, theirs)
            told = {"task": name, "shots": args.shots, "questions": len(ours.questions), "differences": len(wrong)}
            told |= {"furthest_nats": furthest, "accuracy": round(ours.mean, 4)}
            told |= {"cpu_seconds": round(between - before, 1), "harness_cpu_seconds": round(after - between, 1)}
            print(json.dumps(told), *wrong, sep="\n", flush=True)


if __name__ == "__main__":
    main()
