"""Published tasks and texts by name: what is read from which file, and what is refused."""

import json

import pytest
from evaluation_helpers import byte_tokenizer, choice_task, llama
from shared import shared_path

import prunekit as pk
from prunekit import PrunekitError, zero_shot
from prunekit.evaluation import records, standard_task, standard_text
from prunekit.evaluation.standard_tasks import SEVEN, SUBJECTS, TASKS

ROWS = {
    "boolq": {"passage": "P.", "question": "is it", "answer": True},
    "piqa": {"goal": "Open it", "sol1": "pull", "sol2": " push ", "label": 1},
    "hellaswag": {
        "activity_label": "Roof", "ctx_a": "A man [header] stands.", "ctx_b": "he", "label": "2",
        "endings": ["sits [title] Then he goes.", " b", "c", "d"],
    },
    "winogrande": {"sentence": "Ann met Bo and _ left. ", "option1": "Ann", "option2": "Bo", "answer": "2"},
    "arc_easy": {"question": "Why?", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "3"},
    "arc_challenge": {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"},
    "openbookqa": {"question_stem": "Fog is", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": " B"},
    "lambada": {"text": "the cat sat on the mat"},
}  # fmt: skip
ASKED = {
    "boolq": ("P.\nQuestion: is it?\nAnswer:", (" no", " yes"), 1),
    "piqa": ("Question: Open it\nAnswer:", (" pull", "  push "), 1),
    "hellaswag": ("Roof: A man stands. He", (" sits. Then he goes.", " b", " c", " d"), 2),
    "winogrande": ("", (" left.", " left."), 1),
    "arc_easy": ("Question: Why?\nAnswer:", (" a", " b", " c"), 2),
    "arc_challenge": ("Question: Why?\nAnswer:", (" a", " b"), 0),
    "openbookqa": ("Fog is", (" a", " b"), 1),
    "lambada": ("the cat sat on the", (" mat",), 0),
}
MMLU = '"Which, ""if any""?",one,two,three,four,C\n'


def write(folder, name, row, split=None):
    """One row as JSON lines; the file."""
    path = folder / name / f"{split or TASKS[name].split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return path


@pytest.fixture()
def data(tmp_path):
    """A row of each task, and of MMLU in its original form."""
    for name, row in ROWS.items():
        write(tmp_path, name, row)
    for split, n in (("test", 2), ("dev", 5)):
        (tmp_path / "mmlu" / split).mkdir(parents=True)
        for subject in SUBJECTS:
            (tmp_path / "mmlu" / split / f"{subject}_{split}.csv").write_text(
                "".join(MMLU.replace("Which", f"{split} {i}: which") for i in range(n))
            )
    return tmp_path


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_asked_as_the_harness_asks_it(data, name):
    task = standard_task(name, data_dir=data)
    (question,) = task.questions
    assert (question.context, question.choices, question.answer) == ASKED[name]
    assert (task.name, task.form) == (name, name)
    if name == "winogrande":
        assert question.contexts == ("Ann met Bo and Ann", "Ann met Bo and Bo")


def test_mmlu_has_its_description_its_examples_and_its_subjects_as_domains(data):
    task = standard_task("mmlu", data_dir=data, limit=1, shots=2)
    assert [question.domain for question in task.questions] == [*SUBJECTS]
    asked = '{}: which, ""if any""?\nA. one\nB. two\nC. three\nD. four\nAnswer:'.replace('""', '"')
    lines = "The following are multiple choice questions (with answers) about {}.\n\n"
    subject = next(question for question in task.questions if question.domain == "high_school_us_history")
    examples = "".join(f"{asked.format(f'dev {i}')} C\n\n" for i in range(2))
    assert subject.context == lines.format("high school us history") + examples + asked.format("test 0")
    assert (subject.choices, subject.answer) == ((" A", " B", " C", " D"), 2)
    assert len(standard_task("mmlu_virology", data_dir=data).questions) == 2


def test_examples_of_others_are_drawn_from_the_training_split(data):
    rows = [{**ROWS["boolq"], "question": f"is it {i}", "answer": bool(i % 2)} for i in range(9)]
    (data / "boolq" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (question,) = standard_task("boolq", data_dir=data, shots=3).questions
    *shots, last = question.context.split("\n\n")
    assert len(set(shots)) == 3 and last == ASKED["boolq"][0]
    assert all(shot.endswith(" yes" if int(shot[-12]) % 2 else " no") for shot in shots if shot[-13] == " ")
    again = standard_task("boolq", data_dir=data, shots=3).questions[0]
    assert again == question
    with pytest.raises(PrunekitError, match="shots=9: boolq has 9 examples"):
        standard_task("boolq", data_dir=data, shots=9)
    with pytest.raises(PrunekitError, match="lambada has no split of examples"):
        standard_task("lambada", data_dir=data, shots=1)


def test_other_forms_of_the_same_rows(data, tmp_path_factory):
    other = tmp_path_factory.mktemp("other") / "zeroshot"
    write(other, "boolq", {"passage": "P.", "question": "is it", "label": 1, "idx": 0}, "validation_1000")
    piqa = {name: ROWS["piqa"][name] for name in ("goal", "sol1", "sol2")}
    write(other, "piqa", piqa, "valid").with_name("valid-labels.lst").write_text("1\n")
    whole = {name: ROWS["hellaswag"][name] for name in ("activity_label", "label", "endings")}
    write(other, "hellaswag", {**whole, "ctx": "A man stands. He"})
    lambada = write(other, "lambada", {"context": "the cat sat on the", "continuation": "mat"})
    lambada.parent.rename(other / "lambada_openai")
    for name in ("boolq", "piqa", "hellaswag", "lambada"):
        assert standard_task(name, data_dir=other.parent).questions == standard_task(name, data_dir=data).questions


def test_parquet_files_of_the_hub_are_read(data, tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("hub") / "ai2_arc" / "ARC-Easy"
    folder.mkdir(parents=True)
    for piece in (0, 1):
        rows = datasets.Dataset.from_list([{**ROWS["arc_easy"], "question": f"Why {piece}?"}])
        rows.to_parquet(folder / f"test-0000{piece}-of-00002.parquet")
    task = standard_task("arc_easy", data_dir=folder.parents[1])
    assert [q.context for q in task.questions] == [f"Question: Why {i}?\nAnswer:" for i in (0, 1)]
    subject = folder.parents[1] / "mmlu" / "anatomy"
    subject.mkdir(parents=True)
    row = {"question": " Which? ", "choices": ["one", "two", "three", "four"], "answer": 2, "subject": "anatomy"}
    datasets.Dataset.from_list([row]).to_parquet(subject / "test-00000-of-00001.parquet")
    (question,) = standard_task("mmlu_anatomy", data_dir=folder.parents[1]).questions
    assert question.answer == 2 and question.context.endswith("\n\nWhich?\nA. one\nB. two\nC. three\nD. four\nAnswer:")


def test_without_a_folder_the_hub_is_read(monkeypatch, data):
    import datasets

    asked = []

    def load(path, name, split):
        asked.append((path, name, split))
        if path == "Rowan/hellaswag":
            raise ConnectionError("no network")
        return [ROWS["piqa"] if "piqa" in path else {"question": "Q", "choices": [*"abcd"], "answer": 3}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert standard_task("piqa").questions == standard_task("piqa", data_dir=data).questions
    assert standard_task("mmlu_virology", shots=1).questions[0].context.count("Q\nA. a") == 2
    with pytest.raises(
        PrunekitError, match="cannot read 'Rowan/hellaswag'.*the network or the hub does not answer.*--data-dir"
    ):
        standard_task("hellaswag")
    mmlu = [("cais/mmlu", "virology", split) for split in ("dev", "test")]
    assert asked == [("baber/piqa", None, "validation"), *mmlu, ("Rowan/hellaswag", None, "validation")]


MALFORMED = {
    "no JSON": ("piqa", "{", r"piqa.validation\.jsonl, line 2: this is no JSON"),
    "no object": ("piqa", "[1]", r"line 2: \[1\] is no JSON object"),
    "column missing": ("piqa", {"goal": "g", "sol1": "a", "label": 0}, r"line 2: 'sol2' is missing; it has 'goal'"),
    "label out of range": ("piqa", {**ROWS["piqa"], "label": 2}, r"line 2: the label is 2; it must be one of 0, 1"),
    "hidden label": ("hellaswag", {**ROWS["hellaswag"], "label": ""}, r"the label is ''; it must be one of 0, 1, 2, 3"),
    "no truth value": ("boolq", {**ROWS["boolq"], "answer": "si"}, r"the label is 'si'; it must be one of False, True"),
    "unknown letter": ("arc_easy", {**ROWS["arc_easy"], "answerKey": "D"}, r"is 'D'; it must be one of '1', '2', '3'"),
    "fewer texts": (
        "openbookqa",
        {**ROWS["openbookqa"], "choices": {"text": ["a"], "label": ["A", "B"]}},
        "1 texts for 2 labels",
    ),
    "no list": (
        "arc_easy",
        {**ROWS["arc_easy"], "choices": {"text": "a", "label": "A"}},
        "'choices.label' is 'A', not a list",
    ),
    "no choices": ("arc_easy", {"question": "Why?", "answerKey": "1"}, "'choices' is missing"),
    "no text": ("boolq", {**ROWS["boolq"], "passage": 3}, "'passage' is 3 and no text"),
    "no gap": ("winogrande", {**ROWS["winogrande"], "sentence": "Ann left."}, "'sentence' has no gap"),
    "one word": ("lambada", {"text": "mat"}, "a single word has no context: 'mat'"),
}


@pytest.mark.parametrize(("name", "row", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_line_is_named(data, name, row, message):
    path = data / name / f"{TASKS[name].split}.jsonl"
    path.write_text(path.read_text() + (row if isinstance(row, str) else json.dumps(row)) + "\n")
    assert standard_task(name, data_dir=data, limit=1).questions
    with pytest.raises(PrunekitError, match=message):
        standard_task(name, data_dir=data)


def test_malformed_rows_of_original_files_are_named(data):
    (data / "mmlu" / "test" / "anatomy_test.csv").write_text(MMLU + "Which?,one,two,three,C\n")
    with pytest.raises(PrunekitError, match=r"anatomy_test\.csv, line 2: 5 columns; 6 are needed: question, A"):
        standard_task("mmlu_anatomy", data_dir=data)
    (data / "mmlu" / "test" / "anatomy_test.csv").write_text(MMLU.replace(",C", ",E"))
    with pytest.raises(
        PrunekitError, match=r"anatomy_test\.csv, line 1: the label is 'E'; it must be one of 'A', 'B', 'C', 'D'"
    ):
        standard_task("mmlu_anatomy", data_dir=data)
    (data / "piqa" / "validation-labels.lst").write_text("1\n")
    lines = [json.dumps({**ROWS["piqa"], "goal": "g"}), json.dumps({"goal": "g", "sol1": "a", "sol2": "b"})]
    (data / "piqa" / "validation.jsonl").write_text("\n".join(lines))
    with pytest.raises(PrunekitError, match=r"line 2: validation-labels\.lst ends after 1 labels"):
        standard_task("piqa", data_dir=data)


REFUSED = {
    "unknown task": ({"name": "bollq"}, "no task 'bollq'; there are boolq, piqa, .*mmlu_<subject>"),
    "unknown subject": ({"name": "mmlu_alchemy"}, "no task 'mmlu_alchemy'"),
    "no folder": ({"name": "boolq", "data_dir": "no/such"}, "data_dir='no/such' is no folder"),
    "limit": ({"name": "boolq", "limit": 0}, "limit=0"),
    "shots": ({"name": "boolq", "shots": -1}, "shots=-1"),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_asked_is_refused(given, message):
    with pytest.raises(PrunekitError, match=message):
        standard_task(**given)


def test_a_missing_file_is_named_with_the_forms_that_are_accepted(tmp_path):
    with pytest.raises(
        PrunekitError, match=r"piqa: no file .*piqa.validation\.jsonl;.*parquet.*valid-labels\.lst.*baber/piqa"
    ):
        standard_task("piqa", data_dir=tmp_path)
    with pytest.raises(PrunekitError, match=r"no file .*mmlu.test.virology_test\.csv; give that.*cais/mmlu"):
        standard_task("mmlu_virology", data_dir=tmp_path)
    for part in ("a", "b"):
        write(tmp_path, "boolq", ROWS["boolq"], f"validation_{part}")
    with pytest.raises(PrunekitError, match=r"validation_a\.jsonl, validation_b\.jsonl in .* could each be meant"):
        standard_task("boolq", data_dir=tmp_path)


def test_names_and_tasks_are_asked_together_and_limited(data):
    result = zero_shot(
        llama(max_position_embeddings=512), byte_tokenizer(), ["boolq", choice_task()], limit=2, data_dir=data
    )
    assert list(result.by("task")["n"]) == [1, 2]
    assert zero_shot(llama(), byte_tokenizer(), "piqa", data_dir=data).accuracy().index.tolist() == ["piqa"]


def test_subjects_are_domains_of_the_knowledge_distribution(data):
    model = llama(max_position_embeddings=512)
    groups = pk.discover(model).of_kind("layer")
    found = pk.knowledge_distribution(
        model, byte_tokenizer(), groups, {}, tasks=["mmlu_anatomy", "mmlu_virology"], data_dir=data, limit=1
    )
    assert set(found.questions["domain"]) == {"anatomy", "virology"}
    with pytest.raises(PrunekitError, match="'lambada' has questions with a single choice"):
        pk.knowledge_distribution(model, byte_tokenizer(), groups, {}, tasks=["lambada"], data_dir=data)


def test_every_row_of_the_real_files_becomes_a_question():
    data = shared_path("data")
    sizes = {name: len(standard_task(name, data_dir=data).questions) for name in TASKS}
    assert sizes == {
        "boolq": 3270, "piqa": 1838, "hellaswag": 1000, "winogrande": 1267, "arc_easy": 2376, "arc_challenge": 1172,
        "openbookqa": 500, "mmlu": 14042, "lambada": 5153,
    }  # fmt: skip
    assert set(SEVEN) < set(sizes)


def test_piqa_in_both_forms_is_the_same(tmp_path):
    folder = shared_path("data", "zeroshot", "piqa")
    for name in ("valid.jsonl", "valid-labels.lst"):
        (tmp_path / "piqa").mkdir(exist_ok=True)
        (tmp_path / "piqa" / name).write_bytes((folder / f"raw_{name}").read_bytes())
    original = standard_task("piqa", data_dir=tmp_path)
    assert original.questions == standard_task("piqa", data_dir=shared_path("data")).questions


def test_texts_by_name(tmp_path, monkeypatch):
    import datasets

    data = shared_path("data")
    assert standard_text("wikitext2", data_dir=data) == (data / "wikitext2" / "test.txt").read_text(encoding="utf-8")
    assert standard_text("ptb", data_dir=data).startswith(" no it was n't black monday")
    assert len(standard_text("c4", data_dir=data)) > 100_000
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **_: [{"text": "a"}, {"text": "b"}])
    assert standard_text("wikitext2") == "a\n\nb" and standard_text("c4") == "a b"
    with pytest.raises(PrunekitError, match=r"ptb: no file .*ptb\.test\.txt; give that"):
        standard_text("ptb", data_dir=tmp_path)
    with pytest.raises(PrunekitError, match="no text 'wikitext3'; there are wikitext2, ptb, c4"):
        standard_text("wikitext3")


def test_labels_are_places_among_what_is_allowed():
    row = records.Record({"label": "1"}, "here")
    assert row.label("1", (0, 1)) == row.label(1, (0, 1)) == 1
    assert [row.label(v, (False, True)) for v in (False, True)] == [0, 1]
    with pytest.raises(PrunekitError, match="here: the label is True; it must be one of 0, 1"):
        row.label(True, (0, 1))
